// SPDX-License-Identifier: Apache-2.0
//! `grpc:` against a CA that really listens, with TLS, and has moods.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, UNIX_EPOCH},
};

use rcgen::{CertificateSigningRequestParams, SanType};
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, watch};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codegen::{Service, http},
    metadata::MetadataMap,
    server::{Grpc as Serve, UnaryService},
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};
use tonic_prost::ProstCodec;

use super::pki::{Hand, Leaf, Root, config, id, shake, want};
use crate::{
    Ca, GrpcCa, Identities, SpiffeId,
    issuer::{
        BoxFuture, Grpc, IssueError, Issuer,
        grpc::wire::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, IMPERSONATED},
    },
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[derive(Clone, PartialEq)]
enum Mood {
    Good,
    Refuses,
    ForSomebodyElse,
    Says(Vec<String>),
}

/// A CA that signs what its mood says, and tells what it was asked.
#[derive(Clone)]
struct FakeCa {
    root: Arc<Root>,
    hand: Hand,
    mood: watch::Receiver<Mood>,
    asked: mpsc::Sender<(MetadataMap, CertificateRequest)>,
}

impl FakeCa {
    fn sign(&self, request: &CertificateRequest, uri: &str) -> Vec<String> {
        let mut csr = CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
        let leaf = Leaf::of(uri, self.hand.now());
        csr.params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        csr.params.key_usages = leaf.key_usages;
        csr.params.extended_key_usages = leaf.extended;
        csr.params.not_before = leaf.not_before.into();
        csr.params.not_after = leaf.not_after.into();
        let signed = csr.signed_by(&self.root.issuer).unwrap();
        vec![signed.pem(), self.root.pem.clone()]
    }

    fn answer(&self, request: Request<CertificateRequest>) -> Answer {
        let metadata = request.metadata().clone();
        let request = request.into_inner();
        let asked = request.metadata.clone().unwrap_or_default();
        let whose = asked
            .fields
            .get(IMPERSONATED)
            .and_then(|value| value.string.clone());
        self.asked.try_send((metadata, request.clone())).unwrap();
        let mood = self.mood.borrow().clone();
        let cert_chain = match mood {
            Mood::Good => self.sign(&request, &whose.unwrap()),
            Mood::ForSomebodyElse => self.sign(&request, &id("other").to_string()),
            Mood::Says(words) => words,
            Mood::Refuses => {
                return Err(Status::permission_denied(format!(
                    "no\npod{}",
                    "!".repeat(5000)
                )));
            }
        };
        Ok(Response::new(CertificateResponse { cert_chain }))
    }
}

type Answer = Result<Response<CertificateResponse>, Status>;

impl UnaryService<CertificateRequest> for FakeCa {
    type Response = CertificateResponse;
    type Future = BoxFuture<'static, Answer>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        Box::pin(std::future::ready(self.answer(request)))
    }
}

impl Service<http::Request<Body>> for FakeCa {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let ca = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE {
                return Ok(Status::unimplemented("").into_http());
            }
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            Ok(Serve::new(codec).unary(ca, request).await)
        })
    }
}

