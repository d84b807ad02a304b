// SPDX-License-Identifier: Apache-2.0
//! One kind, followed for ever: a list in pages, then a watch, resumed where it ended; a new list
//! where the server has forgotten that place.
//!
//! What is learnt goes to the room through a bounded queue: a room that is slow slows down the
//! reading of its connection.

use std::time::Duration;

use futures_util::AsyncBufReadExt as _;
use kube::Client;
use kube::core::Request;
use kube::core::params::{ListParams, WatchParams};
use rand::Rng as _;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, sleep, timeout};

use super::kinds::Kind;
use super::lean;

/// Objects in a page: bounds what a list takes of memory (a Pod as JSON is some 10 KB).
const PAGE: u32 = 250;
/// A page that takes longer is asked for again.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the server keeps a watch: between this and twice as long.
const WATCH: u32 = 300;
/// A watch is silent no longer than this while its connection is alive: servers send a bookmark
/// about once a minute.
const SILENCE: Duration = Duration::from_secs(150);
/// The first pause after an error, and the longest. Each is a random part of its bound.
const PAUSE: Duration = Duration::from_millis(400);
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// A watch that ended after less than this did not end because its time was over.
const BRIEF: Duration = Duration::from_secs(1);
/// After so many refusals in a row the place in the history may be the reason: one of another
/// server, or of before a backup was restored.
const REFUSALS: u32 = 4;
/// A kind that was there is gone when the server has said so for this long: one that starts, or one
/// of several, may not know it yet.
const GONE: Duration = Duration::from_secs(10);

/// What is learnt about the objects of a kind.
#[derive(Debug)]
pub(super) enum News {
    /// A list begins: what it does not have is gone.
    Listing,
    /// An object as it is now.
    Is(Value),
    /// An object is gone; its last state.
    Gone(Value),
    /// The list is complete.
    Listed,
    /// The kind is not installed.
    Absent,
    /// Why it cannot be followed at the moment; `None` = it is, and what is known is new.
    Health(Option<String>),
}

/// Nobody listens any more.
struct Closed;

/// Why a list or a watch ended.
enum End {
    Closed,
    /// The server has forgotten the place in its history.
    Expired,
    /// The kind is not there.
    Absent,
    /// The server answers, and cannot do it.
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
            code => Self::Refused(format!("the API server says: {} ({code})", status.message)),
        }
    }
}

