// SPDX-License-Identifier: Apache-2.0
//! Connections that the agent ends at the socket. The kernel reports their end as a reset: what is
//! noted here tells why.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mesh_common::{Endpoint, Verdict};
use tokio::sync::mpsc;

/// The kernel's report is read long before.
const KEPT: Duration = Duration::from_secs(30);
/// Notes that wait for their reports; more are thrown away, and those records say `reset`.
const MOST: usize = 65_536;

#[derive(Debug)]
struct Note {
    ends: (Endpoint, Endpoint),
    verdict: Verdict,
    at: Instant,
}

/// Where who ends connections notes them. Clones share it.
#[derive(Clone, Debug)]
pub struct Ended(mpsc::Sender<Note>);

/// Notes for who reads the kernel's reports.
#[derive(Debug)]
pub struct Endings {
    news: mpsc::Receiver<Note>,
    /// By both ends, the reporting one first.
    waiting: BTreeMap<(Endpoint, Endpoint), (Instant, Verdict)>,
    /// When which was noted, in that order; also those that were taken since.
    order: VecDeque<(Instant, (Endpoint, Endpoint))>,
}

/// Both ends of what is noted.
#[must_use]
pub fn endings() -> (Ended, Endings) {
    let (sender, news) = mpsc::channel(MOST);
    let endings = Endings {
        news,
        waiting: BTreeMap::new(),
        order: VecDeque::new(),
    };
    (Ended(sender), endings)
}

impl Ended {
    /// Notes a connection that is about to be ended, and what refuses it now. Where both ends are of
    /// this node, both are reported.
    pub fn note(&self, local: Endpoint, remote: Endpoint, verdict: Verdict, at: Instant) {
        for ends in [(local, remote), (remote, local)] {
            if let Err(error) = self.0.try_send(Note { ends, verdict, at }) {
                tracing::debug!(%error, "nobody reads the kernel's reports: a record will say reset");
            }
        }
    }
}

impl Endings {
    /// Forgets what was noted long ago.
    pub(super) fn forget(&mut self, now: Instant) {
        self.read();
        let is_old = |at: Instant| now.saturating_duration_since(at) >= KEPT;
        while let Some((at, ends)) = self.order.front().copied()
            && is_old(at)
        {
            let _ = self.order.pop_front();
            // The same ends may have been noted again.
            if self
                .waiting
                .get(&ends)
                .is_some_and(|(noted, _)| *noted == at)
            {
                let _ = self.waiting.remove(&ends);
            }
        }
    }

    /// What an end that was reset was ended by, if it was.
    pub(super) fn take(&mut self, local: Endpoint, remote: Endpoint) -> Option<Verdict> {
        self.read();
        let (_, verdict) = self.waiting.remove(&(local, remote))?;
        Some(verdict)
    }

    fn read(&mut self) {
        while let Ok(note) = self.news.try_recv() {
            if self.order.len() < MOST {
                self.order.push_back((note.at, note.ends));
                self.waiting.insert(note.ends, (note.at, note.verdict));
            }
        }
    }
}
