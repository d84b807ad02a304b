// SPDX-License-Identifier: Apache-2.0
//! Buffers of one thread, lent to a connection only while it has bytes that wait.
//!
//! An idle connection holds no buffer; a busy one borrows a small one, and large ones once its reads
//! fill small ones. The number of buffers kept for the next borrower is bounded; the others go back to
//! the allocator.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use crate::records::{FULL, LONGEST};

/// Number of full records in a large buffer: 256 KiB of content.
pub const LARGE_RECORDS: usize = 16;

const SMALL: usize = LONGEST + 251;
const LARGE: usize = LARGE_RECORDS * FULL + 512;
const KEEP_SMALL: usize = 64;
const KEEP_LARGE: usize = 8;

const _: () = assert!(SMALL >= FULL && SMALL >= LONGEST);

/// Size of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// One full record.
    Small,
    /// [`LARGE_RECORDS`] full records.
    Large,
}

/// A borrowed buffer.
pub type Buffer = Box<[u8]>;

/// The buffers of one thread.
#[derive(Debug, Default)]
pub struct BufferPool {
    small: RefCell<Vec<Buffer>>,
    large: RefCell<Vec<Buffer>>,
    lent: Cell<usize>,
}

impl BufferPool {
    /// Lends a buffer of this size, with the content that its last borrower left.
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
            // Allocated for data that arrived with the end of the handshake.
            _ => return,
        };
        let mut kept = kept.borrow_mut();
        if kept.len() < most {
            kept.push(buffer);
        }
    }

    /// Bytes that are lent at the moment.
    #[cfg(test)]
    pub fn lent(&self) -> usize {
        self.lent.get()
    }
}

/// The most bytes of one thread that may be lent before connections get small buffers only.
const LARGE_TOTAL: usize = 128 << 20;
/// The most bytes that one account may borrow before its connections get small buffers only.
const LARGE_ACCOUNT: u64 = 32 << 20;

/// Counts the bytes of buffers that a group of connections has borrowed, in all threads.
pub trait BufferUsage: fmt::Debug {
    /// A buffer of this many bytes was lent.
    fn lent(&self, bytes: usize);
    /// A buffer of this many bytes was returned.
    fn returned(&self, bytes: usize);
    /// Bytes that are lent at the moment.
    fn bytes(&self) -> u64;
}

/// An account without a bound.
impl BufferUsage for () {
    fn lent(&self, _bytes: usize) {}

    fn returned(&self, _bytes: usize) {}

    fn bytes(&self) -> u64 {
        0
    }
}

/// Lends buffers of one thread's pool to a group of connections, within the group's bound.
#[derive(Clone, Debug)]
pub struct BufferAccount {
    buffers: Rc<BufferPool>,
    usage: Arc<dyn BufferUsage>,
}

impl BufferAccount {
    /// Makes an account of the group that `usage` counts for.
    #[must_use]
    pub fn new(buffers: Rc<BufferPool>, usage: Arc<dyn BufferUsage>) -> Self {
        Self { buffers, usage }
    }

    /// Lends a buffer of this size, or a small one where large ones are scarce.
    pub fn take(&self, size: Size) -> Buffer {
        let scarce = size == Size::Large
            && (self.buffers.lent.get() + LARGE > LARGE_TOTAL
                || self.usage.bytes() + LARGE as u64 > LARGE_ACCOUNT);
        self.take_as_is(if scarce { Size::Small } else { size })
    }

    /// Lends a buffer of this size without regard to bounds, for content that must fit.
    pub fn take_as_is(&self, size: Size) -> Buffer {
        let buffer = self.buffers.take(size);
        self.usage.lent(buffer.len());
        buffer
    }

    /// Takes a buffer back.
    pub fn give(&self, buffer: Buffer) {
        // Other buffers were allocated for the handshake, and never counted.
        if matches!(buffer.len(), SMALL | LARGE) {
            self.usage.returned(buffer.len());
        }
        self.buffers.give(buffer);
    }
}

/// Chooses the size of the next buffer from how full the last ones were.
#[derive(Clone, Copy, Debug)]
pub struct AdaptiveBufferSize {
    size: Size,
    sparse: u8,
}

/// Number of sparse reads in a row after which a small buffer is enough again.
const SPARSE_READS: u8 = 32;

impl AdaptiveBufferSize {
    /// The initial state: a small buffer.
    pub const START: Self = Self {
        size: Size::Small,
        sparse: 0,
    };

    /// The size to borrow next.
    pub const fn size(self) -> Size {
        self.size
    }

    /// Records a read of `bytes` into a buffer that had room for `room`.
    pub fn record_read(&mut self, bytes: usize, room: usize) {
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
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;

    #[derive(Debug, Default)]
    struct Bytes(AtomicU64);

    impl BufferUsage for Bytes {
        fn lent(&self, bytes: usize) {
            self.0.fetch_add(bytes as u64, Relaxed);
        }

        fn returned(&self, bytes: usize) {
            self.0.fetch_sub(bytes as u64, Relaxed);
        }

        fn bytes(&self) -> u64 {
            self.0.load(Relaxed)
        }
    }

    #[test]
    fn lent_bytes_are_counted_and_kept_buffers_are_bounded() {
        let buffers = BufferPool::default();
        let lent: Vec<_> = (0..100).map(|_| buffers.take(Size::Large)).collect();
        assert_eq!(buffers.lent(), 100 * LARGE);
        lent.into_iter().for_each(|buffer| buffers.give(buffer));
        assert_eq!(buffers.lent(), 0);
        assert_eq!(buffers.large.borrow().len(), KEEP_LARGE);
    }

    #[test]
    fn large_buffers_are_bounded_per_account() {
        let buffers = Rc::<BufferPool>::default();
        let greedy = BufferAccount::new(Rc::clone(&buffers), Arc::<Bytes>::default());
        let other = BufferAccount::new(Rc::clone(&buffers), Arc::<Bytes>::default());
        let most = usize::try_from(LARGE_ACCOUNT).unwrap() / LARGE;
        let mut lent: Vec<_> = (0..most).map(|_| greedy.take(Size::Large)).collect();
        assert!(lent.iter().all(|buffer| buffer.len() == LARGE));
        assert_eq!(greedy.take(Size::Large).len(), SMALL);
        assert_eq!(greedy.take_as_is(Size::Large).len(), LARGE);
        assert_eq!(other.take(Size::Large).len(), LARGE);
        greedy.give(lent.pop().unwrap());
        lent.into_iter().for_each(|buffer| greedy.give(buffer));
        // The buffers that the assertions above keep.
        assert_eq!(greedy.usage.bytes(), (SMALL + LARGE) as u64);
        assert_eq!(greedy.take(Size::Large).len(), LARGE);
    }

    #[test]
    fn buffer_size_grows_with_full_reads_and_shrinks_after_sparse_ones() {
        let mut next_size = AdaptiveBufferSize::START;
        next_size.record_read(100, SMALL);
        assert_eq!(next_size.size(), Size::Small);
        next_size.record_read(SMALL, SMALL);
        assert_eq!(next_size.size(), Size::Large);
        for _ in 1..SPARSE_READS {
            next_size.record_read(100, LARGE);
        }
        assert_eq!(next_size.size(), Size::Large);
        next_size.record_read(100, LARGE);
        assert_eq!(next_size.size(), Size::Small);
    }
}
