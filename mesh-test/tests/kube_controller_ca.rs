// SPDX-License-Identifier: Apache-2.0
//! The controller as CA: by the letter of Istio's API, asked by openssl and curl, and by agents; and
//! who gets nothing.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_test::kube::Bound;
use mesh_test::kube::controller::{Controller, NAMESPACE, SERVICE};
use mesh_test::mesh::ENROLLED;
use mesh_test::reports::Tcp;
use mesh_test::{AgentConfig, Cmd, Kube, Lab, PodSpec, Topology, eventually};

const SOON: Duration = Duration::from_secs(30);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const AUDIENCE: Option<&str> = Some("mesh-ca");
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// What a request asks for.
struct Asked<'a> {
    token: &'a str,
    csr: &'a str,
    /// `ImpersonatedIdentity`.
    whose: Option<&'a str>,
}

/// A request for shop/web.
fn web<'a>(token: &'a str, csr: &'a str) -> Asked<'a> {
    Asked {
        token,
        csr,
        whose: Some(WEB),
    }
}

/// A length-delimited field of protobuf.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut all = vec![number << 3 | 2];
    let mut length = bytes.len();
    let low = |length: usize| u8::try_from(length & 0x7f).expect("seven bits");
    while length >= 0x80 {
        all.push(low(length) | 0x80);
        length >>= 7;
    }
    all.push(low(length));
    all.extend(bytes);
    all
}

/// The fields of a message with the number 1, which must be all.
fn first_fields(mut message: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    while let Some((tag, mut rest)) = message.split_first() {
        assert_eq!(*tag, 0x0a, "a field of the answer that is not cert_chain");
        let (mut length, mut shift) = (0_usize, 0);
        loop {
            let (byte, after) = rest.split_first().expect("a length");
            length |= usize::from(byte & 0x7f) << shift;
            (shift, rest) = (shift + 7, after);
            if byte & 0x80 == 0 {
                break;
            }
        }
        let (text, after) = rest.split_at(length);
        found.push(String::from_utf8(text.to_vec()).expect("text"));
        message = after;
    }
    found
}

/// `IstioCertificateRequest`: csr = 1, validity_duration = 3, metadata = 4, a `Struct` whose map
/// `fields` = 1 has values with `string_value` = 3.
fn message(asked: &Asked<'_>) -> Vec<u8> {
    let mut message = field(1, asked.csr.as_bytes());
    message.extend([3 << 3, 0x90, 0x1c]);
    if let Some(whose) = asked.whose {
        let value = field(3, whose.as_bytes());
        let entry = [field(1, b"ImpersonatedIdentity"), field(2, &value)].concat();
        message.extend(field(4, &field(1, &entry)));
    }
    let mut framed = vec![0];
    framed.extend(u32::try_from(message.len()).expect("short").to_be_bytes());
    framed.extend(message);
    framed
}

struct Rig {
    kube: Kube,
    controller: Controller,
    dir: PathBuf,
}

impl Rig {
    /// Nodes n1 and n2 with an agent's pod each; pods of shop/web on n1 and shop/db on n2.
    fn start() -> Self {
        let kube = Kube::builder().start().expect("servers");
        kube.prepare_controller().expect("CRDs and roles");
        kube.namespace("shop", &[]).expect("namespace");
        for (node, account) in [("n1", "web"), ("n2", "db")] {
            kube.apply_text(&format!(
                "{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}"
            ))
            .expect("node");
            kube.service_account("shop", account).expect("account");
            pod(
                &kube,
                (NAMESPACE, &format!("agent-{node}")),
                node,
                "mesh-agent",
            );
            pod(&kube, ("shop", account), node, account);
        }
        let controller = kube.controller("a", HERE, &[]).expect("controller");
        let dir = kube.place().dir().join("requests");
        fs::create_dir_all(&dir).expect("directory");
        Self {
            kube,
            controller,
            dir,
        }
    }

    fn token(&self, audience: Option<&str>, bound: Option<Bound<'_>>) -> String {
        self.kube
            .token((NAMESPACE, "mesh-agent"), audience, bound)
            .expect("token")
    }

    fn run(&self, cmd: Cmd) -> String {
        self.kube
            .place()
            .run(cmd, SOON)
            .expect("run")
            .ok()
            .expect("done")
            .text()
    }

    /// A request by openssl, with a key of its own.
    fn csr(&self, algorithm: &[&str], more: &[&str]) -> String {
        let key = self.dir.join("key.pem");
        let make = Cmd::new("openssl").args(["req", "-new", "-nodes", "-batch", "-keyout"]);
        let make = make
            .args([key.as_os_str()])
            .args(["-newkey"])
            .args(algorithm)
            .args(more);
        self.run(make.args(["-subj", "/CN=somebody"]))
    }

