// SPDX-License-Identifier: Apache-2.0
//! Reads the ring buffer of events, which one task of one agent does at a time.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;

use aya::maps::{MapData, RingBuf};
use mesh_common::event::Event;
use zerocopy::FromBytes as _;

use super::Error;

/// The reader of the events of the kernel programs. Programs do not wake it: call [`Events::drain`] every few
/// milliseconds.
pub struct Events {
    ring: RingBuf<MapData>,
    /// The directory of pins, which the reading agent locks: two readers would report the same events.
    turn: File,
    has_turn: bool,
    /// The log of hook decisions.
    #[cfg(feature = "trace")]
    decisions: aya_log::EbpfLogger<&'static dyn log::Log>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn take(object: &mut aya::Ebpf, pins: &Path) -> Result<Self, Error> {
        let turn = File::open(pins).map_err(|source| Error::Bpffs {
            path: pins.to_owned(),
            source,
        })?;
        let map = object.take_map("EVENTS").ok_or(Error::Missing("EVENTS"))?;
        let ring = RingBuf::try_from(map).map_err(|source| Error::Map {
            action: "open".to_owned(),
            map: "EVENTS",
            source: Box::new(source),
        })?;
        #[cfg(feature = "trace")]
        let decisions =
            aya_log::EbpfLogger::init(object).map_err(|_no_map| Error::Missing("AYA_LOGS"))?;
        Ok(Self {
            ring,
            turn,
            has_turn: false,
            #[cfg(feature = "trace")]
            decisions,
        })
    }

    /// Tries to become the reader; `false` = another agent of this node reads, as during an update.
    ///
    /// # Errors
    /// The lock operation failed.
    pub fn take_turn(&mut self) -> io::Result<bool> {
        if !self.has_turn {
            self.has_turn = match self.turn.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => false,
                Err(TryLockError::Error(error)) => return Err(error),
            };
        }
        Ok(self.has_turn)
    }

    /// Releases the lock, so that another agent can read.
    ///
    /// # Errors
    /// The lock operation failed.
    pub fn give_turn(&mut self) -> io::Result<()> {
        self.has_turn = false;
        self.turn.unlock()
    }

    /// Calls `f` for each new event, at most `limit` of them, and returns their number.
    pub fn drain(&mut self, limit: usize, mut f: impl FnMut(Event)) -> usize {
        #[cfg(feature = "trace")]
        self.decisions.flush();
        let mut count = 0;
        while count < limit {
            let Some(item) = self.ring.next() else {
                break;
            };
            if let Ok(event) = Event::read_from_bytes(&item) {
                f(event);
            }
            count += 1;
        }
        count
    }
}
