// SPDX-License-Identifier: Apache-2.0
//! An HTTP/1 server for few clients: scrapers, probes and operators.
//!
//! [`serve`] answers each request of a [`Listener`] by a [`Handler`], within bounds on connections,
//! headers and time. When a listener has no place left, a new connection replaces one that has sent no
//! request, of the client that has the most ([`Places`]). [`Probes`] is the handler of `/metrics`, `/livez` and `/readyz`.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_log::warn_limited;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;

mod bind;
mod probes;
#[cfg(test)]
mod tests;

pub use probes::Probes;

use crate::places::{Place, Places};

/// Concurrent connections of one listener.
pub const MAX_CONNECTIONS: usize = 64;
/// The time for a request's header, from the start of the connection or the end of the previous request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// The age at which a connection closes after its current answer.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);
/// The time that the last answer of a connection may take.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// Bytes of a request's header, and of the buffer it is read into.
pub const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Fields of a request's header.
const MAX_HEADER_FIELDS: usize = 64;

/// The content type of plain text.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// The content type of a JSON document.
pub const JSON: &str = "application/json";
/// The content type of JSON lines.
pub const JSON_LINES: &str = "application/x-ndjson";

/// An answer to a request.
pub type Answer = Response<Full<Bytes>>;

/// Answers the requests of a listener.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Answers one request.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Answer> + Send;
}

/// A bound socket that accepts connections.
#[derive(Debug)]
pub struct Listener(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener, bind::SocketFile),
}

impl Listener {
    /// Listens on a TCP address, together with a predecessor that still serves it. An unspecified IPv6
    /// address falls back to IPv4 on a host without IPv6. Must be called inside a runtime.
    ///
    /// # Errors
    /// When the address is in use by another program, or does not exist on the host.
    pub fn tcp(addr: SocketAddr) -> io::Result<Self> {
        bind::tcp_or_ipv4(addr).map(|listener| Self(Kind::Tcp(listener)))
    }

    /// Listens on a Unix socket with mode 0600. The socket replaces a predecessor's in one step, and its
    /// file is removed at the end unless a successor has replaced it. Must be called inside a runtime.
    ///
    /// # Errors
    /// When the socket cannot be created.
    pub fn unix(path: &Path) -> io::Result<Self> {
        bind::unix(path).map(|(listener, file)| Self(Kind::Unix(listener, file)))
    }

    /// Returns the address of a TCP listener, with the assigned port if port 0 was requested.
    #[must_use]
    pub fn addr(&self) -> Option<SocketAddr> {
        match &self.0 {
            Kind::Tcp(listener) => listener.local_addr().ok(),
            Kind::Unix(..) => None,
        }
    }
}

/// Serves a listener until `stop` turns true.
pub async fn serve(listener: Listener, handler: impl Handler, stop: watch::Receiver<bool>) {
    match listener.0 {
        Kind::Tcp(listener) => accept_all(listener, handler, stop).await,
        Kind::Unix(listener, file) => {
            accept_all(listener, handler, stop).await;
            drop(file);
        }
    }
}

/// A listener of either kind.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// Accepts a connection; clients of a Unix socket have no address.
    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    async fn next(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        let (stream, from) = self.accept().await?;
        Ok((stream, Some(from.ip())))
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    async fn next(&self) -> io::Result<(UnixStream, Option<IpAddr>)> {
        Ok((self.accept().await?.0, None))
    }
}

async fn accept_all(listener: impl Accept, handler: impl Handler, mut stop: watch::Receiver<bool>) {
    let places = Places::new(MAX_CONNECTIONS);
    loop {
        let accepted = tokio::select! {
            accepted = listener.next() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, from)) => {
                // A connection without a place is closed.
                if let Some(place) = places.take(from) {
                    tokio::spawn(connection(stream, Arc::new(place), handler.clone()));
                }
            }
            Err(error) => {
                warn_limited!("http_accept", error, "cannot accept an HTTP connection");
                // Most likely out of descriptors: an immediate retry would fail as well.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection<S>(stream: S, place: Arc<Place>, handler: impl Handler)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let proof = Arc::clone(&place);
    let service = service_fn(move |request| {
        proof.prove();
        let handler = handler.clone();
        async move { Ok::<_, Infallible>(handler.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADER_FIELDS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let closed = tokio::select! {
        closed = connection.as_mut() => closed,
        () = place.lost() => return,
        () = tokio::time::sleep(MAX_CONNECTION_AGE) => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(LAST_ANSWER, connection).await {
                Ok(closed) => closed,
                Err(_elapsed) => return,
            }
        }
    };
    if let Err(error) = closed {
        tracing::debug!(%error, "HTTP connection failed");
    }
}

/// Builds an answer.
#[must_use]
pub fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let value = HeaderValue::from_static(content_type);
    answer.headers_mut().insert(CONTENT_TYPE, value);
    answer
}

/// Builds the answer 404, with the pages that exist.
#[must_use]
pub fn not_found(pages: &str) -> Answer {
    let text = format!("page not found; available: {pages}\n");
    answer(StatusCode::NOT_FOUND, TEXT, text)
}

/// Builds the answer 405, with the methods that are allowed.
#[must_use]
pub fn method_not_allowed(methods: &'static str) -> Answer {
    let text = format!("method not allowed; allowed: {methods}\n");
    let mut answer = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
    let value = HeaderValue::from_static(methods);
    answer.headers_mut().insert(ALLOW, value);
    answer
}

/// Builds the answer 500.
#[must_use]
pub fn internal_error(error: &impl std::fmt::Display) -> Answer {
    answer(
        StatusCode::INTERNAL_SERVER_ERROR,
        TEXT,
        format!("{error}\n"),
    )
}