    fn p256(&self) -> String {
        self.csr(&["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], &[])
    }

    /// Asks by curl; the chain, or gRPC's status and message.
    fn ask(&self, asked: &Asked<'_>) -> Result<Vec<String>, String> {
        let bundle = self.kube.ca_bundle().expect("roots");
        let file = |name: &str| self.dir.join(name).to_str().expect("text").to_owned();
        fs::write(file("request"), message(asked)).expect("write");
        fs::write(file("answer"), "").expect("write");
        let port = self.controller.listen().port();
        let url = format!(
            "https://{SERVICE}:{port}/istio.v1.auth.IstioCertificateService/CreateCertificate"
        );
        let curl = Cmd::new("curl")
            .args(["-sS", "--http2", "--max-time", "20"])
            .args(["--cacert", bundle.to_str().expect("text")])
            .args(["--resolve", &format!("{SERVICE}:{port}:127.0.0.1")])
            .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
            .args(["-H", &format!("authorization: Bearer {}", asked.token)])
            .args(["--data-binary", &format!("@{}", file("request"))])
            .args(["-o", &file("answer"), "-D", "-", &url]);
        let output = self.kube.place().run(curl, SOON).expect("run");
        let head = match output.ok() {
            Ok(done) => done.text(),
            Err(error) => return Err(format!("{error:#}")),
        };
        let value = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
                .unwrap_or_default()
        };
        if value("grpc-status:") != "0" {
            return Err(format!(
                "{} {}",
                value("grpc-status:"),
                value("grpc-message:")
            ));
        }
        let answer = fs::read(file("answer")).expect("answer");
        let (frame, body) = answer.split_at(5);
        assert_eq!(frame[0], 0, "not compressed");
        Ok(first_fields(body))
    }

    fn refused(&self, asked: &Asked<'_>, code: u8, reason: &str) {
        let count = || {
            let labels = [("result", reason)];
            let metric = self
                .controller
                .metric(&self.kube, "mesh_ca_requests_total", &labels);
            metric.expect("metric")
        };
        let before = count();
        let why = self.ask(asked).expect_err(reason);
        assert!(
            why.starts_with(&format!("{code} {reason}")),
            "{reason}: {why}"
        );
        assert!(count() - before > 0.5, "{reason} is counted");
    }
}

fn pod(kube: &Kube, (namespace, name): (&str, &str), node: &str, account: &str) {
    let pod = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {namespace}}}, spec: \
         {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: c, image: none}}]}}}}"
    );
    kube.apply_text(&pod).expect("pod");
}