/// Follows a kind until nobody listens.
pub(super) async fn follow(client: Client, kind: &'static Kind, to: Sender<(&'static Kind, News)>) {
    let mut stream = Stream {
        client,
        kind,
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
                tracing::info!(kind = kind.name, "too far behind: listing again");
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
    kind: &'static Kind,
    to: Sender<(&'static Kind, News)>,
    /// The place in the server's history up to which everything is known.
    at: Option<String>,
    /// In a row.
    failures: u32,
    /// Of these, since the server last took a watch.
    refusals: u32,
    /// Since when the server says that there is no such kind.
    missing: Option<Instant>,
    was_there: bool,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    /// `null` in an empty list of some servers.
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

/// The object of an ERROR.
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
                // Something between here and there ends every answer: not faster than this.
                sleep(pause(2)).await;
            }
        }
    }

    async fn tell(&self, news: News) -> Result<(), Closed> {
        let sent = self.to.send((self.kind, news)).await;
        sent.map_err(|_unsent| Closed)
    }

    async fn list(&mut self) -> Result<(), End> {
        let mut params = ListParams::default().limit(PAGE);
        let mut started = false;
        loop {
            let request = Request::new(self.kind.path).list(&params);
            let request = request.map_err(|error| End::Failed(error.to_string()))?;
            let answer = timeout(ANSWER, self.client.request_text(request)).await;
            let text = answer.map_err(|_elapsed| too_slow())??;
            let page: Page<'_> = serde_json::from_str(&text).map_err(unreadable)?;
            if !started {
                started = true;
                self.tell(News::Listing).await?;
            }
            for item in page.items.iter().flatten() {
                let object = self.read(item)?;
                self.tell(News::Is(object)).await?;
            }
            if page.metadata.next.is_empty() {
                self.at = Some(page.metadata.resource_version);
                self.was_there = true;
                self.missing = None;
                return Ok(self.tell(News::Listed).await?);
            }
            params.continue_token = Some(page.metadata.next);
        }
    }

    /// Returns when the server ended the watch, as it does now and then.
    async fn watch(&mut self) -> Result<(), End> {
        let params = WatchParams {
            bookmarks: true,
            timeout: Some(rand::rng().random_range(WATCH..=2 * WATCH)),
            ..WatchParams::default()
        };
        let at = self.at.clone().unwrap_or_default();
        let request = Request::new(self.kind.path).watch(&params, &at);
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
        self.tell(News::Health(None)).await?;
        loop {
            let line = match timeout(SILENCE, lines.next()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(error)) => return Err(End::Failed(format!("the watch broke: {error}"))),
                Err(_elapsed) => return Err(End::Failed("the watch fell silent".to_owned())),
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
                code => End::Refused(format!("the watch ended: {} ({code})", refusal.message)),
            });
        }
        let object = self.read(line.object)?;
        let at = object.pointer("/metadata/resourceVersion");
        let at = at.and_then(Value::as_str).map(str::to_owned);
        match line.what {
            "ADDED" | "MODIFIED" => self.tell(News::Is(object)).await?,
            "DELETED" => self.tell(News::Gone(object)).await?,
            // BOOKMARK: only a place. Others are not sent without being asked for.
            _ => {}
        }
        if at.is_some() {
            self.at = at;
        }
        Ok(())
    }

    /// An object as manifests have it: those of lists do not say what they are.
    fn read(&self, text: &RawValue) -> Result<Value, End> {
        let mut object = lean::read(text.get(), *self.kind.keep).map_err(unreadable)?;
        if let Value::Object(fields) = &mut object {
            fields.insert("apiVersion".to_owned(), self.kind.api_version.into());
            fields.insert("kind".to_owned(), self.kind.name.into());
        }
        Ok(object)
    }

    async fn failed(&mut self, why: Option<String>) -> Result<(), Closed> {
        if why.is_some() {
            self.tell(News::Health(why)).await?;
        }
        sleep(pause(self.failures)).await;
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
        if !self.kind.optional {
            return self
                .failed(Some("the API server does not know it".to_owned()))
                .await;
        }
        // A server that starts does not know every kind yet, and is not ready.
        if let Err(why) = self.server_is_ready().await {
            return self.failed(Some(why)).await;
        }
        let since = *self.missing.get_or_insert_with(Instant::now);
        if self.was_there && since.elapsed() < GONE {
            return self.failed(None).await;
        }
        self.was_there = false;
        self.at = None;
        self.tell(News::Absent).await?;
        self.failed(None).await
    }

    async fn server_is_ready(&self) -> Result<(), String> {
        let request = http::Request::get("/readyz").body(Vec::new());
        let request = request.map_err(|error| error.to_string())?;
        match timeout(ANSWER, self.client.request_text(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(mesh_log::Chain(&error).to_string()),
            Err(_elapsed) => Err("the API server does not answer".to_owned()),
        }
    }
}

fn too_slow() -> End {
    End::Failed("the API server does not answer".to_owned())
}

fn unreadable(error: serde_json::Error) -> End {
    End::Failed(format!("the API server's answer cannot be read: {error}"))
}

/// A random time, up to a bound that doubles with every failure: agents of many nodes that lost one
/// server do not return at the same moment.
pub(in crate::source) fn pause(failures: u32) -> Duration {
    let bound = PAUSE
        .saturating_mul(1 << failures.min(16))
        .min(LONGEST_PAUSE);
    bound.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// The lines of a body, one at a time in one buffer.
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
        // A line that was cut off comes again with the next watch.
        Ok(self.line.strip_suffix('\n'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        assert!(pause(0) <= PAUSE && pause(0) >= PAUSE / 2);
        assert!(pause(3) >= PAUSE * 4);
        assert!(pause(u32::MAX) <= LONGEST_PAUSE);
        let some: Vec<Duration> = (0..8).map(|_| pause(9)).collect();
        assert!(some.iter().any(|one| *one != some[0]));
    }

    #[test]
    fn an_empty_page_may_be_null() {
        let page: Page<'_> =
            serde_json::from_str(r#"{"metadata":{"resourceVersion":"5"},"items":null}"#).unwrap();
        assert!(page.items.is_none() && page.metadata.resource_version == "5");
    }
}
