// SPDX-License-Identifier: Apache-2.0
//! The controller's port: TLS with the certificate that the CA has made for itself, HTTP/2 behind it.
//!
//! Connections and handshakes are bounded and have deadlines; a connection ends after some minutes,
//! so that agents spread over replicas and meet the newest certificate.

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

use super::keeper::Current;
use super::service::CertificateService;
use mesh_log::warn_limited;

/// Connections at once: one for each agent, and room for those that are being replaced.
const CONNECTIONS: usize = 4096;
/// Connections from one address; an agent needs one.
const FROM_ONE: usize = 64;
/// Handshakes that wait for the server to take them.
const WAITING: usize = 64;
const HANDSHAKE: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(30);
const AGE: Duration = Duration::from_secs(600);
/// Requests at once on one connection.
const STREAMS: u32 = 64;
/// Bytes of a request's header: a token, and little else.
const HEADER: u32 = 32 << 10;

/// Shows the certificate that is newest when a client comes.
#[derive(Debug)]
struct Newest(Current);

impl std::fmt::Debug for super::authority::Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl ResolvesServerCert for Newest {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let authority = self.0.borrow();
        Some(Arc::clone(&authority.as_ref()?.serving))
    }
}

/// TLS 1.3, with whatever certificate is newest.
pub(super) fn config(authority: Current) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Newest(authority)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Serves for ever.
pub(super) async fn serve(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    service: CertificateService,
) -> Result<(), tonic::transport::Error> {
    let (sender, ready) = mpsc::channel(WAITING);
    let accept = tokio::spawn(accept(listener, TlsAcceptor::from(config), sender));
    let incoming = unfold(ready, async |mut ready| {
        let connection: Connection = ready.recv().await?;
        Some((Ok::<_, io::Error>(connection), ready))
    });
    let result = Server::builder()
        .timeout(REQUEST)
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_max_header_list_size(HEADER)
        .max_connection_age(AGE)
        .max_connection_age_grace(REQUEST)
        .serve_with_incoming(service, Box::pin(incoming))
        .await;
    accept.abort();
    result
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, ready: mpsc::Sender<Connection>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut sources: BTreeMap<IpAddr, Arc<Semaphore>> = BTreeMap::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn_limited!("ca_accept", error, "cannot accept a connection");
                // Out of descriptors, most likely: it does not help to try at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if sources.len() > CONNECTIONS {
            // Who holds a connection holds its semaphore.
            sources.retain(|_, source| Arc::strong_count(source) > 1);
        }
        let source = sources.entry(remote.ip().to_canonical());
        let source = source.or_insert_with(|| Arc::new(Semaphore::new(FROM_ONE)));
        let Ok(share) = Arc::clone(source).try_acquire_owned() else {
            tracing::debug!(%remote, "too many connections from this address");
            continue;
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let connection = Connection {
                        stream,
                        remote,
                        _places: [place, share],
                    };
                    if ready.send(connection).await.is_err() {
                        tracing::debug!("the server has ended");
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, %remote, "a handshake failed"),
                Err(_elapsed) => tracing::debug!(%remote, "a handshake took too long"),
            }
        });
    }
}

/// A connection, and its places among all and among those of its address.
struct Connection {
    stream: TlsStream<TcpStream>,
    remote: SocketAddr,
    _places: [OwnedSemaphorePermit; 2],
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
