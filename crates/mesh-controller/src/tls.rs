// SPDX-License-Identifier: Apache-2.0
//! The server of the certificate service: HTTP/2 over TLS, with a certificate of the CA itself.
//!
//! Connections and handshakes have limits and deadlines. A connection closes after some minutes, so
//! that agents spread over replicas and see the newest certificate.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::unfold;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::ca_store::Current;
use super::service::CertificateService;
use mesh_log::warn_limited;

/// Maximum number of connections: one for each agent, with room for replacements.
const MAX_CONNECTIONS: usize = 4096;
/// Maximum number of connections from one address. An agent needs one.
const MAX_PER_ADDRESS: usize = 64;
/// Finished handshakes that wait for the server.
const BACKLOG: usize = 64;
/// Deadline of a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Deadline of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of HTTP/2 pings.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// The age at which a connection closes.
const MAX_AGE: Duration = Duration::from_secs(600);
/// Maximum number of concurrent requests of a connection.
const MAX_STREAMS: u32 = 64;
/// Maximum size of a request's header, which carries a token.
const MAX_HEADER_BYTES: u32 = 32 << 10;

/// Presents the current serving certificate to each client.
#[derive(Debug)]
struct CurrentCertificate(Current);

impl std::fmt::Debug for super::authority::Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let authority = self.0.borrow();
        Some(Arc::clone(&authority.as_ref()?.serving))
    }
}

/// Builds the configuration of the server: TLS 1.3, with the current serving certificate.
pub(super) fn config(authority: Current) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(CurrentCertificate(authority)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until the server fails.
pub(super) async fn serve(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    service: CertificateService,
) -> Result<(), tonic::transport::Error> {
    let (sender, ready) = mpsc::channel(BACKLOG);
    let accept = tokio::spawn(accept(listener, TlsAcceptor::from(config), sender));
    let incoming = unfold(ready, async |mut ready| {
        let connection: Connection = ready.recv().await?;
        Some((Ok::<_, io::Error>(connection), ready))
    });
    let result = Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .max_connection_age(MAX_AGE)
        .max_connection_age_grace(REQUEST_TIMEOUT)
        .serve_with_incoming(service, Box::pin(incoming))
        .await;
    accept.abort();
    result
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, ready: mpsc::Sender<Connection>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut sources: BTreeMap<IpAddr, Arc<Semaphore>> = BTreeMap::new();
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn_limited!("ca_accept", error, "cannot accept a connection");
                // Most likely out of descriptors: an immediate retry would fail as well.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if sources.len() > MAX_CONNECTIONS {
            // A connection holds a reference to the semaphore of its address.
            sources.retain(|_, source| Arc::strong_count(source) > 1);
        }
        let source = sources.entry(remote.ip().to_canonical());
        let source = source.or_insert_with(|| Arc::new(Semaphore::new(MAX_PER_ADDRESS)));
        let Ok(address_permit) = Arc::clone(source).try_acquire_owned() else {
            tracing::debug!(%remote, "too many connections from this address");
            continue;
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let connection = Connection {
                        stream,
                        remote,
                        _permits: [permit, address_permit],
                    };
                    if ready.send(connection).await.is_err() {
                        tracing::debug!("server stopped");
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, %remote, "TLS handshake failed"),
                Err(_elapsed) => tracing::debug!(%remote, "TLS handshake timed out"),
            }
        });
    }
}

/// A connection, with its permits of the total limit and of the limit of its address.
struct Connection {
    stream: TlsStream<TcpStream>,
    remote: SocketAddr,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo {
            local_addr: None,
            remote_addr: Some(self.remote),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
