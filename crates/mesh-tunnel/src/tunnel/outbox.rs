// SPDX-License-Identifier: Apache-2.0
//! The sending half of a tunnel: reads from the application directly into the slots where records are
//! sealed, and keeps at most one batch that the socket has not taken yet.

use std::io::{self, IoSlice, IoSliceMut};
use std::task::{Context, Poll, ready};

use super::TunnelError;
use crate::buffers::{AdaptiveBufferSize, Buffer, BufferAccount, LARGE_RECORDS, Size};
use crate::carrier::TakeError;
use crate::frame::{self, Control, HEADER, StreamId};
use crate::records::{CONTENT, FULL, HEAD, Kind, RecordSealer};
use crate::socket::Socket;
use crate::tls::PostHandshake;

/// KeyUpdate, `update_not_requested` (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Alert `close_notify` (RFC 8446, 6.1).
const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// The most data that is sent before the reply: one DATA frame in one record.
pub(crate) const MOST_EARLY: usize = CONTENT - HEADER;

/// A sealed batch that waits for the socket.
#[derive(Debug)]
struct Batch {
    buffer: Buffer,
    start: usize,
    end: usize,
}

/// One read of the application, and where it goes.
pub(crate) struct Take<'a> {
    /// The application.
    pub(crate) app: &'a Socket,
    /// The stream that carries it.
    pub(crate) stream: StreamId,
    /// The buffer that keeps a copy.
    pub(crate) copy: Option<&'a mut Vec<u8>>,
}

/// The sending half of a tunnel.
pub(crate) struct Outbox {
    sealer: RecordSealer,
    rekey: bool,
    /// Records that go before the batch: the end of the handshake, a key update.
    ahead: Vec<u8>,
    ahead_sent: usize,
    /// Control frames that go with the next record.
    control: Vec<u8>,
    batch: Option<Batch>,
    next_size: AdaptiveBufferSize,
}

impl Outbox {
    pub(crate) const fn new(sealer: RecordSealer, ahead: Vec<u8>) -> Self {
        Self {
            sealer,
            rekey: false,
            ahead,
            ahead_sent: 0,
            control: Vec::new(),
            batch: None,
            next_size: AdaptiveBufferSize::START,
        }
    }

    /// Queues a control frame for the next record.
    pub(crate) fn queue(&mut self, stream: StreamId, control: &Control) {
        frame::encode(stream, control, &mut self.control);
    }

    /// Requests that our next key is used.
    pub(crate) const fn request_rekey(&mut self) {
        self.rekey = true;
    }

    /// Whether a batch waits for the socket. Nothing more may be sealed then.
    pub(crate) const fn is_blocked(&self) -> bool {
        self.batch.is_some()
    }

    /// Replaces the key if that is due. Call it only between batches: what is sealed under the old key
    /// has to go first.
    fn renew(&mut self, keys: &mut PostHandshake) -> Result<(), TunnelError> {
        debug_assert!(self.batch.is_none());
        if !self.rekey && !self.sealer.worn() {
            return Ok(());
        }
        self.rekey = false;
        self.ahead_record(&KEY_UPDATE, Kind::Handshake)?;
        self.sealer = keys.next_sealer()?;
        Ok(())
    }

    fn ahead_record(&mut self, content: &[u8], kind: Kind) -> Result<(), TunnelError> {
        let mut record = [0; 64];
        record[HEAD..HEAD + content.len()].copy_from_slice(content);
        let length = self.sealer.seal(&mut record, content.len(), kind)?;
        self.ahead.extend_from_slice(&record[..length]);
        Ok(())
    }

    /// Seals the queued control frames, unless a batch waits.
    pub(crate) fn seal_control(
        &mut self,
        keys: &mut PostHandshake,
        buffers: &BufferAccount,
    ) -> Result<(), TunnelError> {
        if self.batch.is_some() || self.control.is_empty() {
            return Ok(());
        }
        self.renew(keys)?;
        let length = self.control.len();
        let mut buffer = buffers.take_as_is(if length <= CONTENT {
            Size::Small
        } else {
            Size::Large
        });
        for (slot, content) in buffer.chunks_mut(FULL).zip(self.control.chunks(CONTENT)) {
            slot[HEAD..HEAD + content.len()].copy_from_slice(content);
        }
        self.control.clear();
        let end = self.seal(&mut buffer, length)?;
        self.batch = Some(Batch {
            buffer,
            start: 0,
            end,
        });
        Ok(())
    }

    /// Queues `data`, at most one record of it, as a DATA frame.
    pub(crate) fn queue_data(&mut self, stream: StreamId, data: &[u8]) {
        self.control
            .extend_from_slice(&frame::data_header(stream, data.len()));
        self.control.extend_from_slice(data);
    }

