// SPDX-License-Identifier: Apache-2.0
//! A bounded number of connections that is shared fairly between the sources of the connections.
//!
//! A server that takes connections from anybody runs out of places when one client opens many of them. When no
//! place is free, [`Places`] ends a connection that has proven nothing yet, of the source that has the most. So a
//! client that is slow, or sends nothing, loses its own connections and not those of others.

use std::collections::BTreeMap;
use std::net::IpAddr;
#[expect(
    clippy::disallowed_types,
    reason = "every connection takes and returns its place, and holds the lock for that alone"
)]
use std::sync::Mutex;
use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The connections of a server.
#[expect(clippy::disallowed_types, reason = "see the import")]
#[derive(Clone, Debug)]
pub struct Places {
    max: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    /// The connections by source; no source is without one.
    sources: BTreeMap<Option<IpAddr>, Source>,
    /// Number of all connections.
    total: usize,
    /// Number of the next connection.
    next: u64,
}

/// The connections of one source by number: an older one has a smaller number. The values tell them to end.
#[derive(Debug, Default)]
struct Source {
    unproven: BTreeMap<u64, Arc<Notify>>,
    proven: BTreeMap<u64, Arc<Notify>>,
}

impl Source {
    fn len(&self) -> usize {
        self.unproven.len() + self.proven.len()
    }
}

impl Taken {
    /// Ends a connection so that one of `source` gets its place: of those that have proven nothing, or else of
    /// those of a source that has more than `source`, the oldest of the source that has the most. Returns `false`
    /// if there is none.
    fn make_room(&mut self, source: Option<IpAddr>) -> bool {
        let own = self.sources.get(&source).map_or(0, Source::len);
        let oldest = |map: &BTreeMap<u64, _>| map.first_key_value().map(|(number, _)| *number);
        let most = |first: fn(&Source) -> &BTreeMap<u64, Arc<Notify>>| {
            let all = self.sources.iter();
            let all =
                all.filter_map(|(key, source)| Some((source.len(), *key, oldest(first(source))?)));
            all.max_by_key(|(len, ..)| *len)
        };
        let greedy = || most(|source| &source.proven).filter(|(len, ..)| *len > own);
        let Some((_, key, number)) = most(|source| &source.unproven).or_else(greedy) else {
            return false;
        };
        if let Some(end) = self.remove(key, number) {
            end.notify_one();
        }
        true
    }

    fn remove(&mut self, key: Option<IpAddr>, number: u64) -> Option<Arc<Notify>> {
        let source = self.sources.get_mut(&key)?;
        let removed = source.unproven.remove(&number);
        let removed = removed.or_else(|| source.proven.remove(&number))?;
        if source.len() == 0 {
            self.sources.remove(&key);
        }
        self.total -= 1;
        Some(removed)
    }
}

impl Places {
    /// Creates `max` places.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            max,
            taken: Arc::default(),
        }
    }

    /// Takes a place for a new connection; `source` is `None` for clients without an address. If no place is free,
    /// another connection is told to end. Returns `None` if the new connection is the one to close: the others have
    /// proven themselves, and no source has more of them.
    #[must_use]
    pub fn take(&self, source: Option<IpAddr>) -> Option<Place> {
        let source = source.map(|ip| ip.to_canonical());
        let mut taken = self.lock();
        if taken.total >= self.max && !taken.make_room(source) {
            return None;
        }
        let number = taken.next;
        taken.next += 1;
        taken.total += 1;
        let end = Arc::new(Notify::new());
        let entry = taken.sources.entry(source).or_default();
        entry.unproven.insert(number, Arc::clone(&end));
        Some(Place {
            number,
            source,
            end,
            places: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one connection, which is free again after the drop.
#[derive(Debug)]
pub struct Place {
    number: u64,
    source: Option<IpAddr>,
    end: Arc<Notify>,
    places: Places,
}

impl Place {
    /// Notes that the client has proven that it may use the server, for example by a complete request.
    pub fn prove(&self) {
        let mut taken = self.places.lock();
        if let Some(source) = taken.sources.get_mut(&self.source)
            && let Some(end) = source.unproven.remove(&self.number)
        {
            source.proven.insert(self.number, end);
        }
    }

    /// Returns `true` after [`Self::prove`], while the connection has its place.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        let taken = self.places.lock();
        let source = taken.sources.get(&self.source);
        source.is_some_and(|source| source.proven.contains_key(&self.number))
    }

    /// Waits until another connection gets the place; the connection has to end then. Only one task may wait.
    pub async fn lost(&self) {
        self.end.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.remove(self.source, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn is_lost(place: &Place) -> bool {
        let taken = place.places.lock();
        let has = |source: &Source| {
            source.unproven.contains_key(&place.number) || source.proven.contains_key(&place.number)
        };
        !taken.sources.values().any(has)
    }

    #[test]
    fn source_with_the_most_unproven_connections_loses_its_oldest() {
        let places = Places::new(4);
        let flood: Vec<Place> = (0..3).map(|_| places.take(source(1)).unwrap()).collect();
        let other = places.take(source(2)).unwrap();
        let new = places.take(source(3)).unwrap();
        assert!(is_lost(&flood[0]) && !is_lost(&flood[1]) && !is_lost(&other) && !is_lost(&new));
        // A source that has the most loses its own.
        let newest = places.take(source(1)).unwrap();
        assert!(is_lost(&flood[1]) && !is_lost(&newest) && !is_lost(&other));
    }

    #[test]
    fn proven_connection_outlasts_unproven_ones() {
        let places = Places::new(3);
        let proven: Vec<Place> = (0..2).map(|_| places.take(source(1)).unwrap()).collect();
        proven.iter().for_each(Place::prove);
        let mut last = places.take(source(2)).unwrap();
        for _ in 0..10 {
            let next = places.take(source(2)).unwrap();
            assert!(is_lost(&last));
            last = next;
        }
        assert!(
            proven
                .iter()
                .all(|place| !is_lost(place) && place.is_proven())
        );
        assert!(!last.is_proven());
    }

    #[test]
    fn no_source_keeps_all_places_by_proven_connections() {
        let places = Places::new(2);
        let first = places.take(source(1)).unwrap();
        let second = places.take(source(1)).unwrap();
        first.prove();
        second.prove();
        assert!(places.take(source(1)).is_none(), "no more than it has");
        let other = places.take(source(2)).unwrap();
        other.prove();
        assert!(is_lost(&first) && !is_lost(&second));
        assert!(
            places.take(source(2)).is_none(),
            "the places are shared evenly"
        );
    }

    #[test]
    fn dropped_place_is_free_again() {
        let places = Places::new(1);
        let first = places.take(None).unwrap();
        first.prove();
        assert!(places.take(None).is_none());
        drop(first);
        assert!(places.take(source(1)).is_some());
        let taken = places.lock();
        assert!(taken.sources.is_empty() && taken.total == 0);
    }

    #[tokio::test]
    async fn lost_place_tells_its_connection() {
        let places = Places::new(1);
        let first = places.take(source(1)).unwrap();
        let _second = places.take(source(2)).unwrap();
        first.lost().await;
    }
}