/// A running CA, and the files that an agent needs to ask it.
struct Setting {
    dir: tempfile::TempDir,
    root: Arc<Root>,
    hand: Hand,
    url: String,
    mood: watch::Sender<Mood>,
    asked: mpsc::Receiver<(MetadataMap, CertificateRequest)>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Setting {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Setting {
    fn start() -> Self {
        let hand = Hand::new();
        let root = Arc::new(Root::new(hand.now()));
        let (mood, mood_reader) = watch::channel(Mood::Good);
        let (sender, asked) = mpsc::channel(100);
        let ca = FakeCa {
            root: Arc::clone(&root),
            hand: hand.clone(),
            mood: mood_reader,
            asked: sender,
        };
        let (url, server) = serve(ca, &root);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("bundle"), &root.pem).unwrap();
        std::fs::write(dir.path().join("token"), "one\n").unwrap();
        Self {
            dir,
            root,
            hand,
            url,
            mood,
            asked,
            server,
        }
    }

    fn ca(&self) -> GrpcCa {
        GrpcCa {
            url: self.url.clone(),
            token: Some(self.dir.path().join("token")),
            bundle: self.dir.path().join("bundle"),
            cluster: "Kubernetes".to_owned(),
        }
    }

    fn issuer(&self) -> Grpc {
        Grpc::new(self.ca()).unwrap()
    }

    async fn asked(&mut self) -> (MetadataMap, CertificateRequest) {
        self.asked.recv().await.unwrap()
    }

    fn write(&self, name: &str, contents: &str) {
        let path: &Path = self.dir.path();
        std::fs::write(path.join(name), contents).unwrap();
    }
}

/// Listens with a certificate of `root` for 127.0.0.1, valid on any real clock of our time.
fn serve(ca: FakeCa, root: &Root) -> (String, tokio::task::JoinHandle<()>) {
    let mut leaf = Leaf::good("ca", ca.hand.now());
    leaf.address = Some(LOCALHOST);
    leaf.not_before = UNIX_EPOCH + Duration::from_secs(1_500_000_000);
    leaf.not_after = UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    let pair = root.sign(leaf);
    let own = Identity::from_pem(pair.chain_pem, pair.key.serialize_pem());
    let incoming = TcpIncoming::bind((LOCALHOST, 0).into()).unwrap();
    let url = format!("https://{}", incoming.local_addr().unwrap());
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(own))
        .unwrap();
    let server = tokio::spawn(async move {
        server.serve_with_incoming(ca, incoming).await.unwrap();
    });
    (url, server)
}

async fn refusal(issuer: &Grpc, whose: &SpiffeId) -> IssueError {
    match issuer.issue(whose).await {
        Ok(_) => panic!("issued"),
        Err(why) => why,
    }
}

#[tokio::test]
async fn two_workloads_believe_each_other_with_certificates_of_the_ca() {
    let mut setting = Setting::start();
    let (_wanted, ids) = want(&["web", "db"]);
    let config = config(Ca::Grpc(setting.ca()), setting.hand.clock());
    let identities = Identities::start(config, ids).await.unwrap();
    identities.ready(&id("web")).await.unwrap();
    identities.ready(&id("db")).await.unwrap();
    let client = identities.client(&id("web"), &id("db")).unwrap();
    let (client, server) = shake(client, identities.server(&id("db")).unwrap()).await;
    assert_eq!(identities.who(client.unwrap().get_ref().1), Ok(id("db")));
    let server = server.unwrap();
    assert_eq!(identities.who(server.get_ref().1), Ok(id("web")));
    let sent = server.get_ref().1.peer_certificates().unwrap();
    assert_eq!(sent.len(), 1, "the root is not sent to peers");

    let (metadata, request) = setting.asked().await;
    assert_eq!(metadata.get("authorization").unwrap(), "Bearer one");
    assert_eq!(metadata.get("clusterid").unwrap(), "Kubernetes");
    assert_eq!(request.validity_duration, 86_400);
    let csr = CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
    let whose = request.metadata.unwrap().fields[IMPERSONATED]
        .string
        .clone()
        .unwrap();
    let SanType::URI(uri) = &csr.params.subject_alt_names[0] else {
        panic!("no URI")
    };
    assert_eq!(uri.as_str(), whose);
}

#[tokio::test]
async fn token_and_bundle_are_read_again_each_time() {
    let mut setting = Setting::start();
    let issuer = setting.issuer();
    issuer.issue(&id("web")).await.unwrap();
    setting.write("token", "two");
    issuer.issue(&id("web")).await.unwrap();
    let tokens = [setting.asked().await, setting.asked().await].map(|(metadata, _)| {
        metadata
            .get("authorization")
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    });
    assert_eq!(tokens, ["Bearer one", "Bearer two"]);

    let stranger = Root::new(setting.hand.now());
    setting.write("bundle", &stranger.pem);
    let why = refusal(&issuer, &id("web")).await;
    assert!(
        matches!(
            why,
            IssueError::Connect(_)
                | IssueError::Refused {
                    code: Code::Unavailable,
                    ..
                }
        ),
        "{why:?}"
    );
    setting.write("bundle", &format!("{}{}", stranger.pem, setting.root.pem));
    issuer.issue(&id("web")).await.unwrap();
}

