// SPDX-License-Identifier: Apache-2.0
//! `grpc:URL`: asks a CA that speaks Istio's certificate service.
//!
//! The agent proves itself with a token from a file and the CA with a certificate of a bundle
//! from a file; both are read again each time, because what mounts them renews them. The private
//! key never leaves this process: the CA sees a signing request.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use rcgen::{CertificateParams, DistinguishedName, SanType};
use rustls::pki_types::CertificateDer;
use tokio::sync::Mutex;
use tonic::{
    Request, Status,
    client::Grpc as Client,
    codegen::http::uri::PathAndQuery,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;
use zeroize::Zeroizing;

use super::{
    BoxFuture, IssueError, Issued, Issuer, VALIDITY, Version,
    files::{certificates, read},
};
use crate::{SpiffeId, key::Key};

pub mod wire;

use self::wire::{
    CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, IMPERSONATED, Struct, Value,
};

/// For DNS, TCP and TLS together.
const CONNECT: Duration = Duration::from_secs(5);
/// The interval between two reads of the bundle.
const POLL: Duration = Duration::from_secs(5);
/// A chain of a dozen certificates, with a bundle of as many roots, is below this.
const ANSWER_MAX: usize = 256 << 10;
/// The longest part of a CA's error message that is logged, in bytes.
const EXPLANATION_MAX: usize = 300;

/// The address and credentials for a CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcCa {
    /// `https://HOST:PORT`; the CA's certificate must be valid for the host.
    pub url: String,
    /// A file with the token that the agent shows. `None`: it shows none.
    pub token: Option<PathBuf>,
    /// A PEM file with the roots that may have signed the CA's own certificate.
    pub bundle: PathBuf,
    /// The CA's name of this cluster (the default of istiod is `Kubernetes`).
    pub cluster: String,
}

/// A CA behind gRPC.
#[derive(Debug)]
pub(crate) struct Grpc {
    ca: GrpcCa,
    /// The connection, and the bundle that it was made with.
    channel: Mutex<Option<(Version, Channel)>>,
}

impl Grpc {
    pub(crate) fn new(ca: GrpcCa) -> Result<Self, IssueError> {
        Endpoint::from_shared(ca.url.clone()).map_err(IssueError::Connect)?;
        Ok(Self {
            ca,
            channel: Mutex::new(None),
        })
    }

    /// The connection to the CA, new if its roots are.
    async fn channel(&self) -> Result<(Version, Channel), IssueError> {
        let pem = read(&self.ca.bundle).await?;
        let version = version(&pem);
        let mut kept = self.channel.lock().await;
        if let Some((made_with, channel)) = &*kept
            && *made_with == version
        {
            return Ok((version, channel.clone()));
        }
        let without = || IssueError::Pem {
            what: "certificate",
            path: self.ca.bundle.clone(),
        };
        certificates(&pem).ok_or_else(without)?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
        let channel = Endpoint::from_shared(self.ca.url.clone())
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(IssueError::Connect)?
            .connect_timeout(CONNECT)
            .connect_lazy();
        *kept = Some((version, channel.clone()));
        Ok((version, channel))
    }

    async fn token(&self) -> Result<Option<MetadataValue<Ascii>>, IssueError> {
        let Some(path) = &self.ca.token else {
            return Ok(None);
        };
        let without = || IssueError::Token { path: path.clone() };
        let text = Zeroizing::new(read(path).await?);
        let text = std::str::from_utf8(&text)
            .map_err(|_not_text| without())?
            .trim();
        if text.is_empty() {
            return Err(without());
        }
        let bearer = Zeroizing::new(format!("Bearer {text}"));
        let mut value: MetadataValue<Ascii> = bearer.parse().map_err(|_not_ascii| without())?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    async fn request(
        &self,
        id: &SpiffeId,
        key: &Key,
    ) -> Result<Request<CertificateRequest>, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        let whose = Value {
            string: Some(id.to_string()),
        };
        let mut request = Request::new(CertificateRequest {
            csr: params.serialize_request(key)?.pem()?,
            validity_duration: i64::try_from(VALIDITY.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct {
                fields: BTreeMap::from([(IMPERSONATED.to_owned(), whose)]),
            }),
        });
        if let Some(token) = self.token().await? {
            request.metadata_mut().insert("authorization", token);
        }
        if let Ok(cluster) = self.ca.cluster.parse() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        Ok(request)
    }

    async fn ask(&self, id: &SpiffeId) -> Result<Issued, IssueError> {
        let key = Key::generate()?;
        let request = self.request(id, &key).await?;
        let (version, channel) = self.channel().await?;
        let mut client = Client::new(channel).max_decoding_message_size(ANSWER_MAX);
        client.ready().await.map_err(IssueError::Connect)?;
        let path = PathAndQuery::from_static(CREATE_CERTIFICATE);
        let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
        let answer = client.unary(request, path, codec).await.map_err(refused)?;
        let (chain, roots) = split(&answer.into_inner().cert_chain)?;
        Ok(Issued {
            chain,
            key: Arc::new(key),
            roots,
            version,
        })
    }
}

impl Issuer for Grpc {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.ask(id))
    }

    /// A bundle that changed is how a new root announces itself: the CA then has more to give.
    fn changed<'a>(&'a self, _id: &'a SpiffeId, seen: Version) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            loop {
                tokio::time::sleep(POLL).await;
                let now = read(&self.ca.bundle).await;
                if now.is_ok_and(|pem| version(&pem) != seen && certificates(&pem).is_some()) {
                    return;
                }
            }
        })
    }
}

#[cfg(test)]
impl Grpc {
    /// The version of the bundle as it is now.
    pub(crate) async fn seen(&self) -> Version {
        version(&read(&self.ca.bundle).await.expect("the bundle can be read"))
    }
}

fn version(pem: &[u8]) -> Version {
    let mut hasher = DefaultHasher::new();
    pem.hash(&mut hasher);
    Version(hasher.finish())
}

pub(crate) type Chain = Vec<CertificateDer<'static>>;

/// The chain without its root, and the root, or all of them.
pub(crate) fn split(answer: &[String]) -> Result<(Chain, Chain), IssueError> {
    let (roots, chain) = answer.split_last().ok_or(IssueError::Empty)?;
    let read = |pem: &String| certificates(pem.as_bytes()).ok_or(IssueError::Answer);
    let roots = read(roots)?;
    let chain = chain
        .iter()
        .map(read)
        .collect::<Result<Vec<_>, _>>()?
        .concat();
    if chain.is_empty() {
        return Err(IssueError::Empty);
    }
    Ok((chain, roots))
}

fn refused(status: Status) -> IssueError {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut why: String = status
        .message()
        .chars()
        .take(EXPLANATION_MAX)
        .map(clean)
        .collect();
    // What went wrong below gRPC is in the sources alone.
    let mut source = std::error::Error::source(&status);
    while let Some(error) = source {
        why.push_str(": ");
        why.extend(error.to_string().chars().take(EXPLANATION_MAX).map(clean));
        source = error.source();
    }
    IssueError::Refused {
        code: status.code(),
        why,
    }
}
