// SPDX-License-Identifier: Apache-2.0
//! From records to the flow log. Whoever finishes a connection never waits: records go through a
//! bounded queue to a thread of their own, and what does not fit is counted.
//!
//! Also drains the kernel's ring of events ([`drain`]).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::event::Event;
use tokio::sync::{mpsc, oneshot, watch};

use crate::metrics::Metrics;
use crate::record::{Endings, FlowRecord, KernelRecords, Recorder};
use mesh_config::FlowLog;

mod writer;

/// Records on their way to the log.
const QUEUE: usize = 4096;
/// Lines kept for `/flows`.
const RECENT: usize = 256;
/// How often the kernel's ring is drained: at the ring's size, room for some million events a
/// second.
const DRAIN_EVERY: Duration = Duration::from_millis(10);

/// Why there is no flow log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the flow log {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The writer's thread cannot be started.
    #[error("cannot start the thread of the flow log")]
    Thread(#[source] io::Error),
}

enum Message {
    Record(Box<FlowRecord>),
    Reopen,
    Recent(oneshot::Sender<Vec<Arc<str>>>),
}

/// Where records go. Clones share the queue.
#[derive(Clone, Debug)]
pub struct FlowSink(mpsc::Sender<Message>);

/// The flow log's writer.
#[derive(Debug)]
pub struct Flows {
    sink: FlowSink,
    thread: std::thread::JoinHandle<()>,
}

impl Flows {
    /// Opens the log and starts its thread.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn start(log: &FlowLog, metrics: &Metrics) -> Result<Self, Error> {
        let (sender, queue) = mpsc::channel(QUEUE);
        let writer = writer::Writer::open(log, RECENT, metrics.clone())?;
        let thread = std::thread::Builder::new()
            .name("flow-log".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(Error::Thread)?;
        Ok(Self {
            sink: FlowSink(sender),
            thread,
        })
    }

    /// Where records are to be sent.
    #[must_use]
    pub fn sink(&self) -> FlowSink {
        self.sink.clone()
    }

    /// Waits until everything is written; every other sink must be gone, or `longest` passes.
    pub fn finish(self, longest: Duration) {
        drop(self.sink);
        let until = Instant::now() + longest;
        while !self.thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if !self.thread.is_finished() {
            tracing::warn!("the flow log was not written to its end");
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

    /// Has the file opened again: it was renamed.
    pub async fn reopen(&self) {
        // A writer that is gone has nothing to open.
        drop(self.0.send(Message::Reopen).await);
    }

    /// The last records, as JSON lines, oldest first.
    pub async fn recent(&self) -> Vec<Arc<str>> {
        let (answer, lines) = oneshot::channel();
        if self.0.send(Message::Recent(answer)).await.is_err() {
            return Vec::new();
        }
        lines.await.unwrap_or_default()
    }
}

/// Where events of the kernel come from.
pub trait EventSource: Send + 'static {
    /// Takes the turn to read; `false` = another agent of this node has it.
    ///
    /// # Errors
    /// Why it cannot be told.
    fn take_turn(&mut self) -> io::Result<bool>;
    /// Lets another agent read.
    ///
    /// # Errors
    /// Why it cannot.
    fn give_turn(&mut self) -> io::Result<()>;
    /// Hands over the events that wait now.
    fn drain(&mut self, each: &mut dyn FnMut(&Event));
}

/// Events taken at once: about what the ring holds, so that one turn has an end even if the kernel
/// writes as fast as this reads.
const BATCH: usize = 20_000;

impl EventSource for mesh_datapath::datapath::Events {
    fn take_turn(&mut self) -> io::Result<bool> {
        Self::take_turn(self)
    }

    fn give_turn(&mut self) -> io::Result<()> {
        Self::give_turn(self)
    }

    fn drain(&mut self, each: &mut dyn FnMut(&Event)) {
        Self::drain(self, BATCH, |event| each(&event));
    }
}

/// An agent that was replaced looks after so long whether its successor is still there.
const RETURN: Duration = Duration::from_secs(1);

/// Makes records of the kernel's events until `stop` turns true, and once more then. From when
/// `replaced` is true they are left to the successor.
pub async fn drain(
    mut events: impl EventSource,
    (recorder, endings): (Recorder, Endings),
    replaced: watch::Receiver<bool>,
    mut stop: watch::Receiver<bool>,
) {
    let mut records = KernelRecords::new(recorder, endings);
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
            turned(events.give_turn());
        }
        let leaves = left.is_some_and(|since| now.saturating_duration_since(since) < RETURN);
        if (last || !leaves) && turned(events.take_turn()) == Some(true) {
            records.refresh(now);
            events.drain(&mut |event| records.report(event));
        }
        if last {
            return;
        }
    }
}

/// Says what went wrong with the turn to read.
fn turned<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Ok(turn) => Some(turn),
        Err(error) => {
            mesh_log::warn_limited!(
                "events",
                &error as &dyn std::error::Error,
                "cannot tell whose turn it is to read the kernel's events"
            );
            None
        }
    }
}

/// Opens the log again at every SIGHUP, for ever.
///
/// # Errors
/// If the signal cannot be listened to.
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