#[tokio::test]
async fn what_a_ca_may_do_wrong_has_a_reason() {
    let setting = Setting::start();
    let issuer = setting.issuer();
    let mood = |mood| drop(setting.mood.send_replace(mood));
    mood(Mood::Refuses);
    let IssueError::Refused { code, why } = refusal(&issuer, &id("web")).await else {
        panic!("not refused");
    };
    assert_eq!(code, Code::PermissionDenied);
    assert!(why.starts_with("no pod!") && why.len() < 1000, "{why}");

    mood(Mood::Says(vec![]));
    assert!(matches!(
        refusal(&issuer, &id("web")).await,
        IssueError::Empty
    ));
    mood(Mood::Says(vec![setting.root.pem.clone()]));
    assert!(
        matches!(refusal(&issuer, &id("web")).await, IssueError::Empty),
        "a root alone"
    );
    mood(Mood::Says(vec!["x".to_owned(), setting.root.pem.clone()]));
    assert!(matches!(
        refusal(&issuer, &id("web")).await,
        IssueError::Answer
    ));
    mood(Mood::Says(vec!["x".repeat(1 << 20); 2]));
    let why = refusal(&issuer, &id("web")).await;
    assert!(
        matches!(
            why,
            IssueError::Refused {
                code: Code::OutOfRange,
                ..
            }
        ),
        "{why:?}"
    );
    mood(Mood::Good);
    issuer.issue(&id("web")).await.unwrap();

    setting.write("token", " \n");
    assert!(matches!(
        refusal(&issuer, &id("web")).await,
        IssueError::Token { .. }
    ));
    setting.write("token", "one");
    setting.write("bundle", "");
    assert!(matches!(
        refusal(&issuer, &id("web")).await,
        IssueError::Pem { .. }
    ));
}

#[tokio::test]
async fn somebody_elses_certificate_is_not_used() {
    let mut setting = Setting::start();
    setting.mood.send_replace(Mood::ForSomebodyElse);
    let (_wanted, ids) = want(&["web"]);
    let config = config(Ca::Grpc(setting.ca()), setting.hand.clock());
    let identities = Identities::start(config, ids).await.unwrap();
    setting.asked().await;
    // That it is asked again says that the first answer was not taken.
    setting.asked().await;
    assert!(identities.certificate(&id("web")).is_none());
    setting.mood.send_replace(Mood::Good);
    identities.ready(&id("web")).await.unwrap();
}

#[tokio::test]
async fn all_roots_of_the_answer_are_believed() {
    let setting = Setting::start();
    let issuer = setting.issuer();
    let second = Root::new(setting.hand.now());
    let leaf = setting.root.sign(Leaf::good("web", setting.hand.now()));
    let both = format!("{}{}", setting.root.pem, second.pem);
    setting
        .mood
        .send_replace(Mood::Says(vec![leaf.chain_pem, both]));
    let issued = issuer.issue(&id("web")).await.unwrap();
    let roots: [CertificateDer<'_>; 2] = [setting.root.der.clone(), second.der.clone()];
    assert_eq!(issued.roots, roots);
    assert_eq!(issued.chain, leaf.chain);
}

#[tokio::test]
async fn nobody_listens() {
    let setting = Setting::start();
    let mut ca = setting.ca();
    let free = std::net::TcpListener::bind((LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    ca.url = format!("https://{free}");
    let why = refusal(&Grpc::new(ca).unwrap(), &id("web")).await;
    let text = format!("{why:?}").to_lowercase();
    assert!(text.contains("refused"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_new_root_in_the_bundle_is_a_reason_to_ask_again() {
    let dir = tempfile::tempdir().unwrap();
    let hand = Hand::new();
    let first = Root::new(hand.now());
    let bundle = dir.path().join("bundle");
    std::fs::write(&bundle, &first.pem).unwrap();
    let ca = GrpcCa {
        url: "https://127.0.0.1:1".to_owned(),
        token: None,
        bundle: bundle.clone(),
        cluster: String::new(),
    };
    let issuer = Grpc::new(ca).unwrap();
    let seen = issuer.seen().await;
    let minute = Duration::from_secs(60);
    let web = id("web");
    let same = tokio::time::timeout(minute, issuer.changed(&web, seen)).await;
    assert!(same.is_err(), "nothing changed");
    std::fs::write(&bundle, "half").unwrap();
    let half = tokio::time::timeout(minute, issuer.changed(&web, seen)).await;
    assert!(half.is_err(), "no bundle");
    std::fs::write(&bundle, Root::new(hand.now()).pem).unwrap();
    tokio::time::timeout(minute, issuer.changed(&web, seen))
        .await
        .unwrap();
}
