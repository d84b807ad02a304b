// SPDX-License-Identifier: Apache-2.0
//! The gRPC service `istio.v1.auth.IstioCertificateService` for the mesh's agents.
//!
//! The request's metadata (`ImpersonatedIdentity`) names the identity. It is certified if a pod with
//! that service account runs on the node that the caller's token is bound to. Names in the signing
//! request are ignored. The response contains the leaf, the intermediate, and last all roots in one
//! string.

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

use super::ca_store::Current;
use super::caller::Authenticator;
use super::limits::{CertifiedKeys, RateLimiter};
use super::metrics::Metrics;
use super::outcome::Outcome;
use super::sign;
use super::tls::Client;
use super::workloads::{PodIdentity, Workloads};
use mesh_identity::wire::{
    CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, IMPERSONATED,
};
use mesh_identity::{SpiffeId, TrustDomain};
use mesh_log::warn_limited;

/// Maximum size of a message.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The time to wait for a pod that the agent knows before this controller does.
const POD_WAIT: Duration = Duration::from_secs(2);

/// The dependencies of the service.
pub(super) struct Dependencies {
    pub(super) authority: Current,
    pub(super) authenticator: Authenticator,
    pub(super) workloads: Workloads,
    pub(super) metrics: Metrics,
    pub(super) trust_domain: TrustDomain,
    /// The maximum lifetime of a leaf.
    pub(super) life: Duration,
    pub(super) now: fn() -> SystemTime,
}

struct Inner {
    deps: Dependencies,
    /// Limits requests by source address, before the token is reviewed.
    by_address: Mutex<RateLimiter>,
    /// Limits requests by node, after the token is reviewed.
    by_node: Mutex<RateLimiter>,
    certified_keys: Mutex<CertifiedKeys>,
}

/// The service. Clones share its state.
#[derive(Clone)]
pub(super) struct CertificateService(Arc<Inner>);

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Answer = Result<Response<CertificateResponse>, Status>;

impl CertificateService {
    pub(super) fn new(deps: Dependencies) -> Self {
        Self(Arc::new(Inner {
            deps,
            by_address: Mutex::default(),
            by_node: Mutex::default(),
            certified_keys: Mutex::default(),
        }))
    }

    async fn answer(self, request: Request<CertificateRequest>) -> Answer {
        let Some(client) = request.extensions().get::<Client>().cloned() else {
            return Err(Status::internal("the connection has no client"));
        };
        let from = client.ip().to_string();
        let mut node = String::new();
        let (result, outcome) = match self.issue(request, &client, &mut node).await {
            Ok(cert_chain) => (
                Ok(Response::new(CertificateResponse { cert_chain })),
                Outcome::Issued,
            ),
            Err((outcome, why)) => {
                let error = format!("{}: {why}", outcome.label());
                warn_limited!(
                    "ca_refused",
                    error,
                    from,
                    node,
                    "certificate request refused"
                );
                (Err(Status::new(code(outcome), error)), outcome)
            }
        };
        self.0.deps.metrics.request(outcome);
        result
    }

    async fn issue(
        &self,
        request: Request<CertificateRequest>,
        client: &Client,
        node: &mut String,
    ) -> Result<Vec<String>, (Outcome, String)> {
        let deps = &self.0.deps;
        let from = client.ip().to_string();
        if !self.0.by_address.lock().await.take(&from, Instant::now()) {
            return Err((
                Outcome::RateLimited,
                "too many requests from this address".to_owned(),
            ));
        }
        let token = request.metadata().get("authorization");
        let token = token.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| (Outcome::Unauthenticated, "no token".to_owned()))?;
        client.present_token();
        *node = deps.authenticator.node(token).await.map_err(|outcome| {
            let why = "the token must belong to the agents' service account, have this CA's audience, and be \
                       bound to a pod";
            (outcome, why.to_owned())
        })?;
        client.prove();
        if !self.0.by_node.lock().await.take(node, Instant::now()) {
            return Err((
                Outcome::RateLimited,
                "too many requests from this node".to_owned(),
            ));
        }
        let request = request.into_inner();
        let id = requested_identity(&request, &deps.trust_domain)?;
        let csr = sign::parse(&request.csr)
            .map_err(|outcome| (outcome, format!("invalid signing request for {id}")))?;
        let pod = PodIdentity {
            node: node.clone(),
            namespace: id.namespace().to_owned(),
            service_account: id.service_account().to_owned(),
        };
        if !deps.workloads.wait_for(&pod, POD_WAIT).await {
            let why = format!("no pod with identity {id} runs on node {node}");
            return Err((Outcome::NotOnNode, why));
        }
        let authority = deps.authority.borrow().clone();
        let authority = authority.ok_or_else(|| (Outcome::Unavailable, "no CA yet".to_owned()))?;
        if !self.0.certified_keys.lock().await.add(csr.digest) {
            let why = format!("the key in the request for {id} already has a certificate");
            return Err((Outcome::Replayed, why));
        }
        let life = match u64::try_from(request.validity_duration) {
            Ok(0) | Err(_) => deps.life,
            Ok(seconds) => Duration::from_secs(seconds).min(deps.life),
        };
        let leaf = sign::leaf(
            &authority.signer,
            &id,
            &csr,
            sign::Validity {
                now: (deps.now)(),
                life,
            },
        )
        .map_err(|error| (Outcome::Unavailable, error.to_string()))?;
        tracing::debug!(%id, node, "certificate issued");
        Ok(vec![
            leaf,
            authority.intermediate.clone(),
            authority.bundle.clone(),
        ])
    }
}

/// Returns the requested identity.
pub(super) fn requested_identity(
    request: &CertificateRequest,
    trust_domain: &TrustDomain,
) -> Result<SpiffeId, (Outcome, String)> {
    let metadata = request.metadata.as_ref();
    let text = metadata
        .and_then(|metadata| metadata.fields.get(IMPERSONATED)?.string.as_deref())
        .ok_or_else(|| {
            (
                Outcome::NoIdentity,
                format!("the metadata lacks {IMPERSONATED}"),
            )
        })?;
    let id = SpiffeId::parse(text).map_err(|why| (Outcome::NoIdentity, why.to_string()))?;
    if id.trust_domain() != trust_domain {
        let why = format!("this CA is for the trust domain {trust_domain}");
        return Err((Outcome::ForeignIdentity, why));
    }
    Ok(id)
}

/// Returns the gRPC code of an outcome.
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
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_MESSAGE_BYTES);
            Ok(grpc.unary(service, request).await)
        })
    }
}
