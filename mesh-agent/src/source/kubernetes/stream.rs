// SPDX-License-Identifier: Apache-2.0
//! Lists and watches one kind: a list in pages, then watches that each resume at the last resource
//! version, and a new list after the API server has compacted that version.
//!
//! Events go to the source through a bounded channel, so a slow source slows down the reading of the
//! connection.

use std::time::Duration;

use futures_util::AsyncBufReadExt as _;
use kube::Client;
use kube::core::Request;
use kube::core::params::{ListParams, WatchParams};
use mesh_api::{Kind, Origin};
use rand::Rng as _;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, sleep, timeout};

use super::RETRY;

/// The number of objects in a page. It bounds the memory of a list (a Pod is about 10 KB of JSON).
const PAGE: u32 = 250;
/// The timeout of a page, and of the response headers of a watch.
const ANSWER: Duration = Duration::from_secs(30);
/// The shortest time after which the API server ends a watch, in seconds. The longest is twice this.
const WATCH: u32 = 300;
/// The time without an event after which a watch is considered dead. API servers send a bookmark about
/// once a minute.
const SILENCE: Duration = Duration::from_secs(150);
/// A watch that ended earlier than this did not end because of its timeout.
const BRIEF: Duration = Duration::from_secs(1);
/// The number of consecutive error responses after which the resource version may be the cause (it may be
/// of another server, or older than a restored backup), and the kind is listed again.
const REFUSALS: u32 = 4;
/// A kind that was served before is reported as not served when the API server has not served it for this long. A server
/// that is starting, or one of several servers, may not know the kind yet.
const GONE: Duration = Duration::from_secs(10);

/// An event of a kind.
#[derive(Debug)]
pub(super) enum Event {
    /// A list begins. Objects that it does not contain are deleted.
    Listing,
    /// The current version of an object.
    Applied(Value),
    /// The last version of a deleted object.
    Deleted(Value),
    /// The list is complete.
    Listed,
    /// The API server does not serve the kind.
    Absent,
    /// The error of the watch; `None` if the watch works and its objects are current.
    Health(Option<String>),
}

/// The receiver of the events was dropped.
struct Closed;

/// The reason why a list or a watch ended.
enum End {
    Closed,
    /// The API server has compacted the resource version.
    Expired,
    /// The API server does not serve the kind.
    Absent,
    /// The API server returned an error.
    Refused(String),
    Failed(String),
}

impl From<Closed> for End {
    fn from(Closed: Closed) -> Self {
        Self::Closed
    }
}

impl From<kube::Error> for End {
    fn from(error: kube::Error) -> Self {
        let kube::Error::Api(status) = &error else {
            return Self::Failed(mesh_log::Chain(&error).to_string());
        };
        match status.code {
            410 => Self::Expired,
            404 => Self::Absent,
            code => Self::Refused(format!(
                "the API server returned an error: {} ({code})",
                status.message
            )),
        }
    }
}

/// Lists and watches a kind until the receiver is dropped.
pub(super) async fn follow(client: Client, kind: Kind, to: Sender<(Kind, Event)>) {
    let mut stream = Stream {
        client,
        kind,
        path: kind.path(),
        to,
        at: None,
        failures: 0,
        refusals: 0,
        missing: None,
        was_there: false,
    };
    while let Err(end) = stream.run().await {
        let went_on = match end {
            End::Closed => return,
            End::Expired => {
                tracing::info!(
                    kind = kind.name(),
                    "resource version is too old; listing again"
                );
                stream.at = None;
                stream.failed(None).await
            }
            End::Absent => stream.absent().await,
            End::Refused(why) => stream.refused(why).await,
            End::Failed(why) => stream.failed(Some(why)).await,
        };
        if went_on.is_err() {
            return;
        }
    }
}