    /// Reads once from the application and seals what was read as one DATA frame, with the control
    /// frames that wait before it. Returns the number of bytes; 0 if the application has finished.
    pub(crate) fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        keys: &mut PostHandshake,
        buffers: &BufferAccount,
        take: Take<'_>,
    ) -> Poll<Result<usize, TakeError<TunnelError>>> {
        let Take { app, stream, copy } = take;
        debug_assert!(self.batch.is_none());
        let size = match copy {
            None => self.next_size.size(),
            Some(_) => Size::Small,
        };
        let mut buffer = buffers.take(size);
        let prefix = self.control.len() + HEADER;
        let most = (copy.as_ref()).map_or(usize::MAX, |kept| MOST_EARLY - kept.len());
        let (read, room) = match fill(cx, app, &mut buffer, prefix, most) {
            (Poll::Ready(Ok(read)), room) => (read, room),
            (Poll::Ready(Err(error)), _) => {
                buffers.give(buffer);
                return Poll::Ready(Err(TakeError::App(error)));
            }
            (Poll::Pending, _) => {
                buffers.give(buffer);
                return Poll::Pending;
            }
        };
        if read == 0 {
            buffers.give(buffer);
            return Poll::Ready(Ok(0));
        }
        self.next_size.record_read(read, room);
        let waiting = self.control.len();
        buffer[HEAD..HEAD + waiting].copy_from_slice(&self.control);
        buffer[HEAD + waiting..HEAD + prefix].copy_from_slice(&frame::data_header(stream, read));
        self.control.clear();
        if let Some(copy) = copy {
            copy.extend_from_slice(&buffer[HEAD + prefix..HEAD + prefix + read]);
        }
        let end = self
            .renew(keys)
            .and_then(|()| self.seal(&mut buffer, prefix + read))
            .map_err(TakeError::Carrier)?;
        self.batch = Some(Batch {
            buffer,
            start: 0,
            end,
        });
        Poll::Ready(Ok(read))
    }

    /// Seals `content` bytes that lie in consecutive slots. All but the last record are full, so
    /// that they end up without gaps.
    fn seal(&mut self, buffer: &mut [u8], content: usize) -> Result<usize, TunnelError> {
        let mut left = content;
        let mut end = 0;
        for slot in buffer.chunks_mut(FULL) {
            let length = left.min(CONTENT);
            end += self.sealer.seal(slot, length, Kind::Data)?;
            left -= length;
            if left == 0 {
                break;
            }
        }
        debug_assert_eq!(left, 0);
        Ok(end)
    }

    /// Writes until everything that was sealed is sent.
    pub(crate) fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        socket: &Socket,
        buffers: &BufferAccount,
    ) -> Poll<io::Result<()>> {
        loop {
            let ahead = &self.ahead[self.ahead_sent..];
            let batch = self.batch.as_ref();
            let batch = batch.map_or(&[][..], |batch| &batch.buffer[batch.start..batch.end]);
            let length = ahead.len() + batch.len();
            if length == 0 {
                return Poll::Ready(Ok(()));
            }
            let both = [IoSlice::new(ahead), IoSlice::new(batch)];
            let slices = if ahead.is_empty() { &both[1..] } else { &both };
            let written = ready!(socket.poll_write(cx, slices, length))?;
            let of_ahead = written.min(ahead.len());
            self.ahead_sent += of_ahead;
            if self.ahead_sent == self.ahead.len() && self.ahead_sent > 0 {
                self.ahead = Vec::new();
                self.ahead_sent = 0;
            }
            if let Some(batch) = &mut self.batch {
                batch.start += written - of_ahead;
                if batch.start == batch.end
                    && let Some(batch) = self.batch.take()
                {
                    buffers.give(batch.buffer);
                }
            }
        }
    }

    /// Seals the alert `close_notify`. Call it only when no batch waits.
    pub(crate) fn seal_close(&mut self) -> Result<(), TunnelError> {
        debug_assert!(self.batch.is_none());
        self.ahead_record(&CLOSE_NOTIFY, Kind::Alert)
    }

    /// Returns the borrowed buffer.
    pub(crate) fn release(&mut self, buffers: &BufferAccount) {
        if let Some(batch) = self.batch.take() {
            buffers.give(batch.buffer);
        }
    }
}

/// Reads once, at most `most` bytes, into the slots of `buffer`, from `prefix` on, leaving room for
/// the rest of each record. Also returns the number of bytes that there was room for.
fn fill(
    cx: &mut Context<'_>,
    app: &Socket,
    buffer: &mut [u8],
    prefix: usize,
    mut most: usize,
) -> (Poll<io::Result<usize>>, usize) {
    let mut slots: [IoSliceMut<'_>; LARGE_RECORDS] =
        std::array::from_fn(|_| IoSliceMut::new(&mut []));
    let mut used = 0;
    let mut room = 0;
    let mut from = HEAD + prefix;
    for (slot, place) in slots.iter_mut().zip(buffer.chunks_exact_mut(FULL)) {
        let place = &mut place[from..HEAD + CONTENT];
        let length = place.len().min(most);
        let place = &mut place[..length];
        most -= length;
        room += length;
        *slot = IoSliceMut::new(place);
        used += 1;
        from = HEAD;
    }
    (app.poll_read(cx, &mut slots[..used], room), room)
}
