// SPDX-License-Identifier: Apache-2.0
//! Buffers of one worker, lent to a connection only while it has bytes that wait.
//!
//! An idle connection holds none; a busy one is lent a small one, and large ones once its reads
//! fill small ones. What is kept for the next borrower is bounded; the rest goes back to the
//! allocator.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::tls::records::{FULL, LONGEST};
use mesh_telemetry::metrics::Usage;

/// Full records in a large buffer: 256 KiB of content.
pub(crate) const LARGE_RECORDS: usize = 16;

const SMALL: usize = LONGEST + 251;
const LARGE: usize = LARGE_RECORDS * FULL + 512;
const KEEP_SMALL: usize = 64;
const KEEP_LARGE: usize = 8;

const _: () = assert!(SMALL >= FULL && SMALL >= LONGEST);

/// Which size a connection needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// One full record.
    Small,
    /// [`LARGE_RECORDS`] full records.
    Large,
}

/// A lent buffer.
pub(crate) type Buffer = Box<[u8]>;

/// The buffers of one worker.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    small: RefCell<Vec<Buffer>>,
    large: RefCell<Vec<Buffer>>,
    lent: Cell<usize>,
}

impl Buffers {
    /// Lends a buffer of this size; its content is what the last borrower left.
    fn take(&self, size: Size) -> Buffer {
        let (kept, bytes) = match size {
            Size::Small => (&self.small, SMALL),
            Size::Large => (&self.large, LARGE),
        };
        self.lent.set(self.lent.get() + bytes);
        let kept = kept.borrow_mut().pop();
        kept.unwrap_or_else(|| vec![0; bytes].into_boxed_slice())
    }

    /// Takes a buffer back.
    fn give(&self, buffer: Buffer) {
        self.lent.set(self.lent.get().saturating_sub(buffer.len()));
        let (kept, most) = match buffer.len() {
            LARGE => (&self.large, KEEP_LARGE),
            SMALL => (&self.small, KEEP_SMALL),
            // Made by the handshake, for what came with its end.
            _ => return,
        };
        let mut kept = kept.borrow_mut();
        if kept.len() < most {
            kept.push(buffer);
        }
    }

    /// Bytes that connections hold at the moment.
    #[cfg(test)]
    pub(crate) fn lent(&self) -> usize {
        self.lent.get()
    }
}

/// Large buffers of one worker, all together: beyond that connections get small ones.
const LARGE_TOTAL: usize = 128 << 20;
/// The same of the pods of one workload.
const LARGE_WORKLOAD: u64 = 32 << 20;

/// Lends buffers to the connections of a pod, and counts what they have.
#[derive(Clone, Debug)]
pub(crate) struct Lender {
    buffers: Rc<Buffers>,
    usage: Arc<Usage>,
}

impl Lender {
    /// From these buffers, for whom `usage` counts.
    pub(crate) const fn new(buffers: Rc<Buffers>, usage: Arc<Usage>) -> Self {
        Self { buffers, usage }
    }

    /// Lends a buffer of this size, or a small one where large ones are scarce.
    pub(crate) fn take(&self, size: Size) -> Buffer {
        let scarce = size == Size::Large
            && (self.buffers.lent.get() + LARGE > LARGE_TOTAL
                || self.usage.buffers() + LARGE as u64 > LARGE_WORKLOAD);
        self.take_as_is(if scarce { Size::Small } else { size })
    }

    /// Lends a buffer of this size in any case: for what has to be whole.
    pub(crate) fn take_as_is(&self, size: Size) -> Buffer {
        let buffer = self.buffers.take(size);
        self.usage.lent(buffer.len());
        buffer
    }

    /// Takes a buffer back.
    pub(crate) fn give(&self, buffer: Buffer) {
        // Others were made by the handshake, and never counted.
        if matches!(buffer.len(), SMALL | LARGE) {
            self.usage.gave_back(buffer.len());
        }
        self.buffers.give(buffer);
    }
}

/// Chooses the size of the next buffer by how full the last ones were.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Appetite {
    size: Size,
    sparse: u8,
}

/// Reads in a row that a small buffer would have held, after which it is enough again.
const SPARSE_READS: u8 = 32;

impl Appetite {
    /// Of a connection that has read nothing yet.
    pub(crate) const START: Self = Self {
        size: Size::Small,
        sparse: 0,
    };

    /// The size to take.
    pub(crate) const fn size(self) -> Size {
        self.size
    }

    /// Learns from a read of `bytes` into a buffer that had room for `room`.
    pub(crate) fn fed(&mut self, bytes: usize, room: usize) {
        if bytes == room {
            *self = Self {
                size: Size::Large,
                sparse: 0,
            };
        } else if bytes > SMALL / 2 {
            self.sparse = 0;
        } else if self.size == Size::Large {
            self.sparse += 1;
            if self.sparse == SPARSE_READS {
                *self = Self::START;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_is_counted_and_what_is_kept_is_bounded() {
        let buffers = Buffers::default();
        let lent: Vec<_> = (0..100).map(|_| buffers.take(Size::Large)).collect();
        assert_eq!(buffers.lent(), 100 * LARGE);
        lent.into_iter().for_each(|buffer| buffers.give(buffer));
        assert_eq!(buffers.lent(), 0);
        assert_eq!(buffers.large.borrow().len(), KEEP_LARGE);
    }

    #[test]
    fn large_buffers_are_scarce_for_who_has_many_and_not_for_others() {
        let buffers = Rc::<Buffers>::default();
        let greedy = Lender::new(Rc::clone(&buffers), Arc::default());
        let other = Lender::new(Rc::clone(&buffers), Arc::default());
        let most = usize::try_from(LARGE_WORKLOAD).unwrap() / LARGE;
        let mut lent: Vec<_> = (0..most).map(|_| greedy.take(Size::Large)).collect();
        assert!(lent.iter().all(|buffer| buffer.len() == LARGE));
        assert_eq!(greedy.take(Size::Large).len(), SMALL);
        assert_eq!(greedy.take_as_is(Size::Large).len(), LARGE);
        assert_eq!(other.take(Size::Large).len(), LARGE);
        greedy.give(lent.pop().unwrap());
        lent.into_iter().for_each(|buffer| greedy.give(buffer));
        // The three that the assertions above have kept.
        assert_eq!(greedy.usage.buffers(), (SMALL + LARGE) as u64);
        assert_eq!(greedy.take(Size::Large).len(), LARGE);
    }

    #[test]
    fn appetite_grows_with_full_reads_and_shrinks_after_many_sparse_ones() {
        let mut appetite = Appetite::START;
        appetite.fed(100, SMALL);
        assert_eq!(appetite.size(), Size::Small);
        appetite.fed(SMALL, SMALL);
        assert_eq!(appetite.size(), Size::Large);
        for _ in 1..SPARSE_READS {
            appetite.fed(100, LARGE);
        }
        assert_eq!(appetite.size(), Size::Large);
        appetite.fed(100, LARGE);
        assert_eq!(appetite.size(), Size::Small);
    }
}
