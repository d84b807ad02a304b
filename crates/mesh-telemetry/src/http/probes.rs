// SPDX-License-Identifier: Apache-2.0
//! `/metrics`, `/livez` and `/readyz`.

use std::fmt;
use std::fmt::Write as _;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::ACCEPT;
use hyper::{Method, Request, StatusCode};

use super::{Answer, Handler, TEXT, answer, internal_error, method_not_allowed, not_found};
use crate::metrics::Format;
use crate::readiness::Readiness;

/// Answers `/metrics`, `/livez` and `/readyz`; every other path is 404.
#[derive(Clone)]
pub struct Probes {
    metrics: Arc<dyn Fn(Format) -> String + Send + Sync>,
    readiness: Readiness,
}

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probes")
            .field("readiness", &self.readiness)
            .finish_non_exhaustive()
    }
}

impl Probes {
    /// The paths that are served.
    pub const PATHS: &str = "/metrics, /livez and /readyz";

    /// Serves the page that `metrics` writes, and the conditions of `readiness`. `metrics` may block: it
    /// runs on a thread for blocking work.
    #[must_use]
    pub fn new(
        metrics: impl Fn(Format) -> String + Send + Sync + 'static,
        readiness: Readiness,
    ) -> Self {
        Self {
            metrics: Arc::new(metrics),
            readiness,
        }
    }

    /// Answers a request for one of [`Self::PATHS`]; `None` = another path.
    pub async fn try_answer<B>(&self, request: &Request<B>) -> Option<Answer> {
        let accept = || request.headers().get(ACCEPT)?.to_str().ok();
        let page = request.uri().path();
        if !matches!(page, "/metrics" | "/livez" | "/readyz") {
            return None;
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Some(method_not_allowed("GET, HEAD"));
        }
        Some(match page {
            "/metrics" => {
                let format = Format::negotiate(accept().unwrap_or_default());
                self.metrics(format).await
            }
            "/livez" => answer(StatusCode::OK, TEXT, "ok\n"),
            _ => self.readyz(),
        })
    }

    async fn metrics(&self, format: Format) -> Answer {
        let page = Arc::clone(&self.metrics);
        match tokio::task::spawn_blocking(move || page(format)).await {
            Ok(text) => answer(StatusCode::OK, format.content_type(), text),
            Err(error) => internal_error(&error),
        }
    }

    fn readyz(&self) -> Answer {
        let conditions = self.readiness.conditions();
        let mut text = String::new();
        for (condition, holds) in &conditions {
            let (sign, state) = if *holds {
                ('+', "ok")
            } else {
                ('-', "not yet")
            };
            writeln!(text, "[{sign}] {condition}: {state}").expect("a String takes everything");
        }
        if conditions.values().all(|holds| *holds) {
            text.push_str("ready\n");
            answer(StatusCode::OK, TEXT, text)
        } else {
            text.push_str("not ready\n");
            answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
        }
    }
}

impl Handler for Probes {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        match self.try_answer(&request).await {
            Some(answer) => answer,
            None if !matches!(*request.method(), Method::GET | Method::HEAD) => {
                method_not_allowed("GET, HEAD")
            }
            None => not_found(Self::PATHS),
        }
    }
}
