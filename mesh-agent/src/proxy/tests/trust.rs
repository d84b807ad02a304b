// SPDX-License-Identifier: Apache-2.0
//! Certificates, roots and revocation lists that change while connections are open and being made.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mesh_identity::{Ca, Clock, SpiffeId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::super::*;
use super::rig::*;

const HOUR: Duration = Duration::from_secs(3600);
const NAMES: [&str; 3] = ["client-sa", "server-sa", "other-sa"];

fn id(name: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
        .parse()
        .unwrap()
}

/// A CA whose certificates are in files.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Writes new certificates of all identities, with these roots, to the files that the agent reads.
    fn issue(&self, dir: &Path, roots: &str) {
        for name in NAMES {
            self.issue_for(dir, roots, (name, HOUR));
        }
    }

    fn issue_for(&self, dir: &Path, roots: &str, (name, life): (&str, Duration)) {
        let key = KeyPair::generate().unwrap();
        let mut leaf = CertificateParams::default();
        let uri = id(name).to_string().try_into().unwrap();
        leaf.subject_alt_names = vec![SanType::URI(uri)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        leaf.not_before = OffsetDateTime::from(now() - Duration::from_secs(60));
        leaf.not_after = OffsetDateTime::from(now() + life);
        let leaf = leaf.signed_by(&key, &self.issuer).unwrap();
        let dir = dir.join("shop").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("tls.key"), key.serialize_pem()).unwrap();
        std::fs::write(dir.join("tls.crt"), leaf.pem()).unwrap();
        trust(&dir, roots);
    }

    /// A revocation list of these certificates.
    fn revoke(&self, rig: Option<&Rig>, names: &[&str]) -> String {
        let revoked_certs = names.iter().map(|name| {
            let certificate = rig.unwrap().identities.certificate(&id(name)).unwrap();
            let (_, leaf) = X509Certificate::from_der(certificate.leaf()).unwrap();
            RevokedCertParams {
                serial_number: SerialNumber::from_slice(leaf.raw_serial()),
                revocation_time: OffsetDateTime::UNIX_EPOCH,
                reason_code: None,
                invalidity_date: None,
            }
        });
        let params = CertificateRevocationListParams {
            this_update: OffsetDateTime::UNIX_EPOCH,
            next_update: OffsetDateTime::from(now() + Duration::from_secs(3600)),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

fn trust(dir: &Path, roots: &str) {
    std::fs::write(dir.join("ca.crt"), roots).unwrap();
}

/// Certificates of `ca`, and an empty revocation list.
async fn rig(ca: &Authority) -> (Rig, Route) {
    Rig::of(timing(), |config, dir| {
        ca.issue(dir, &ca.pem);
        std::fs::write(dir.join("crl.pem"), ca.revoke(None, &[])).unwrap();
        config.ca = Ca::Files(dir.to_owned());
        config.crls = vec![dir.join("crl.pem")];
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn revocation_closes_open_tunnels_on_either_node() {
    for revoked in ["client-sa", "server-sa"] {
        let ca = Authority::new();
        let (rig, route) = rig(&ca).await;
        let (mut client, mut server) = rig.pair(&route).await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        let path = rig.ca.path().join("crl.pem");
        let mut changes = rig.identities.subscribe();
        let before = changes.borrow_and_update().bundle().revision();
        std::fs::write(&path, ca.revoke(Some(&rig), &["other-sa"])).unwrap();
        let changed = changes.wait_for(|now| now.bundle().revision() != before);
        drop(changed.await.unwrap());
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();

        std::fs::write(&path, ca.revoke(Some(&rig), &[revoked])).unwrap();
        assert!(is_reset(&mut client).await, "{revoked}");
        assert!(is_reset(&mut server).await, "{revoked}");
        for node in [&rig.near, &rig.far] {
            assert_eq!(node.records(1).await[0]["close"], "identity_refused");
        }
        let mut client = rig.connect(&route).await;
        assert!(is_reset(&mut client).await);
        let (node, role) = match revoked {
            "client-sa" => (&rig.far, "server"),
            _ => (&rig.near, "client"),
        };
        let refused = format!("mesh_tls_handshakes_total{{role=\"{role}\",result=\"revoked\"}}");
        node.counted(&refused, 1).await;
    }
}

/// One connection that carries something both ways.
async fn exchange(rig: &Rig, route: &Route) {
    let (mut client, mut server) = rig.pair(route).await;
    client.write_all(b"question").await.unwrap();
    let mut question = [0; 8];
    server.read_exact(&mut question).await.unwrap();
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer");
}

/// Makes connections until told to stop; returns their number.
async fn load(rig: Arc<Rig>, route: Arc<Route>, stop: watch::Receiver<bool>) -> u32 {
    let mut made = 0;
    while !*stop.borrow() {
        exchange(&rig, &route).await;
        made += 1;
    }
    made
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn idle_tunnel_is_not_reused_after_the_peers_certificate_expires() {
    let ca = Authority::new();
    let ahead = Arc::new(AtomicU64::new(0));
    let (rig, route) = Rig::of(timing(), |config, dir| {
        ca.issue(dir, &ca.pem);
        ca.issue_for(dir, &ca.pem, ("server-sa", HOUR / 4));
        config.ca = Ca::Files(dir.to_owned());
        let ahead = Arc::clone(&ahead);
        config.clock = Clock::new(move || now() + Duration::from_secs(ahead.load(Relaxed)));
    })
    .await;
    let own = rig.identities.epoch(&id("client-sa"));
    exchange(&rig, &route).await;
    rig.near.records(1).await;
    exchange(&rig, &route).await;
    rig.near.records(2).await;
    assert_eq!(rig.net.dialled.load(Relaxed), 1);
    // The peer has another certificate by then: its own node would serve the tunnel on.
    let mut changes = rig.identities.subscribe();
    let before = rig.identities.epoch(&id("server-sa"));
    ca.issue_for(rig.ca.path(), &ca.pem, ("server-sa", HOUR));
    let changed = changes.wait_for(|now| now.epoch(&id("server-sa")) != before);
    drop(changed.await.unwrap());
    exchange(&rig, &route).await;
    rig.near.records(3).await;
    assert_eq!(rig.net.dialled.load(Relaxed), 1, "it is still proven");

    ahead.store((HOUR / 2).as_secs(), Relaxed);
    exchange(&rig, &route).await;
    rig.near.records(4).await;
    assert_eq!(rig.net.dialled.load(Relaxed), 2, "it has to be proven anew");
    assert_eq!(rig.identities.epoch(&id("client-sa")), own);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn root_rotation_under_load_fails_no_connection() {
    let (old, new) = (Authority::new(), Authority::new());
    let (rig, route) = rig(&old).await;
    let mut kept = rig.pair(&route).await;
    kept.0.write_all(b"x").await.unwrap();
    kept.1.read_u8().await.unwrap();
    let (rig, route) = (Arc::new(rig), Arc::new(route));
    let (stop, stopped) = watch::channel(false);
    let loads = tokio::spawn(load(Arc::clone(&rig), Arc::clone(&route), stopped));
    let dir = rig.ca.path().to_owned();
    let both = format!("{}{}", old.pem, new.pem);
    type Step<'a> = &'a dyn Fn();
    let steps: [(Step<'_>, usize); 3] = [
        (
            &|| {
                NAMES
                    .iter()
                    .for_each(|n| trust(&dir.join("shop").join(n), &both))
            },
            2,
        ),
        (&|| new.issue(&dir, &both), 2),
        (
            &|| {
                NAMES
                    .iter()
                    .for_each(|n| trust(&dir.join("shop").join(n), &new.pem))
            },
            1,
        ),
    ];
    for (step, roots) in steps {
        let before = NAMES.map(|name| rig.identities.epoch(&id(name)));
        step();
        let mut changes = rig.identities.subscribe();
        let changed = changes.wait_for(|now| {
            now.bundle().roots().len() == roots
                && NAMES.iter().zip(&before).all(|(name, before)| {
                    now.epoch(&id(name)).map(|e| e.certificate) != before.map(|e| e.certificate)
                })
        });
        drop(changed.await.unwrap());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    stop.send_replace(true);
    let made = loads.await.unwrap();
    assert!(made > 20, "{made}");
    // What was open before all this goes on.
    kept.1.write_all(b"y").await.unwrap();
    assert_eq!(kept.0.read_u8().await.unwrap(), b'y');
    for node in [&rig.near, &rig.far] {
        let page = node
            .metrics
            .page(mesh_telemetry::metrics::Format::Prometheus);
        let failed = page.lines().filter(|line| {
            line.starts_with("mesh_tcp_connections_failed_total")
                || (line.starts_with("mesh_tls_handshakes_total") && !line.contains("\"ok\""))
        });
        assert_eq!(failed.collect::<Vec<_>>(), Vec::<&str>::new());
    }
}
