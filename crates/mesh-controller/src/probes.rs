// SPDX-License-Identifier: Apache-2.0
//! `/metrics`, `/livez` and `/readyz` of the controller.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::numbers::Numbers;

/// Connections at once: scrapers and probes.
const CONNECTIONS: usize = 32;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const AGE: Duration = Duration::from_secs(60);

/// Answers for ever. `ready` = certificates are served.
pub(super) async fn serve(listener: TcpListener, numbers: Numbers, ready: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (numbers, ready) = (numbers.clone(), ready.clone());
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let page = page(&request, &numbers, *ready.borrow());
                std::future::ready(Ok::<_, Infallible>(page))
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = tokio::time::timeout(AGE, connection).await {
                tracing::debug!(%error, "a connection for metrics ended");
            }
            drop(place);
        });
    }
}

fn page(request: &Request<Incoming>, numbers: &Numbers, ready: bool) -> Response<Full<Bytes>> {
    let (status, text) = match request.uri().path() {
        "/metrics" => (StatusCode::OK, numbers.page()),
        "/livez" => (StatusCode::OK, "ok\n".to_owned()),
        "/readyz" if ready => (StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => (
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: the CA's Secret or the pods are not known yet\n".to_owned(),
        ),
        _ => (StatusCode::NOT_FOUND, String::new()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
