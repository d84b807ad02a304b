// SPDX-License-Identifier: Apache-2.0
//! The receiving half of a tunnel: reads many records at once, decrypts them in place, and writes them to
//! the application without a copy.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::task::{Context, Poll, ready};

use super::TunnelError;
use crate::buffers::{AdaptiveBufferSize, Buffer, BufferAccount};
use crate::frame::{Control, Decoder, Event, StreamId};
use crate::records::{self, Kind, LONGEST, RecordOpener};
use crate::socket::Socket;
use crate::tls::PostHandshake;

/// The most pieces of application data that one system call writes.
const PIECES: usize = 64;

/// The most records without data that a peer may send in a row: tickets, key updates, empty ones.
const IDLE_RECORDS: u32 = 32;

/// The longest message after the handshake: a ticket holds the peer's certificates.
const LONGEST_MESSAGE: usize = 64 * 1024;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// The next item among what has arrived.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A control frame. Data before it is among the pieces.
    Control(StreamId, Control),
    /// The largest slice of data that can be written at once.
    Full,
    /// Nothing more has arrived.
    Empty,
}

/// The receiving half of a tunnel.
pub(crate) struct Inbox {
    opener: RecordOpener,
    buffer: Option<Buffer>,
    /// Received and not yet decrypted.
    sealed: Range<usize>,
    /// Decrypted and not yet parsed.
    plain: Range<usize>,
    /// Data for the application.
    pieces: VecDeque<Range<usize>>,
    decoder: Decoder,
    next_size: AdaptiveBufferSize,
    message: Vec<u8>,
    idle_records: u32,
    ended: bool,
}

impl Inbox {
    /// Continues with what the handshake received: `early` is decrypted already, `unread` is not.
    pub(crate) fn new(opener: RecordOpener, early: &[u8], unread: &[u8]) -> Self {
        let length = early.len() + unread.len();
        let buffer = (length > 0).then(|| {
            let mut first = Vec::with_capacity(length.max(2 * LONGEST));
            first.extend_from_slice(early);
            first.extend_from_slice(unread);
            first.resize(first.capacity(), 0);
            first.into_boxed_slice()
        });
        Self {
            opener,
            buffer,
            sealed: early.len()..length,
            plain: 0..early.len(),
            pieces: VecDeque::new(),
            decoder: Decoder::default(),
            next_size: AdaptiveBufferSize::START,
            message: Vec::new(),
            idle_records: 0,
            ended: false,
        }
    }

    /// Whether data waits for the application.
    pub(crate) fn has_pieces(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Whether the peer could end the connection here without cutting anything.
    pub(crate) fn at_boundary(&self) -> bool {
        self.plain.is_empty() && self.sealed.is_empty() && self.decoder.at_boundary()
    }

    /// Discards data that the application will not take.
    pub(crate) fn discard_pieces(&mut self) {
        self.pieces.clear();
    }

    /// Decrypts and parses what has arrived, up to the next control frame. Data of `stream` is kept for
    /// [`Inbox::poll_deliver`], data of `refused` is discarded, data of any other stream is an error.
    pub(crate) fn next(
        &mut self,
        keys: &mut PostHandshake,
        stream: Option<StreamId>,
        refused: Option<StreamId>,
    ) -> Result<Next, TunnelError> {
        let mut rekey = false;
        loop {
            while !self.plain.is_empty() {
                if self.pieces.len() == PIECES {
                    return Ok(Next::new(Item::Full, rekey));
                }
                let buffer = self.buffer.as_ref().ok_or(TunnelError::Lost)?;
                let step = self.decoder.step(&buffer[self.plain.clone()])?;
                self.plain.start += step.used;
                match step.event {
                    None => {}
                    Some(Event::Control(of, control)) => {
                        return Ok(Next::new(Item::Control(of, control), rekey));
                    }
                    Some(Event::Data(of, length)) if Some(of) == stream => {
                        let end = self.plain.start;
                        self.pieces.push_back(end - length..end);
                    }
                    Some(Event::Data(of, _)) if Some(of) == refused => {}
                    Some(Event::Data(..)) => {
                        return Err(TunnelError::Unexpected("data of another stream"));
                    }
                }
            }
            if self.ended {
                return Err(TunnelError::Closed);
            }
            if !self.open_record(keys, &mut rekey)? {
                return Ok(Next::new(Item::Empty, rekey));
            }
        }
    }

    /// Decrypts the next record, if all of it has arrived.
    fn open_record(
        &mut self,
        keys: &mut PostHandshake,
        rekey: &mut bool,
    ) -> Result<bool, TunnelError> {
        let Some(buffer) = &mut self.buffer else {
            return Ok(false);
        };
        let arrived = &mut buffer[self.sealed.clone()];
        let Some(length) = records::length(arrived)? else {
            return Ok(false);
        };
        let Some(record) = arrived.get_mut(..length) else {
            return Ok(false);
        };
        let (kind, content) = self.opener.open(record)?;
        let begin = self.sealed.start;
        self.sealed.start += length;
        let content = begin + content.start..begin + content.end;
        if kind == Kind::Data && !content.is_empty() {
            self.idle_records = 0;
            self.plain = content;
            return Ok(true);
        }
        self.idle_records += 1;
        if self.idle_records > IDLE_RECORDS {
            return Err(TunnelError::Unexpected("too many records without data"));
        }
        match kind {
            Kind::Data => {}
            Kind::Alert => match buffer[content] {
                [_, 0] => self.ended = true,
                [_, alert] => return Err(TunnelError::Alert(alert)),
                _ => return Err(TunnelError::Unexpected("a malformed alert")),
            },
            Kind::Handshake => {
                self.message.extend_from_slice(&buffer[content]);
                self.messages(keys, rekey)?;
            }
        }
        Ok(true)
    }

    /// Handles messages after the handshake (RFC 8446, 4.6).
    fn messages(&mut self, keys: &mut PostHandshake, rekey: &mut bool) -> Result<(), TunnelError> {
        while let Some((&[kind, a, b, c], body)) = self.message.split_first_chunk() {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > LONGEST_MESSAGE {
                return Err(TunnelError::Unexpected("a long handshake message"));
            }
            let Some(message) = body.get(..length) else {
                return Ok(());
            };
            match kind {
                NEW_SESSION_TICKET => keys.ticket(message)?,
                KEY_UPDATE => {
                    *rekey |= match message {
                        [0] => false,
                        [1] => true,
                        _ => return Err(TunnelError::Unexpected("a malformed key update")),
                    };
                    // Nothing under the old key may follow it (RFC 8446, 5.1).
                    if body.len() != length {
                        return Err(TunnelError::Unexpected("a message behind a key update"));
                    }
                    self.opener = keys.next_opener()?;
                }
                _ => return Err(TunnelError::Unexpected("a handshake message")),
            }
            self.message.drain(..4 + length);
        }
        if self.message.is_empty() {
            self.message = Vec::new();
        }
        Ok(())
    }

    /// Reads once from the tunnel's socket. Call it only after [`Inbox::next`] has returned
    /// [`Item::Empty`] and all pieces are delivered.
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        socket: &Socket,
        buffers: &BufferAccount,
    ) -> Poll<Result<(), TunnelError>> {
        debug_assert!(self.plain.is_empty() && self.pieces.is_empty());
        let mut buffer = self.make_room(buffers);
        let room = buffer.len() - self.sealed.end;
        let mut place = [IoSliceMut::new(&mut buffer[self.sealed.end..])];
        let read = socket.poll_read(cx, &mut place, room);
        if self.sealed.is_empty() && !matches!(read, Poll::Ready(Ok(1..))) {
            buffers.give(buffer);
        } else {
            self.buffer = Some(buffer);
        }
        let read = ready!(read)?;
        if read == 0 {
            return Poll::Ready(Err(TunnelError::Cut));
        }
        self.sealed.end += read;
        self.next_size.record_read(read, room);
        Poll::Ready(Ok(()))
    }

