// SPDX-License-Identifier: Apache-2.0
//! A controller, and requests to it without code of the mesh.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_test::kube::Bound;
use mesh_test::kube::controller::{Controller, NAMESPACE, SERVICE};
use mesh_test::{Cmd, Kube};

pub(crate) const SOON: Duration = Duration::from_secs(30);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub(crate) const AUDIENCE: Option<&str> = Some("mesh-ca");
pub(crate) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// The content of a certificate request.
pub(crate) struct Asked<'a> {
    pub(crate) token: &'a str,
    pub(crate) csr: &'a str,
    /// `ImpersonatedIdentity`.
    pub(crate) whose: Option<&'a str>,
    /// For how many seconds.
    pub(crate) seconds: u32,
}

/// A request for shop/web.
pub(crate) fn web<'a>(token: &'a str, csr: &'a str) -> Asked<'a> {
    Asked {
        token,
        csr,
        whose: Some(WEB),
        seconds: 3600,
    }
}

/// A length-delimited field of protobuf.
pub(crate) fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
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
pub(crate) fn first_fields(mut message: &[u8]) -> Vec<String> {
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
pub(crate) fn message(asked: &Asked<'_>) -> Vec<u8> {
    let mut message = field(1, asked.csr.as_bytes());
    message.push(3 << 3);
    let mut seconds = asked.seconds;
    while seconds >= 0x80 {
        message.push(u8::try_from(seconds & 0x7f).expect("seven bits") | 0x80);
        seconds >>= 7;
    }
    message.push(u8::try_from(seconds).expect("seven bits"));
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

pub(crate) struct CaFixture {
    pub(crate) kube: Kube,
    pub(crate) controller: Controller,
    pub(crate) dir: PathBuf,
}

impl CaFixture {
    /// Nodes n1 and n2 with an agent's pod each; pods of shop/web on n1 and shop/db on n2.
    pub(crate) fn start() -> Self {
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
        let dir = kube.host().dir().join("requests");
        fs::create_dir_all(&dir).expect("directory");
        Self {
            kube,
            controller,
            dir,
        }
    }

    pub(crate) fn token(&self, audience: Option<&str>, bound: Option<Bound<'_>>) -> String {
        self.kube
            .token((NAMESPACE, "mesh-agent"), audience, bound)
            .expect("token")
    }

    pub(crate) fn run(&self, cmd: Cmd) -> String {
        self.kube
            .host()
            .run(cmd, SOON)
            .expect("run")
            .ok()
            .expect("done")
            .text()
    }

    /// A request by openssl, with a key of its own.
    pub(crate) fn csr(&self, algorithm: &[&str], more: &[&str]) -> String {
        let key = self.dir.join("key.pem");
        let make = Cmd::new("openssl").args(["req", "-new", "-nodes", "-batch", "-keyout"]);
        let make = make
            .args([key.as_os_str()])
            .args(["-newkey"])
            .args(algorithm)
            .args(more);
        self.run(make.args(["-subj", "/CN=somebody"]))
    }

    pub(crate) fn p256(&self) -> String {
        self.csr(&["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], &[])
    }

    /// A request by curl, which shows the header of the answer; `more` is what follows the path.
    pub(crate) fn curl(&self, asked: &Asked<'_>, more: &str) -> Cmd {
        let bundle = self.kube.ca_bundle().expect("roots");
        let request = self.dir.join("request").to_str().expect("text").to_owned();
        fs::write(&request, message(asked)).expect("write");
        let port = self.controller.listen().port();
        let url = format!(
            "https://{SERVICE}:{port}/istio.v1.auth.IstioCertificateService/CreateCertificate{more}"
        );
        Cmd::new("curl")
            .args(["-sS", "--http2", "--max-time", "20"])
            .args(["--cacert", bundle.to_str().expect("text")])
            .args(["--resolve", &format!("{SERVICE}:{port}:127.0.0.1")])
            .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
            .args(["-H", &format!("authorization: Bearer {}", asked.token)])
            .args(["--data-binary", &format!("@{request}")])
            .args(["-D", "-", &url])
    }

    /// Asks by curl; the chain, or gRPC's status and message.
    pub(crate) fn ask(&self, asked: &Asked<'_>) -> Result<Vec<String>, String> {
        let file = |name: &str| self.dir.join(name).to_str().expect("text").to_owned();
        fs::write(file("answer"), "").expect("write");
        let curl = self.curl(asked, "").args(["-o", &file("answer")]);
        let output = self.kube.host().run(curl, SOON).expect("run");
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

    pub(crate) fn refused(&self, asked: &Asked<'_>, code: u8, reason: &str) {
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

pub(crate) fn pod(kube: &Kube, (namespace, name): (&str, &str), node: &str, account: &str) {
    let pod = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {namespace}}}, spec: \
         {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: c, image: none}}]}}}}"
    );
    kube.apply_text(&pod).expect("pod");
}