struct Stream {
    client: Client,
    kind: Kind,
    path: String,
    to: Sender<(Kind, Event)>,
    /// The resource version up to which every change is known.
    at: Option<String>,
    /// The number of consecutive failures.
    failures: u32,
    /// The number of error responses since the last successful watch.
    refusals: u32,
    /// The time since which the API server does not serve the kind.
    missing: Option<Instant>,
    /// Whether the API server has served the kind before.
    was_there: bool,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    /// The objects; some API servers send `null` for an empty list.
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(rename = "continue", default)]
    next: String,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    what: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// The object of an ERROR event.
#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

impl Stream {
    async fn run(&mut self) -> Result<(), End> {
        loop {
            if self.at.is_none() {
                self.list().await?;
            }
            let began = Instant::now();
            self.watch().await?;
            if began.elapsed() < BRIEF {
                // A proxy on the path may end every response: do not retry in a busy loop.
                sleep(delay(2)).await;
            }
        }
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        let sent = self.to.send((self.kind, event)).await;
        sent.map_err(|_unsent| Closed)
    }

    async fn list(&mut self) -> Result<(), End> {
        let mut params = ListParams::default().limit(PAGE);
        let mut started = false;
        loop {
            let request = Request::new(&*self.path).list(&params);
            let request = request.map_err(|error| End::Failed(error.to_string()))?;
            let answer = timeout(ANSWER, self.client.request_text(request)).await;
            let text = answer.map_err(|_elapsed| too_slow())??;
            let page: Page<'_> = serde_json::from_str(&text).map_err(unreadable)?;
            if !started {
                started = true;
                self.send(Event::Listing).await?;
            }
            for item in page.items.iter().flatten() {
                let object = self.read(item)?;
                self.send(Event::Applied(object)).await?;
            }
            if page.metadata.next.is_empty() {
                self.at = Some(page.metadata.resource_version);
                self.was_there = true;
                self.missing = None;
                return Ok(self.send(Event::Listed).await?);
            }
            params.continue_token = Some(page.metadata.next);
        }
    }

