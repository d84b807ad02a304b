// SPDX-License-Identifier: Apache-2.0
//! `istio.v1.auth.IstioCertificateService`, served to the mesh's agents.
//!
//! The identity is the one that the request's metadata names (`ImpersonatedIdentity`); it is signed
//! if a pod with that service account runs on the node that the caller's token is bound to. What the
//! signing request itself says of names is not read. The answer is the leaf, the intermediate, and
//! last, in one text, every root.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::{Grpc, UnaryService};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

use super::caller::Callers;
use super::keeper::Current;
use super::limits::{Buckets, Keys};
use super::numbers::{Numbers, Outcome};
use super::sign;
use super::workloads::Workloads;
use mesh_identity::wire::{
    CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, IMPERSONATED,
};
use mesh_identity::{SpiffeId, TrustDomain};
use mesh_log::warn_limited;

/// Longest message; a signing request is shorter by far.
const MESSAGE_MAX: usize = 64 << 10;
/// How long a pod is waited for that an agent knows before this controller does.
const PATIENCE: Duration = Duration::from_secs(2);

/// What requests are judged by.
pub(super) struct Desk {
    pub(super) authority: Current,
    pub(super) callers: Callers,
    pub(super) workloads: Workloads,
    pub(super) numbers: Numbers,
    pub(super) trust_domain: TrustDomain,
    /// The longest life of a leaf.
    pub(super) life: Duration,
    pub(super) now: fn() -> SystemTime,
}

struct Inner {
    desk: Desk,
    /// By address, before the API server is asked; by node, after.
    buckets: Mutex<(Buckets, Buckets)>,
    keys: Mutex<Keys>,
}

/// The service; clones are the same.
#[derive(Clone)]
pub(super) struct CertificateService(Arc<Inner>);

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Answer = Result<Response<CertificateResponse>, Status>;

impl CertificateService {
    pub(super) fn new(desk: Desk) -> Self {
        Self(Arc::new(Inner {
            desk,
            buckets: Mutex::default(),
            keys: Mutex::default(),
        }))
    }

    async fn answer(self, request: Request<CertificateRequest>) -> Answer {
        let from = request.remote_addr().map(|addr| addr.ip().to_string());
        let from = from.unwrap_or_default();
        let mut node = String::new();
        let (result, outcome) = match self.issue(request, &from, &mut node).await {
            Ok(cert_chain) => (
                Ok(Response::new(CertificateResponse { cert_chain })),
                Outcome::Issued,
            ),
            Err((outcome, why)) => {
                let error = format!("{}: {why}", outcome.label());
                warn_limited!("ca_refused", error, from, node, "a certificate is refused");
                (Err(Status::new(code(outcome), error)), outcome)
            }
        };
        self.0.desk.numbers.request(outcome);
        result
    }

    async fn issue(
        &self,
        request: Request<CertificateRequest>,
        from: &str,
        node: &mut String,
    ) -> Result<Vec<String>, (Outcome, String)> {
        let desk = &self.0.desk;
        if !self.0.buckets.lock().await.0.take(from, Instant::now()) {
            return Err((
                Outcome::RateLimited,
                "too many from this address".to_owned(),
            ));
        }
        let token = request.metadata().get("authorization");
        let token = token.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| (Outcome::Unauthenticated, "no token".to_owned()))?;
        *node = desk.callers.node(token).await.map_err(|outcome| {
            let why = "the token must be one of the agents' account, for this CA, bound to a pod";
            (outcome, why.to_owned())
        })?;
        if !self.0.buckets.lock().await.1.take(node, Instant::now()) {
            return Err((Outcome::RateLimited, "too many from this node".to_owned()));
        }
        let request = request.into_inner();
        let id = whose(&request, &desk.trust_domain)?;
        let asked = sign::read(&request.csr)
            .map_err(|outcome| (outcome, format!("the request for {id} is not usable")))?;
        let place = (&**node, id.namespace(), id.service_account());
        if !desk.workloads.is_there(place, PATIENCE).await {
            let why = format!("no pod with the identity {id} runs on node {node}");
            return Err((Outcome::NotOnNode, why));
        }
        let authority = desk.authority.borrow().clone();
        let authority =
            authority.ok_or_else(|| (Outcome::Unavailable, "there is no CA yet".to_owned()))?;
        if !self.0.keys.lock().await.add(asked.digest) {
            let why = format!("the key in the request for {id} was certified before");
            return Err((Outcome::Replayed, why));
        }
        let life = match u64::try_from(request.validity_duration) {
            Ok(0) | Err(_) => desk.life,
            Ok(seconds) => Duration::from_secs(seconds).min(desk.life),
        };
        let leaf = sign::leaf(&authority.signer, &id, &asked, ((desk.now)(), life))
            .map_err(|error| (Outcome::Unavailable, error.to_string()))?;
        tracing::debug!(%id, node, "a certificate is issued");
        Ok(vec![
            leaf,
            authority.intermediate.clone(),
            authority.bundle.clone(),
        ])
    }
}

/// The identity that is asked for.
pub(super) fn whose(
    request: &CertificateRequest,
    trust_domain: &TrustDomain,
) -> Result<SpiffeId, (Outcome, String)> {
    let metadata = request.metadata.as_ref();
    let text = metadata
        .and_then(|metadata| metadata.fields.get(IMPERSONATED)?.string.as_deref())
        .ok_or_else(|| {
            (
                Outcome::NoIdentity,
                format!("the metadata has no {IMPERSONATED}"),
            )
        })?;
    let id = SpiffeId::parse(text).map_err(|why| (Outcome::NoIdentity, why.to_string()))?;
    if id.trust_domain() != trust_domain {
        let why = format!("this CA is for the trust domain {trust_domain}");
        return Err((Outcome::ForeignIdentity, why));
    }
    Ok(id)
}

fn code(outcome: Outcome) -> Code {
    match outcome {
        Outcome::Issued => Code::Ok,
        Outcome::Unauthenticated | Outcome::WrongAudience => Code::Unauthenticated,
        Outcome::NotAnAgent | Outcome::NotBound | Outcome::ForeignIdentity | Outcome::NotOnNode => {
            Code::PermissionDenied
        }
        Outcome::NoIdentity | Outcome::Oversized | Outcome::Malformed | Outcome::WeakKey => {
            Code::InvalidArgument
        }
        Outcome::Replayed => Code::AlreadyExists,
        Outcome::RateLimited => Code::ResourceExhausted,
        Outcome::Unavailable => Code::Unavailable,
    }
}

impl UnaryService<CertificateRequest> for CertificateService {
    type Response = CertificateResponse;
    type Future = Boxed<Answer>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        Box::pin(self.clone().answer(request))
    }
}

impl Service<http::Request<Body>> for CertificateService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Boxed<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE {
                return Ok(Status::unimplemented("only CreateCertificate is served").into_http());
            }
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MESSAGE_MAX);
            Ok(grpc.unary(service, request).await)
        })
    }
}
