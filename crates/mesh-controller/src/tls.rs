// SPDX-License-Identifier: Apache-2.0
//! The server of the certificate service: HTTP/2 over TLS, with a certificate of the CA itself.
//!
//! Connections and handshakes have limits and deadlines. A client that presents no valid token soon after the
//! handshake is disconnected, and loses its place first when no place is free. A connection closes after some
//! minutes, so that agents spread over replicas and see the newest certificate.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::unfold;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::ca_store::Current;
use super::service::CertificateService;
use mesh_log::warn_limited;
use mesh_telemetry::places::{Place, Places};

/// Maximum number of connections: one for each agent, with room for replacements.
const MAX_CONNECTIONS: usize = 4096;
/// Finished handshakes that wait for the server.
const BACKLOG: usize = 64;
/// Deadline of a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The time from the handshake in which a client has to present its first token, and then the time in which the
/// token has to be found valid.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
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
    let places = Places::new(MAX_CONNECTIONS);
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn_limited!("ca_accept", error, "cannot accept a connection");
                // Most likely out of descriptors: an immediate retry would fail as well.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = places.take(Some(remote.ip())) else {
            tracing::debug!(%remote, "too many connections from this address");
            continue;
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            let handshake = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
            let result = tokio::select! {
                result = handshake => result,
                () = place.lost() => return,
            };
            match result {
                Ok(Ok(stream)) => {
                    if ready
                        .send(Connection::new(stream, remote, place))
                        .await
                        .is_err()
                    {
                        tracing::debug!("server stopped");
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, %remote, "TLS handshake failed"),
                Err(_elapsed) => tracing::debug!(%remote, "TLS handshake timed out"),
            }
        });
    }
}

/// The client of a connection, as its requests see it.
#[derive(Clone, Debug)]
pub(super) struct Client {
    remote: SocketAddr,
    place: Arc<Place>,
    has_token: Arc<AtomicBool>,
}

impl Client {
    /// Returns the client's address.
    pub(super) fn ip(&self) -> IpAddr {
        self.remote.ip()
    }

    /// Notes that the client has presented a token.
    pub(super) fn present_token(&self) {
        self.has_token.store(true, Ordering::Relaxed);
    }

    /// Notes that a token of the client is valid.
    pub(super) fn prove(&self) {
        self.place.prove();
    }

    /// Waits until the connection has to end: its place is needed, or its client has proven nothing in time.
    async fn end(self) {
        let deadline = async {
            tokio::time::sleep(TOKEN_TIMEOUT).await;
            if self.has_token.load(Ordering::Relaxed) {
                tokio::time::sleep(TOKEN_TIMEOUT).await;
            }
            if self.place.is_proven() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.place.lost() => {}
            () = deadline => {}
        }
    }
}

/// A connection that ends when its client has to go.
struct Connection {
    stream: TlsStream<TcpStream>,
    client: Client,
    end: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Connection {
    fn new(stream: TlsStream<TcpStream>, remote: SocketAddr, place: Place) -> Self {
        let client = Client {
            remote,
            place: Arc::new(place),
            has_token: Arc::default(),
        };
        Self {
            stream,
            end: Box::pin(client.clone().end()),
            client,
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Client;

    fn connect_info(&self) -> Client {
        self.client.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
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
