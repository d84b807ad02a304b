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

use crate::config::FlowLog;
use crate::metrics::Metrics;
use crate::record::{FlowRecord, KernelRecords, Recorder};

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
    /// Hands over the events that wait now.
    fn drain(&mut self, each: &mut dyn FnMut(&Event));
}

/// Events taken at once: about what the ring holds, so that one turn has an end even if the kernel
/// writes as fast as this reads.
const BATCH: usize = 20_000;

impl EventSource for crate::datapath::Events {
    fn drain(&mut self, each: &mut dyn FnMut(&Event)) {
        Self::drain(self, BATCH, |event| each(&event));
    }
}

/// Makes records of the kernel's events until `stop` turns true, and once more then.
pub async fn drain(
    mut events: impl EventSource,
    recorder: Recorder,
    mut stop: watch::Receiver<bool>,
) {
    let mut records = KernelRecords::new(recorder);
    let mut tick = tokio::time::interval(DRAIN_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let last = tokio::select! {
            _ = tick.tick() => false,
            // The sender is gone = the agent is ending.
            _ = stop.wait_for(|stop| *stop) => true,
        };
        records.refresh(Instant::now());
        events.drain(&mut |event| records.report(event));
        if last {
            return;
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
