// SPDX-License-Identifier: Apache-2.0
//! A cache of client configurations, each with the TLS sessions of a pair (own, expected).
//!
//! The cache is bounded. The least recently used configuration is evicted, after which the next
//! connection of its pair needs a full handshake.

use std::{collections::BTreeMap, sync::Arc};

use rustls::ClientConfig;

use super::{Epoch, Error, SpiffeId};

/// Maximum number of pairs of identities.
const PAIRS: usize = 1024;

/// The configuration of each pair, for the latest epoch of the pair.
#[derive(Debug, Default)]
pub(super) struct ClientConfigs {
    #[expect(
        clippy::disallowed_types,
        reason = "a cache that every worker reads; held for a look-up, never across an await"
    )]
    kept: std::sync::Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    pairs: BTreeMap<(SpiffeId, SpiffeId), Entry>,
    asked: u64,
}

#[derive(Debug)]
struct Entry {
    config: Arc<ClientConfig>,
    epoch: Epoch,
    asked: u64,
}

impl ClientConfigs {
    /// Returns the configuration of a pair; `make` creates it if there is none of this epoch.
    pub(super) fn get(
        &self,
        own: &SpiffeId,
        expected: &SpiffeId,
        epoch: Epoch,
        make: impl FnOnce() -> Result<Arc<ClientConfig>, rustls::Error>,
    ) -> Result<Arc<ClientConfig>, Error> {
        let mut kept = self
            .kept
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.asked += 1;
        let asked = kept.asked;
        let pair = (own.clone(), expected.clone());
        if let Some(entry) = kept.pairs.get_mut(&pair)
            && entry.epoch == epoch
        {
            entry.asked = asked;
            return Ok(Arc::clone(&entry.config));
        }
        let config = make()?;
        kept.pairs.insert(
            pair,
            Entry {
                config: Arc::clone(&config),
                epoch,
                asked,
            },
        );
        if kept.pairs.len() > PAIRS {
            let oldest = kept.pairs.iter().min_by_key(|(_, entry)| entry.asked);
            if let Some(pair) = oldest.map(|(pair, _)| pair.clone()) {
                kept.pairs.remove(&pair);
            }
        }
        Ok(config)
    }
}
