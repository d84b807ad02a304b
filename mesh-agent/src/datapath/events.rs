// SPDX-License-Identifier: Apache-2.0
//! The ring of events, read by one task.

use aya::maps::{MapData, RingBuf};
use mesh_common::event::Event;
use zerocopy::FromBytes as _;

use super::Error;

/// The kernel programs' reports. Programs never wake the reader: drain it every few milliseconds.
pub struct Events {
    ring: RingBuf<MapData>,
    /// What each hook decided, for the log.
    #[cfg(feature = "trace")]
    decisions: aya_log::EbpfLogger<&'static dyn log::Log>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn take(object: &mut aya::Ebpf) -> Result<Self, Error> {
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
            #[cfg(feature = "trace")]
            decisions,
        })
    }

    /// Hands over what has come since the last call, at most `limit` events; returns how many.
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
