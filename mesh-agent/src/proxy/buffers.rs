// SPDX-License-Identifier: Apache-2.0
//! Buffers of one worker, lent to a connection only while it has bytes that wait.
//!
//! An idle connection holds none; a busy one is lent a small one, and large ones once its reads
//! fill small ones. What is kept for the next borrower is bounded; the rest goes back to the
//! allocator.

use std::cell::{Cell, RefCell};

use super::tls::records::{FULL, LONGEST};

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
    /// Lends a buffer; its content is what the last borrower left.
    pub(crate) fn take(&self, size: Size) -> Buffer {
        let (kept, bytes) = match size {
            Size::Small => (&self.small, SMALL),
            Size::Large => (&self.large, LARGE),
        };
        self.lent.set(self.lent.get() + bytes);
        let kept = kept.borrow_mut().pop();
        kept.unwrap_or_else(|| vec![0; bytes].into_boxed_slice())
    }

    /// Takes a buffer back.
    pub(crate) fn give(&self, buffer: Buffer) {
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
