// SPDX-License-Identifier: Apache-2.0
//! Tokens that expire. The API server issues none for less than ten minutes, so the test signs them with
//! the API server's key.

use std::fs;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use mesh_test::kube::Bound;
use rcgen::{KeyPair, SigningKey as _};
use serde_json::Value;

use super::clock;
use super::fixture::{AUDIENCE, CaFixture, web};

/// Both numbers of a signature one after the other, 32 bytes each (RFC 7518, section 3.4), from
/// their DER.
fn plain(der: &[u8]) -> Vec<u8> {
    let mut numbers = Vec::new();
    let mut rest = &der[2..];
    for _ in 0..2 {
        let (number, after) = rest[2..].split_at(rest[1].into());
        let number = &number[number.len().saturating_sub(32)..];
        numbers.extend(vec![0; 32 - number.len()]);
        numbers.extend(number);
        rest = after;
    }
    numbers
}

/// The same token, but valid from two hours ago to `seconds` from now.
fn until(fixture: &CaFixture, token: &str, seconds: i64) -> String {
    let mut parts = token.split('.');
    let (head, claims) = (parts.next().expect("head"), parts.next().expect("claims"));
    let mut claims: Value =
        serde_json::from_slice(&BASE64.decode(claims).expect("base64")).expect("claims");
    let now = Duration::from_secs_f64(clock()).as_secs();
    for (claim, after) in [("iat", -7200), ("nbf", -7200), ("exp", seconds)] {
        assert!(claims[claim].is_number(), "{claims}");
        claims[claim] = Value::from(now.saturating_add_signed(after));
    }
    let text = format!("{head}.{}", BASE64.encode(claims.to_string()));
    let key = fixture.kube.host().dir().join("pki/sa.key");
    let key = KeyPair::from_pem(&fs::read_to_string(key).expect("key")).expect("key");
    let signature = key.sign(text.as_bytes()).expect("signed");
    format!("{text}.{}", BASE64.encode(plain(&signature)))
}

/// Returns the API server's own review of a token.
fn reviewed(fixture: &CaFixture, token: &str) -> Value {
    let review = serde_json::json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": { "token": token, "audiences": [AUDIENCE] },
    });
    let file = fixture.dir.join("review.json");
    fs::write(&file, review.to_string()).expect("write");
    let path = "/apis/authentication.k8s.io/v1/tokenreviews";
    let said = fixture
        .kube
        .kubectl(["create", "--raw", path, "-f", file.to_str().expect("text")])
        .expect("review");
    serde_json::from_str::<Value>(&said).expect("JSON")["status"].take()
}

#[test]
fn expired_token_is_refused_and_counted() {
    let fixture = CaFixture::start();
    let token = fixture.token(AUDIENCE, Some(Bound::Pod("agent-n1")));
    let (good, over) = (until(&fixture, &token, 600), until(&fixture, &token, -120));
    // The control: but for its end it is as good as any.
    assert_eq!(reviewed(&fixture, &good)["authenticated"], true);
    fixture.ask(&web(&good, &fixture.p256())).expect("issued");
    let review = reviewed(&fixture, &over);
    assert!(
        review["error"]
            .as_str()
            .is_some_and(|why| why.contains("expired")),
        "{review}"
    );
    fixture.refused(&web(&over, &fixture.p256()), 16, "unauthenticated");
}
