// SPDX-License-Identifier: Apache-2.0
//! The flow log. Records go through a bounded queue to a writer thread, so that closing a connection
//! never waits; records that do not fit are counted as lost.
//!
//! [`drain`] turns the events in the kernel's ring into records.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::event::Event;
use tokio::sync::{mpsc, oneshot, watch};

use crate::metrics::Metrics;
use crate::record::{CloseReasons, FlowRecord, KernelRecords, Recorder};

mod writer;

/// Records that wait to be written.
const QUEUE: usize = 4096;
/// Records kept for `/flows`.
const RECENT: usize = 256;
/// Interval of reading the kernel's ring. With the size of the ring it allows some million events a
/// second.
const DRAIN_EVERY: Duration = Duration::from_millis(10);

/// The target of the flow log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// No log; recent records are still kept.
    Off,
    /// A file, reopened when it is rotated.
    File(PathBuf),
}

/// A failure to start the flow log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the flow log {path}", path = path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The writer thread cannot be started.
    #[error("cannot start the writer thread of the flow log")]
    Thread(#[source] io::Error),
}

enum Message {
    Record(Box<FlowRecord>),
    Reopen,
    Recent(oneshot::Sender<Vec<Arc<str>>>),
}

/// The queue of the flow log. Clones share it.
#[derive(Clone, Debug)]
pub struct FlowSink(mpsc::Sender<Message>);

/// The running flow log.
#[derive(Debug)]
pub struct Flows {
    sink: FlowSink,
    thread: std::thread::JoinHandle<()>,
}

impl Flows {
    /// Opens the log and starts its writer thread.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn start(target: &Target, metrics: &Metrics) -> Result<Self, Error> {
        let (sender, queue) = mpsc::channel(QUEUE);
        let writer = writer::Writer::open(target, RECENT, metrics.clone())?;
        let thread = std::thread::Builder::new()
            .name("flow-log".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(Error::Thread)?;
        Ok(Self {
            sink: FlowSink(sender),
            thread,
        })
    }

    /// Returns the queue.
    #[must_use]
    pub fn sink(&self) -> FlowSink {
        self.sink.clone()
    }

    /// Waits until every record is written. All other sinks must be dropped; otherwise `timeout` passes.
    pub fn finish(self, timeout: Duration) {
        drop(self.sink);
        let until = Instant::now() + timeout;
        while !self.thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if !self.thread.is_finished() {
            tracing::warn!(
                "flow log writer did not finish in time; the last records may be missing"
            );
        }
    }
}

impl FlowSink {
    /// Sends a record, or counts it as lost.
    pub(crate) fn send(&self, record: FlowRecord, metrics: &Metrics) {
        if self.0.try_send(Message::Record(Box::new(record))).is_err() {
            metrics.lost(1);
        }
    }

    /// Reopens the file after it was renamed.
    pub async fn reopen(&self) {
        // Fails only if the writer is gone.
        drop(self.0.send(Message::Reopen).await);
    }

    /// Returns the last records as JSON, oldest first.
    pub async fn recent(&self) -> Vec<Arc<str>> {
        let (answer, lines) = oneshot::channel();
        if self.0.send(Message::Recent(answer)).await.is_err() {
            return Vec::new();
        }
        lines.await.unwrap_or_default()
    }
}

/// A source of kernel events. One agent of a node reads them at a time.
pub trait EventSource: Send + 'static {
    /// Acquires the right to read; `false` = another agent of this node has it.
    ///
    /// # Errors
    /// When the lock cannot be read.
    fn acquire(&mut self) -> io::Result<bool>;
    /// Releases the right to read.
    ///
    /// # Errors
    /// When the lock cannot be written.
    fn release(&mut self) -> io::Result<()>;
    /// Passes the waiting events to `each`.
    fn drain(&mut self, each: &mut dyn FnMut(&Event));
}

/// Time after which a replaced agent reads again if its successor does not.
const RETURN: Duration = Duration::from_secs(1);

/// Makes records of kernel events until `stop` turns true, and of the events that wait then. Once
/// `replaced` is true, the successor reads them.
pub async fn drain(
    mut events: impl EventSource,
    (recorder, reasons): (Recorder, CloseReasons),
    replaced: watch::Receiver<bool>,
    mut stop: watch::Receiver<bool>,
) {
    let mut records = KernelRecords::new(recorder, reasons);
    let mut left = None;
    let mut tick = tokio::time::interval(DRAIN_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let last = tokio::select! {
            _ = tick.tick() => false,
            // The sender is gone = the agent is ending.
            _ = stop.wait_for(|stop| *stop) => true,
        };
        let now = Instant::now();
        if *replaced.borrow() && left.is_none() {
            left = Some(now);
            reported(events.release());
        }
        let leaves = left.is_some_and(|since| now.saturating_duration_since(since) < RETURN);
        if (last || !leaves) && reported(events.acquire()) == Some(true) {
            records.refresh(now);
            events.drain(&mut |event| records.report(event));
        }
        if last {
            return;
        }
    }
}

/// Logs a failure.
fn reported<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Ok(turn) => Some(turn),
        Err(error) => {
            mesh_log::warn_limited!(
                "events",
                &error as &dyn std::error::Error,
                "cannot lock the kernel's event ring"
            );
            None
        }
    }
}

/// Reopens the log at every SIGHUP. Never returns while signals can be received.
///
/// # Errors
/// When signals cannot be received.
pub async fn reopen_on_hangup(sink: FlowSink) -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup())?;
    while hangup.recv().await.is_some() {
        sink.reopen().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
