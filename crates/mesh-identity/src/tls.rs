// SPDX-License-Identifier: Apache-2.0
//! TLS configurations of tunnels: TLS 1.3 only, certificates on both sides, no SNI.
//!
//! A configuration belongs to one identity (a client's also to one expected peer), one certificate and
//! one bundle. Its sessions and ticket keys do too, so that a resumed session was authenticated by the
//! same rules. There is no 0-RTT. Traffic secrets can be extracted from a finished handshake, for the
//! tunnel's own record layer.

use std::{fmt, net::IpAddr, sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig, Error, ServerConfig,
    client::{ClientSessionMemoryCache, Resumption},
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, Ticketer, cipher_suite, kx_group},
    },
    pki_types::ServerName,
    server::{NoServerSessionStorage, ProducesTickets},
    sign::SingleCertAndKey,
    version::TLS13,
};

use super::{
    Certificate, Clock, SpiffeId,
    verify::{ExpectAny, ExpectOne, Rules},
};

/// Tickets sent after each handshake. One is not enough for 16 concurrent connections; rustls keeps 8
/// for each server.
const TICKETS: usize = 4;
/// Maximum number of sessions of a pair (own, expected): 8 for each of 64 addresses.
const SESSIONS: usize = 512;

/// Returns the algorithms of the mesh, in the order of preference.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    if !has_aes() {
        provider
            .cipher_suites
            .insert(0, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    }
    provider.kx_groups = vec![kx_group::X25519MLKEM768, kx_group::X25519];
    Arc::new(provider)
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// Returns the key of a client's sessions with a peer. It is never sent.
pub fn server_name(peer: IpAddr) -> ServerName<'static> {
    ServerName::IpAddress(peer.into())
}

/// Builds the configuration of a client with `certificate` that accepts only `expected`.
pub(super) fn client(
    certificate: &Certificate,
    expected: &SpiffeId,
    rules: Rules,
    clock: &Clock,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::clone(&rules.provider);
    let alpn = rules.alpn.to_vec();
    let verifier = ExpectOne {
        rules,
        expected: expected.clone(),
    };
    let own = SingleCertAndKey::from(Arc::clone(&certificate.key));
    let mut config = ClientConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(own));
    config.alpn_protocols = vec![alpn];
    config.enable_sni = false;
    config.enable_early_data = false;
    config.enable_secret_extraction = true;
    config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(SESSIONS)));
    Ok(Arc::new(config))
}

/// Builds the configuration of a server with `certificate` that accepts every identity of the trust
/// domain.
pub(super) fn server(
    certificate: &Certificate,
    rules: Rules,
    clock: &Clock,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::clone(&rules.provider);
    let alpn = rules.alpn.to_vec();
    let own = SingleCertAndKey::from(Arc::clone(&certificate.key));
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(ExpectAny(rules)))
        .with_cert_resolver(Arc::new(own));
    config.alpn_protocols = vec![alpn];
    config.max_early_data_size = 0;
    config.enable_secret_extraction = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = TICKETS;
    config.ticketer = Arc::new(Tickets {
        sealed: Ticketer::new()?,
        not_after: certificate.not_after(),
        clock: clock.clone(),
    });
    Ok(Arc::new(config))
}

/// Session tickets that expire no later than the server's certificate.
struct Tickets {
    sealed: Arc<dyn ProducesTickets>,
    not_after: SystemTime,
    clock: Clock,
}

impl Tickets {
    fn seconds_left(&self) -> u64 {
        self.not_after
            .duration_since(self.clock.now())
            .map_or(0, |left| left.as_secs())
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        self.sealed.enabled()
    }

    fn lifetime(&self) -> u32 {
        let left = u32::try_from(self.seconds_left()).unwrap_or(u32::MAX);
        self.sealed.lifetime().min(left)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        (self.seconds_left() > 0)
            .then(|| self.sealed.encrypt(plain))
            .flatten()
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        (self.seconds_left() > 0)
            .then(|| self.sealed.decrypt(cipher))
            .flatten()
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}