#[test]
fn openssls_requests_are_served_by_the_letter_and_only_to_the_pods_own_node() {
    let rig = Rig::start();
    let n1 = rig.token(AUDIENCE, Some(Bound::Pod("agent-n1")));
    let good = rig.csr(
        &["ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
        &[
            "-addext",
            "subjectAltName=URI:spiffe://cluster.local/ns/shop/sa/db,DNS:evil.test",
        ],
    );
    let chain = rig.ask(&web(&n1, &good)).expect("issued");
    assert_eq!(chain.len(), 3, "leaf, intermediate, root");
    let names = ["leaf", "intermediate", "root"];
    for (name, pem) in names.iter().zip(&chain) {
        fs::write(rig.dir.join(name), pem).expect("write");
    }
    let path = |name: &str| rig.dir.join(name).to_str().expect("text").to_owned();
    let verified = rig.run(Cmd::new("openssl").args([
        "verify",
        "-CAfile",
        &path("root"),
        "-untrusted",
        &path("intermediate"),
        &path("leaf"),
    ]));
    assert!(verified.contains(": OK"), "{verified}");
    let shown = rig.run(Cmd::new("openssl").args([
        "x509",
        "-in",
        &path("leaf"),
        "-noout",
        "-subject",
        "-ext",
        "subjectAltName,keyUsage,extendedKeyUsage",
        "-checkend",
        "3000",
    ]));
    // Its names are not those of the request.
    assert!(
        shown.contains(WEB) && !shown.contains("evil") && !shown.contains("sa/db"),
        "{shown}"
    );
    assert_eq!(shown.matches("URI:").count(), 1, "{shown}");
    assert!(!shown.contains("somebody"), "{shown}");
    let hour = rig.kube.place().run(
        Cmd::new("openssl").args(["x509", "-in", &path("leaf"), "-noout", "-checkend", "3700"]),
        SOON,
    );
    assert!(
        !hour.expect("run").status.success(),
        "it lasts as long as was asked for"
    );
    let rsa = rig.csr(&["rsa:2048"], &[]);
    assert_eq!(rig.ask(&web(&n1, &rsa)).map(|chain| chain.len()), Ok(3));

    rig.refused(&web(&n1, &good), 6, "replayed");
    not_issued_to(&rig, &n1);
    nor_for(&rig, &n1);
    // All of which did not hurt.
    assert!(rig.ask(&web(&n1, &rig.p256())).is_ok());
}

/// Those who ask, and may not.
fn not_issued_to(rig: &Rig, n1: &str) {
    let csr = rig.p256();
    let of = |token, whose| Asked {
        token,
        csr: &csr,
        whose: Some(whose),
    };
    rig.refused(&of("", WEB), 16, "unauthenticated");
    rig.refused(&of("garbage", WEB), 16, "unauthenticated");
    let forged = format!("{}x", n1.rsplit_once('.').expect("a JWT").0);
    rig.refused(&of(&forged, WEB), 16, "unauthenticated");
    let wrong = rig.token(Some("somebody-else"), Some(Bound::Pod("agent-n1")));
    rig.refused(&of(&wrong, WEB), 16, "wrong_audience");
    let api = rig.token(None, Some(Bound::Pod("agent-n1")));
    rig.refused(&of(&api, WEB), 16, "wrong_audience");
    let unbound = rig.token(AUDIENCE, None);
    rig.refused(&of(&unbound, WEB), 7, "not_bound");
    let pod = rig
        .kube
        .token(("shop", "web"), AUDIENCE, Some(Bound::Pod("web")))
        .expect("token");
    rig.refused(&of(&pod, WEB), 7, "not_an_agent");
    // A stolen token is good for its own node's pods only.
    let n2 = rig.token(AUDIENCE, Some(Bound::Pod("agent-n2")));
    rig.refused(&of(&n2, WEB), 7, "not_on_node");
    rig.refused(
        &of(n1, "spiffe://cluster.local/ns/shop/sa/db"),
        7,
        "not_on_node",
    );
    rig.refused(
        &of(n1, "spiffe://cluster.local/ns/shop/sa/nobody"),
        7,
        "not_on_node",
    );
    rig.refused(
        &of(n1, "spiffe://other.test/ns/shop/sa/web"),
        7,
        "foreign_identity",
    );
    rig.refused(&of(n1, "spiffe://cluster.local/shop/web"), 3, "no_identity");
    rig.refused(
        &Asked {
            token: n1,
            csr: &csr,
            whose: None,
        },
        3,
        "no_identity",
    );
    rig.kube
        .kubectl([
            "delete",
            "pod",
            "agent-n2",
            "-n",
            NAMESPACE,
            "--force",
            "--grace-period=0",
        ])
        .expect("delete");
    // The API server remembers for some seconds that a token was good.
    eventually("the token to die with its pod", SOON, || {
        let csr = rig.p256();
        let whose = Some("spiffe://cluster.local/ns/shop/sa/db");
        let asked = Asked {
            token: &n2,
            csr: &csr,
            whose,
        };
        rig.ask(&asked).err()
    })
    .map(|why| assert!(why.starts_with("16 unauthenticated"), "{why}"))
    .expect("refused");
}

/// What is asked, and is no request.
fn nor_for(rig: &Rig, n1: &str) {
    rig.refused(&web(n1, ""), 3, "malformed");
    rig.refused(&web(n1, &rig.p256().repeat(2)), 3, "malformed");
    rig.refused(
        &web(
            n1,
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        ),
        3,
        "malformed",
    );
    let csr = rig.p256();
    // A signature that is not the key's: the last characters of the body are its.
    let end = csr.find("\n-----END").expect("PEM");
    let mut broken = csr.clone().into_bytes();
    for byte in &mut broken[end - 12..end - 8] {
        *byte = if *byte == b'A' { b'B' } else { b'A' };
    }
    let broken = String::from_utf8(broken).expect("text");
    rig.refused(&web(n1, &broken), 3, "malformed");
    rig.refused(&web(n1, &rig.csr(&["rsa:1024"], &[])), 3, "weak_key");
    rig.refused(&web(n1, &rig.csr(&["ed25519"], &[])), 3, "weak_key");
    rig.refused(&web(n1, &csr.repeat(40)), 3, "oversized");
    // Beyond what a message may be nothing is even read.
    let huge = rig.ask(&web(n1, &"A".repeat(100_000)));
    assert!(huge.is_err(), "{huge:?}");
}

/// A pod that the API server knows, where the lab has it.
fn known(kube: &Kube, lab: &Lab) {
    for node in lab.nodes() {
        let name = node.name();
        kube.apply_text(&format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"
        ))
        .expect("node");
        pod(
            kube,
            (NAMESPACE, &format!("agent-{name}")),
            name,
            "mesh-agent",
        );
    }
    for one in lab.pods() {
        kube.service_account("default", one.name())
            .expect("account");
        pod(kube, ("default", one.name()), one.node().name(), one.name());
    }
}

