// SPDX-License-Identifier: Apache-2.0
//! Helpers of tests: certificates, connected sockets and tunnels over loopback.

use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::buffers::{BufferAccount, BufferPool};
use super::socket::Socket;
use super::tls::{self, HandshakeError, Unscheduled};
use super::tunnel::Tunnel;

/// The name in every test certificate.
pub(crate) fn name() -> ServerName<'static> {
    ServerName::try_from("peer.test").unwrap()
}

/// Configurations of both sides, under one root.
pub(crate) struct Pki {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = params.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::new(params, key);
        let mut roots = RootCertStore::empty();
        roots.add(root).unwrap();
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let (chain, key) = leaf(&issuer);
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain, key)
            .unwrap();
        client.enable_secret_extraction = true;
        let (chain, key) = leaf(&issuer);
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.unwrap())
            .with_single_cert(chain, key)
            .unwrap();
        server.enable_secret_extraction = true;
        server.send_tls13_tickets = 4;
        Self {
            client: Arc::new(client),
            server: Arc::new(server),
        }
    }

    /// A fresh tunnel: the opener's and the acceptor's side.
    pub(crate) async fn tunnels(&self, buffers: &Rc<BufferPool>) -> (Tunnel, Tunnel) {
        let (near, far) = sockets();
        let client = Arc::clone(&self.client);
        let server = Arc::clone(&self.server);
        let dial = async {
            let done = |_: &_| Ok::<_, HandshakeError>(());
            let (secured, ()) = tls::connect(&near, &Unscheduled, client, name(), done)
                .await
                .unwrap();
            // The acceptor's handshake ends with the opener's first record.
            let mut tunnel = Tunnel::new(
                near,
                secured,
                BufferAccount::new(Rc::clone(buffers), Arc::new(())),
            );
            std::future::poll_fn(|cx| tunnel.poll_flush(cx))
                .await
                .unwrap();
            tunnel
        };
        let answer = async {
            let done = |_: &_| Ok::<_, HandshakeError>(());
            let (secured, ()) = tls::accept(&far, &Unscheduled, server, done).await.unwrap();
            Tunnel::new(
                far,
                secured,
                BufferAccount::new(Rc::clone(buffers), Arc::new(())),
            )
        };
        tokio::join!(dial, answer)
    }
}

fn leaf(issuer: &Issuer<'_, KeyPair>) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["peer.test".to_owned()]).unwrap();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    let certificate = params.signed_by(&key, issuer).unwrap();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    (vec![certificate.der().clone()], key)
}

/// Two connected, non-blocking sockets.
pub(crate) fn streams() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, from) = listener.accept().unwrap();
    assert_eq!(from, near.local_addr().unwrap());
    for stream in [&near, &far] {
        stream.set_nonblocking(true).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (near, far)
}

/// Two connected sockets, as the relay uses them.
pub(crate) fn sockets() -> (Socket, Socket) {
    let (near, far) = streams();
    (Socket::new(near).unwrap(), Socket::new(far).unwrap())
}

/// An application's socket, and the relay's side of it.
pub(crate) fn application() -> (tokio::net::TcpStream, Socket) {
    let (near, far) = streams();
    let near = tokio::net::TcpStream::from_std(near).unwrap();
    (near, Socket::new(far).unwrap())
}

/// Bytes that depend on their position and on `seed`.
pub(crate) fn pattern(seed: u64, from: u64, to: &mut [u8]) {
    for (place, byte) in (from..).zip(to) {
        let mixed = (place ^ seed.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *byte = mixed.to_be_bytes()[1];
    }
}
