// SPDX-License-Identifier: Apache-2.0
//! Requests by openssl and curl: what is issued, and who gets nothing.

use std::fs;
use std::time::{Duration, Instant};

use mesh_test::kube::Bound;
use mesh_test::kube::controller::NAMESPACE;
use mesh_test::{Cmd, eventually};

use super::fixture::{AUDIENCE, Asked, CaFixture, SOON, WEB, web};

#[test]
fn certificate_is_issued_only_to_agent_of_the_pods_node() {
    let fixture = CaFixture::start();
    let n1 = fixture.token(AUDIENCE, Some(Bound::Pod("agent-n1")));
    let good = fixture.csr(
        &["ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
        &[
            "-addext",
            "subjectAltName=URI:spiffe://cluster.local/ns/shop/sa/db,DNS:evil.test",
        ],
    );
    let chain = fixture.ask(&web(&n1, &good)).expect("issued");
    assert_eq!(chain.len(), 3, "leaf, intermediate, root");
    let names = ["leaf", "intermediate", "root"];
    for (name, pem) in names.iter().zip(&chain) {
        fs::write(fixture.dir.join(name), pem).expect("write");
    }
    let path = |name: &str| fixture.dir.join(name).to_str().expect("text").to_owned();
    let verified = fixture.run(Cmd::new("openssl").args([
        "verify",
        "-CAfile",
        &path("root"),
        "-untrusted",
        &path("intermediate"),
        &path("leaf"),
    ]));
    assert!(verified.contains(": OK"), "{verified}");
    let shown = fixture.run(Cmd::new("openssl").args([
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
    let hour = fixture.kube.host().run(
        Cmd::new("openssl").args(["x509", "-in", &path("leaf"), "-noout", "-checkend", "3700"]),
        SOON,
    );
    assert!(
        !hour.expect("run").status.success(),
        "it lasts as long as was asked for"
    );
    let rsa = fixture.csr(&["rsa:2048"], &[]);
    assert_eq!(fixture.ask(&web(&n1, &rsa)).map(|chain| chain.len()), Ok(3));

    fixture.refused(&web(&n1, &good), 6, "replayed");
    not_issued_to(&fixture, &n1);
    nor_for(&fixture, &n1);
    // All of which did not hurt.
    assert!(fixture.ask(&web(&n1, &fixture.p256())).is_ok());
}

/// Those who ask, and may not.
fn not_issued_to(fixture: &CaFixture, n1: &str) {
    let csr = fixture.p256();
    let of = |token, whose| Asked {
        token,
        csr: &csr,
        whose: Some(whose),
        seconds: 3600,
    };
    fixture.refused(&of("", WEB), 16, "unauthenticated");
    fixture.refused(&of("garbage", WEB), 16, "unauthenticated");
    let forged = format!("{}x", n1.rsplit_once('.').expect("a JWT").0);
    fixture.refused(&of(&forged, WEB), 16, "unauthenticated");
    let wrong = fixture.token(Some("somebody-else"), Some(Bound::Pod("agent-n1")));
    fixture.refused(&of(&wrong, WEB), 16, "wrong_audience");
    let api = fixture.token(None, Some(Bound::Pod("agent-n1")));
    fixture.refused(&of(&api, WEB), 16, "wrong_audience");
    let unbound = fixture.token(AUDIENCE, None);
    fixture.refused(&of(&unbound, WEB), 7, "not_bound");
    let pod = fixture
        .kube
        .token(("shop", "web"), AUDIENCE, Some(Bound::Pod("web")))
        .expect("token");
    fixture.refused(&of(&pod, WEB), 7, "not_an_agent");
    // A stolen token is good for its own node's pods only.
    let n2 = fixture.token(AUDIENCE, Some(Bound::Pod("agent-n2")));
    fixture.refused(&of(&n2, WEB), 7, "not_on_node");
    fixture.refused(
        &of(n1, "spiffe://cluster.local/ns/shop/sa/db"),
        7,
        "not_on_node",
    );
    fixture.refused(
        &of(n1, "spiffe://cluster.local/ns/shop/sa/nobody"),
        7,
        "not_on_node",
    );
    fixture.refused(
        &of(n1, "spiffe://other.test/ns/shop/sa/web"),
        7,
        "foreign_identity",
    );
    fixture.refused(&of(n1, "spiffe://cluster.local/shop/web"), 3, "no_identity");
    fixture.refused(
        &Asked {
            token: n1,
            csr: &csr,
            whose: None,
            seconds: 3600,
        },
        3,
        "no_identity",
    );
    fixture
        .kube
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
        let csr = fixture.p256();
        let whose = Some("spiffe://cluster.local/ns/shop/sa/db");
        let asked = Asked {
            token: &n2,
            csr: &csr,
            whose,
            seconds: 3600,
        };
        fixture.ask(&asked).err()
    })
    .map(|why| assert!(why.starts_with("16 unauthenticated"), "{why}"))
    .expect("refused");
}

/// Checks that the CA refuses bodies that are no valid certificate requests.
fn nor_for(fixture: &CaFixture, n1: &str) {
    fixture.refused(&web(n1, ""), 3, "malformed");
    fixture.refused(&web(n1, &fixture.p256().repeat(2)), 3, "malformed");
    fixture.refused(
        &web(
            n1,
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        ),
        3,
        "malformed",
    );
    let csr = fixture.p256();
    // A signature that is not the key's: the last characters of the body are its.
    let end = csr.find("\n-----END").expect("PEM");
    let mut broken = csr.clone().into_bytes();
    for byte in &mut broken[end - 12..end - 8] {
        *byte = if *byte == b'A' { b'B' } else { b'A' };
    }
    let broken = String::from_utf8(broken).expect("text");
    fixture.refused(&web(n1, &broken), 3, "malformed");
    fixture.refused(&web(n1, &fixture.csr(&["rsa:1024"], &[])), 3, "weak_key");
    fixture.refused(&web(n1, &fixture.csr(&["ed25519"], &[])), 3, "weak_key");
    // Curves that not every peer can verify: another of 256 bits, and one that is larger.
    for (curve, why) in [("secp256k1", "malformed"), ("secp521r1", "weak_key")] {
        let curve = format!("ec_paramgen_curve:{curve}");
        let csr = fixture.csr(&["ec", "-pkeyopt", &curve], &[]);
        fixture.refused(&web(n1, &csr), 3, why);
    }
    // A byte behind the request's end, inside its PEM.
    fixture.refused(&web(n1, &with_a_byte_more(fixture)), 3, "malformed");
    fixture.refused(&web(n1, &csr.repeat(40)), 3, "oversized");
    // Beyond what a message may be nothing is even read.
    let huge = fixture.ask(&web(n1, &"A".repeat(100_000)));
    assert!(huge.is_err(), "{huge:?}");
}

/// A good request whose DER goes on behind its end.
fn with_a_byte_more(fixture: &CaFixture) -> String {
    let good = fixture.dir.join("good.pem");
    fs::write(&good, fixture.p256()).expect("write");
    let script = format!(
        "(openssl req -in {} -outform DER; printf x) | openssl base64",
        good.display()
    );
    let body = fixture.run(Cmd::shell(&script));
    let name = "CERTIFICATE REQUEST";
    format!("-----BEGIN {name}-----\n{body}-----END {name}-----\n")
}

/// The CA takes nothing but the key from a request.
#[test]
fn csr_names_usages_and_lifetime_are_ignored() {
    let fixture = CaFixture::start();
    let n1 = fixture.token(AUDIENCE, Some(Bound::Pod("agent-n1")));
    let uris = "URI:spiffe://cluster.local/ns/shop/sa/web,URI:spiffe://cluster.local/ns/shop/sa/db,\
                IP:10.0.0.1,email:a@evil.test";
    let csr = fixture.csr(
        &["ec", "-pkeyopt", "ec_paramgen_curve:P-384"],
        &[
            "-addext",
            &format!("subjectAltName={uris}"),
            "-addext",
            "basicConstraints=critical,CA:true",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
            "-addext",
            "extendedKeyUsage=codeSigning",
        ],
    );
    let asked = Asked {
        // Ten years.
        seconds: 315_360_000,
        ..web(&n1, &csr)
    };
    let chain = fixture.ask(&asked).expect("issued");
    let leaf = fixture.dir.join("leaf");
    fs::write(&leaf, &chain[0]).expect("write");
    let shown = fixture.run(
        Cmd::new("openssl")
            .args(["x509", "-noout", "-text", "-in"])
            .args([leaf.as_os_str()]),
    );
    for line in [
        "CA:TRUE",
        "Certificate Sign",
        "CRL Sign",
        "Code Signing",
        "evil",
        "sa/db",
        "10.0.0.1",
        "somebody",
    ] {
        assert!(!shown.contains(line), "{line}: {shown}");
    }
    assert_eq!(shown.matches("URI:").count(), 1, "{shown}");
    assert!(shown.contains("Digital Signature"), "{shown}");
    // The longest life is a day, whatever is asked for.
    for (seconds, lives) in [(23 * 3600, true), (24 * 3600 + 60, false)] {
        let check =
            Cmd::new("openssl").args(["x509", "-noout", "-checkend", &seconds.to_string(), "-in"]);
        let checked = fixture
            .kube
            .host()
            .run(check.args([leaf.as_os_str()]), SOON);
        assert_eq!(checked.expect("run").status.success(), lives, "{seconds}");
    }
}

/// Who asks too often from one address waits, before anybody is asked about its token; others do
/// not.
#[test]
fn rate_limit_is_per_caller() {
    let fixture = CaFixture::start();
    let n1 = fixture.token(AUDIENCE, Some(Bound::Pod("agent-n1")));
    let csr = fixture.p256();
    // By one curl, over one connection: faster than what follows a burst.
    let many = fixture
        .curl(&web("garbage", &csr), "?[1-600]")
        .args(["-o", "/dev/null"]);
    let heads = fixture.run(many);
    let of = |status: &str| {
        let line = format!("grpc-status: {status}");
        heads.lines().filter(|head| head.trim() == line).count()
    };
    let (judged, held_off) = (of("16"), of("8"));
    assert_eq!(judged + held_off, 600, "{heads}");
    // A burst of 256, and 16 a second for as long as that took.
    assert!((256..500).contains(&judged), "{judged} were judged");
    let labels = [("result", "rate_limited")];
    let counted = fixture
        .controller
        .metric(&fixture.kube, "mesh_ca_requests_total", &labels);
    assert_eq!(counted.expect("metric").to_string(), held_off.to_string());
    // The control: from another address the same moment, with a good token.
    let other =
        fixture
            .curl(&web(&n1, &csr), "")
            .args(["--interface", "127.0.0.2", "-o", "/dev/null"]);
    let head = fixture.run(other);
    assert!(head.contains("grpc-status: 0"), "{head}");
    // And from the first one, a moment later.
    eventually("the first to be served again", SOON, || {
        fixture.ask(&web(&n1, &fixture.p256())).ok()
    })
    .expect("served");
}

/// A client that completes the TLS handshake and presents no token does not keep its connection.
#[test]
fn client_without_a_token_is_disconnected() {
    let fixture = CaFixture::start();
    let at = fixture.controller.listen().to_string();
    let client = Cmd::new("timeout").args(["30", "openssl", "s_client", "-quiet", "-ign_eof"]);
    let client = client.args(["-alpn", "h2", "-connect", &at]);
    let begun = Instant::now();
    let output = fixture.kube.host().run(client, SOON * 2).expect("run");
    let (status, took) = (output.status.code(), begun.elapsed());
    assert_ne!(status, Some(124), "still connected after 30 s");
    let stayed = Duration::from_secs(4)..Duration::from_secs(20);
    assert!(stayed.contains(&took), "connected for {took:?}");
}