fn tokens(kube: &Kube, dir: &Path, lab: &Lab) {
    for node in lab.nodes() {
        let agent = format!("agent-{}", node.name());
        let token = kube
            .token(
                (NAMESPACE, "mesh-agent"),
                AUDIENCE,
                Some(Bound::Pod(&agent)),
            )
            .expect("token");
        fs::write(dir.join(node.name()), token).expect("write");
    }
}

#[test]
fn agents_get_their_certificates_and_a_new_root_costs_no_connection() {
    let builder = Lab::builder(Topology::Routed).namespace("default", &[ENROLLED]);
    let lab = builder
        .pod(PodSpec::new("a", 1))
        .pod(PodSpec::new("b", 2))
        .build()
        .expect("lab");
    let kube = Kube::builder().start_in(&lab).expect("servers");
    kube.prepare_controller().expect("CRDs and roles");
    kube.namespace("default", &[]).expect("namespace");
    known(&kube, &lab);
    let flags = [
        "--lease",
        "3s",
        "--certificate-life",
        "60s",
        "--root-overlap",
        "15s",
    ];
    let controller = kube
        .controller("a", IpAddr::V4(Lab::gateway()), &flags)
        .expect("controller");
    let files = kube.place().dir().to_owned();
    tokens(&kube, &files, &lab);
    let bundle = kube.ca_bundle().expect("roots");

    // What the kubelet does for an agent: its own token, and the roots as a file that changes.
    let agents: Vec<_> = lab
        .nodes()
        .iter()
        .map(|node| {
            let config = AgentConfig::new(&format!("grpc:{}", controller.url()))
                .flag("--ca-token", files.join(node.name()))
                .flag("--ca-bundle", bundle.as_os_str());
            node.start_agent(config).expect("agent")
        })
        .collect();
    let issued = || {
        let labels = [("result", "issued")];
        let metric = controller.metric(&kube, "mesh_ca_requests_total", &labels);
        metric.expect("metric")
    };
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let server = b.serve("--tcp [::]:7000").expect("server");
    let talk = || {
        let to = std::net::SocketAddr::new(b.addresses()[0], 7000);
        let output = a
            .probe(&format!("tcp --to {to} --timeout-ms 3000"))
            .expect("run");
        let seen: Tcp = output.json().expect("report");
        seen.ok && seen.ends_agree()
    };
    eventually(
        "a connection under the controller's certificates",
        SOON,
        || talk().then_some(()),
    )
    .expect("talk");
    assert!(issued() > 1.5);

    rotated_without_a_loss(&kube, &controller, &talk);
    drop((server, agents));
}

/// Asks for a new root, and connects until the old one is gone.
fn rotated_without_a_loss(kube: &Kube, controller: &Controller, talk: &dyn Fn() -> bool) {
    let roots = || {
        controller
            .metric(kube, "mesh_ca_roots", &[])
            .expect("metric")
    };
    let rotate = Cmd::new(mesh_test::programs::agent().expect("agent"))
        .args(["rotate-root", "--replica", "cli", "--kubeconfig"])
        .args([kube.kubeconfig()]);
    let said = kube
        .place()
        .run(rotate, SOON)
        .expect("run")
        .ok()
        .expect("asked");
    assert!(said.to_string().contains("asked for a new root"), "{said}");
    let (mut most, mut failed, mut count) = (0.0_f64, 0, 0);
    let begun = Instant::now();
    // Published, switched, and the old one dropped: the overlap, then a leaf's life and the overlap again.
    while begun.elapsed() < Duration::from_secs(150) {
        failed += u32::from(!talk());
        count += 1;
        most = most.max(roots());
        // The kubelet brings a changed ConfigMap.
        kube.ca_bundle().expect("roots");
        if most > 1.5 && roots() < 1.5 {
            break;
        }
    }
    assert!(
        most > 1.5 && roots() < 1.5,
        "{most} roots, then {}",
        roots()
    );
    assert_eq!(failed, 0, "of {count} connections");
}