    /// Returns a buffer with the rest of the last record at its beginning.
    fn make_room(&mut self, buffers: &BufferAccount) -> Buffer {
        let wanted = self.next_size.size();
        let left = self.sealed.len();
        let Some(mut old) = self.buffer.take() else {
            self.sealed = 0..0;
            return buffers.take(wanted);
        };
        let sealed = std::mem::replace(&mut self.sealed, 0..left);
        let mut new = buffers.take(wanted);
        if new.len() > old.len() {
            new[..left].copy_from_slice(&old[sealed]);
            buffers.give(old);
            return new;
        }
        buffers.give(new);
        old.copy_within(sealed, 0);
        old
    }

    /// Writes pieces to the application; returns how many bytes it took.
    pub(crate) fn poll_deliver(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
        buffers: &BufferAccount,
    ) -> Poll<io::Result<usize>> {
        let Some(buffer) = &self.buffer else {
            return Poll::Ready(Ok(0));
        };
        let mut slices: [IoSlice<'_>; PIECES] = std::array::from_fn(|_| IoSlice::new(&[]));
        let mut length = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(&buffer[piece.clone()]);
            length += piece.len();
        }
        let slices = &slices[..self.pieces.len().min(PIECES)];
        let written = ready!(app.poll_write(cx, slices, length))?;
        let mut left = written;
        while let Some(piece) = self.pieces.front_mut() {
            if left < piece.len() {
                piece.start += left;
                break;
            }
            left -= piece.len();
            self.pieces.pop_front();
        }
        self.release_if_empty(buffers);
        Poll::Ready(Ok(written))
    }

    /// Returns the buffer once nothing in it is needed.
    pub(crate) fn release_if_empty(&mut self, buffers: &BufferAccount) {
        if self.pieces.is_empty()
            && self.plain.is_empty()
            && self.sealed.is_empty()
            && let Some(buffer) = self.buffer.take()
        {
            buffers.give(buffer);
        }
    }

    /// Returns the borrowed buffer.
    pub(crate) fn release(&mut self, buffers: &BufferAccount) {
        if let Some(buffer) = self.buffer.take() {
            buffers.give(buffer);
        }
    }
}

/// The result of [`Inbox::next`], and whether the peer asked for our next key on the way.
#[derive(Debug)]
pub(crate) struct Next {
    pub(crate) item: Item,
    pub(crate) rekey: bool,
}

impl Next {
    const fn new(item: Item, rekey: bool) -> Self {
        Self { item, rekey }
    }
}