    /// Watches the kind. Returns when the API server ends the watch, as it does after its timeout.
    async fn watch(&mut self) -> Result<(), End> {
        let params = WatchParams {
            bookmarks: true,
            timeout: Some(rand::rng().random_range(WATCH..=2 * WATCH)),
            ..WatchParams::default()
        };
        let at = self.at.clone().unwrap_or_default();
        let request = Request::new(&*self.path).watch(&params, &at);
        let mut request = request.map_err(|error| End::Failed(error.to_string()))?;
        let plain = http::HeaderValue::from_static("identity");
        request
            .headers_mut()
            .insert(http::header::ACCEPT_ENCODING, plain);
        let answer = timeout(ANSWER, self.client.request_stream(request)).await;
        let mut lines = answer.map_err(|_elapsed| too_slow())??.lines_of();
        self.failures = 0;
        self.refusals = 0;
        self.missing = None;
        self.send(Event::Health(None)).await?;
        loop {
            let line = match timeout(SILENCE, lines.next()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(error)) => return Err(End::Failed(format!("the watch failed: {error}"))),
                Err(_elapsed) => {
                    return Err(End::Failed(
                        "the watch received no event in time".to_owned(),
                    ));
                }
            };
            self.event(line).await?;
        }
    }

    async fn event(&mut self, line: &str) -> Result<(), End> {
        let line: Line<'_> = serde_json::from_str(line).map_err(unreadable)?;
        if line.what == "ERROR" {
            let refusal: Refusal = serde_json::from_str(line.object.get()).map_err(unreadable)?;
            return Err(match refusal.code {
                410 => End::Expired,
                code => End::Refused(format!(
                    "the API server ended the watch: {} ({code})",
                    refusal.message
                )),
            });
        }
        let object = self.read(line.object)?;
        let at = object.pointer("/metadata/resourceVersion");
        let at = at.and_then(Value::as_str).map(str::to_owned);
        match line.what {
            "ADDED" | "MODIFIED" => self.send(Event::Applied(object)).await?,
            "DELETED" => self.send(Event::Deleted(object)).await?,
            // BOOKMARK has only a resource version. Other types are not sent without a request.
            _ => {}
        }
        if at.is_some() {
            self.at = at;
        }
        Ok(())
    }

    fn read(&self, text: &RawValue) -> Result<Value, End> {
        self.kind.read_pruned(text.get()).map_err(unreadable)
    }

    async fn failed(&mut self, why: Option<String>) -> Result<(), Closed> {
        if why.is_some() {
            self.send(Event::Health(why)).await?;
        }
        sleep(delay(self.failures)).await;
        self.failures = self.failures.saturating_add(1);
        Ok(())
    }

    async fn refused(&mut self, why: String) -> Result<(), Closed> {
        self.refusals += 1;
        if self.refusals >= REFUSALS {
            self.refusals = 0;
            self.at = None;
        }
        self.failed(Some(why)).await
    }

    async fn absent(&mut self) -> Result<(), Closed> {
        if self.kind.origin() == Origin::BuiltIn {
            return self
                .failed(Some("the API server does not serve this kind".to_owned()))
                .await;
        }
        // A server that is starting does not serve every kind yet, and is not ready.
        if let Err(why) = self.server_is_ready().await {
            return self.failed(Some(why)).await;
        }
        let since = *self.missing.get_or_insert_with(Instant::now);
        if self.was_there && since.elapsed() < GONE {
            return self.failed(None).await;
        }
        self.was_there = false;
        self.at = None;
        self.send(Event::Absent).await?;
        self.failed(None).await
    }

    async fn server_is_ready(&self) -> Result<(), String> {
        let request = http::Request::get("/readyz").body(Vec::new());
        let request = request.map_err(|error| error.to_string())?;
        match timeout(ANSWER, self.client.request_text(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(mesh_log::Chain(&error).to_string()),
            Err(_elapsed) => Err("the API server did not answer in time".to_owned()),
        }
    }
}

fn too_slow() -> End {
    End::Failed("the API server did not answer in time".to_owned())
}

fn unreadable(error: serde_json::Error) -> End {
    End::Failed(format!("invalid response of the API server: {error}"))
}

fn delay(earlier_failures: u32) -> Duration {
    RETRY.delay(earlier_failures, rand::random())
}

/// Reads the lines of a body one at a time into one buffer.
struct Lines<R> {
    body: R,
    line: String,
}

trait LinesOf: Sized {
    fn lines_of(self) -> Lines<Self>;
}

impl<R: futures_util::AsyncBufRead + Unpin> LinesOf for R {
    fn lines_of(self) -> Lines<Self> {
        Lines {
            body: self,
            line: String::new(),
        }
    }
}

impl<R: futures_util::AsyncBufRead + Unpin> Lines<R> {
    /// The next complete line; `None` at the end.
    async fn next(&mut self) -> std::io::Result<Option<&str>> {
        self.line.clear();
        self.line.shrink_to(64 << 10);
        self.body.read_line(&mut self.line).await?;
        // The next watch repeats an incomplete line.
        Ok(self.line.strip_suffix('\n'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_delays_grow_to_a_bound_and_differ() {
        let (first, longest) = (RETRY.first, RETRY.longest);
        assert!(delay(0) <= first && delay(0) >= first / 2);
        assert!(delay(3) >= first * 4);
        assert!(delay(u32::MAX) <= longest);
        let some: Vec<Duration> = (0..8).map(|_| delay(9)).collect();
        assert!(some.iter().any(|one| *one != some[0]));
    }

    #[test]
    fn empty_page_may_have_null_items() {
        let page: Page<'_> =
            serde_json::from_str(r#"{"metadata":{"resourceVersion":"5"},"items":null}"#).unwrap();
        assert!(page.items.is_none() && page.metadata.resource_version == "5");
    }
}
