// SPDX-License-Identifier: Apache-2.0
//! Reasons of connections that the agent closes at the socket. The kernel reports such a close as a
//! reset; the reason comes from here.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mesh_common::{Endpoint, Verdict};
use tokio::sync::mpsc;

/// Time after which a reason is dropped; the kernel's event is read long before.
const KEPT: Duration = Duration::from_secs(30);
/// Reasons that wait for their events; more are dropped, and those records say `reset`.
const MAX_WAITING: usize = 65_536;

#[derive(Debug)]
struct Note {
    endpoints: (Endpoint, Endpoint),
    verdict: Verdict,
    at: Instant,
}

/// Reports connections that are about to be closed. Clones share the queue.
#[derive(Clone, Debug)]
pub struct CloseReporter(mpsc::Sender<Note>);

/// Reasons for the reader of kernel events.
#[derive(Debug)]
pub struct CloseReasons {
    news: mpsc::Receiver<Note>,
    /// By both endpoints, the reporting one first.
    waiting: BTreeMap<(Endpoint, Endpoint), (Instant, Verdict)>,
    /// Every note by age, also those that were taken since.
    order: VecDeque<(Instant, (Endpoint, Endpoint))>,
}

/// Creates a queue of close reasons.
#[must_use]
pub fn close_reasons() -> (CloseReporter, CloseReasons) {
    let (sender, news) = mpsc::channel(MAX_WAITING);
    let reasons = CloseReasons {
        news,
        waiting: BTreeMap::new(),
        order: VecDeque::new(),
    };
    (CloseReporter(sender), reasons)
}

impl CloseReporter {
    /// Reports a connection that is about to be closed, and the verdict that refuses it now. Both of its
    /// endpoints may be on this node, so the reason is kept for each.
    pub fn closing(&self, local: Endpoint, remote: Endpoint, verdict: Verdict, at: Instant) {
        for endpoints in [(local, remote), (remote, local)] {
            let note = Note {
                endpoints,
                verdict,
                at,
            };
            if let Err(error) = self.0.try_send(note) {
                tracing::debug!(%error, "close reason lost; the record will say reset");
            }
        }
    }
}

impl CloseReasons {
    /// Drops old reasons.
    pub(super) fn expire(&mut self, now: Instant) {
        self.read();
        let is_old = |at: Instant| now.saturating_duration_since(at) >= KEPT;
        while let Some((at, endpoints)) = self.order.front().copied()
            && is_old(at)
        {
            let _ = self.order.pop_front();
            // A newer reason of the same endpoints stays.
            if self
                .waiting
                .get(&endpoints)
                .is_some_and(|(noted, _)| *noted == at)
            {
                let _ = self.waiting.remove(&endpoints);
            }
        }
    }

    /// Takes the verdict by which the agent closed a connection, if it did.
    pub(super) fn take(&mut self, local: Endpoint, remote: Endpoint) -> Option<Verdict> {
        self.read();
        let (_, verdict) = self.waiting.remove(&(local, remote))?;
        Some(verdict)
    }

    fn read(&mut self) {
        while let Ok(note) = self.news.try_recv() {
            if self.order.len() < MAX_WAITING {
                self.order.push_back((note.at, note.endpoints));
                self.waiting.insert(note.endpoints, (note.at, note.verdict));
            }
        }
    }
}
