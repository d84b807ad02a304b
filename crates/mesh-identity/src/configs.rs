// SPDX-License-Identifier: Apache-2.0
//! Client configurations that are kept, each with the sessions of its one (own, expected).
//!
//! Bounded: of too many the one that was asked for longest ago is forgotten, which costs its
//! next connection a full handshake.

use std::{collections::BTreeMap, sync::Arc};

use rustls::ClientConfig;

use super::{Epoch, Error, SpiffeId};

/// Pairs of identities that are remembered.
const PAIRS: usize = 1024;

/// The configurations; one for each pair, of the pair's latest epoch.
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
    /// The configuration of a pair, from `make` if there is none of this epoch.
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
