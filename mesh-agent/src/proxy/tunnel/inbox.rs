// SPDX-License-Identifier: Apache-2.0
//! The receiving half of a tunnel: many records per read, opened in place, and written to the
//! application from where they lie.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::task::{Context, Poll, ready};

use super::TunnelError;
use super::frame::{Control, Decoder, Event, StreamId};
use crate::proxy::buffers::{Appetite, Buffer, Lender};
use crate::proxy::socket::Socket;
use crate::proxy::tls::Rest;
use crate::proxy::tls::records::{self, Kind, LONGEST, Opener};

/// Pieces of application data that are written by one system call.
const PIECES: usize = 64;

/// Records without data that a peer may send in a row: tickets, key updates, empty ones.
const IDLE_RECORDS: u32 = 32;

/// The longest message after the handshake: a ticket holds the peer's certificates.
const LONGEST_MESSAGE: usize = 64 * 1024;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// The next thing that has arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A control frame. Data before it is among the pieces.
    Control(StreamId, Control),
    /// As much data as can be written at once.
    Full,
    /// Nothing more has arrived.
    Empty,
}

/// What a tunnel has received.
pub(super) struct Inbox {
    opener: Opener,
    buffer: Option<Buffer>,
    /// Received and not yet opened.
    sealed: Range<usize>,
    /// Opened and not yet read as frames.
    plain: Range<usize>,
    /// Data for the application.
    pieces: VecDeque<Range<usize>>,
    decoder: Decoder,
    appetite: Appetite,
    message: Vec<u8>,
    idle_records: u32,
    ended: bool,
}

impl Inbox {
    /// Goes on from what the handshake left: `early` was opened already, `unread` not.
    pub(super) fn new(opener: Opener, early: &[u8], unread: &[u8]) -> Self {
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
            appetite: Appetite::START,
            message: Vec::new(),
            idle_records: 0,
            ended: false,
        }
    }

    /// Whether data waits for the application.
    pub(super) fn has_pieces(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Whether the peer could end the connection here without cutting anything.
    pub(super) fn at_boundary(&self) -> bool {
        self.plain.is_empty() && self.sealed.is_empty() && self.decoder.at_boundary()
    }

    /// Forgets data that nobody will take.
    pub(super) fn discard_pieces(&mut self) {
        self.pieces.clear();
    }

    /// Opens and reads what has arrived, up to the next control frame. Data of `stream` is kept for
    /// [`Inbox::poll_deliver`], that of `late` thrown away, any other an error.
    pub(super) fn next(
        &mut self,
        rest: &mut Rest,
        stream: Option<StreamId>,
        late: Option<StreamId>,
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
                    Some(Event::Data(of, _)) if Some(of) == late => {}
                    Some(Event::Data(..)) => {
                        return Err(TunnelError::Unexpected("data of another stream"));
                    }
                }
            }
            if self.ended {
                return Err(TunnelError::Ended);
            }
            if !self.open_record(rest, &mut rekey)? {
                return Ok(Next::new(Item::Empty, rekey));
            }
        }
    }

    /// Opens the next record, if all of it is there.
    fn open_record(&mut self, rest: &mut Rest, rekey: &mut bool) -> Result<bool, TunnelError> {
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
                self.messages(rest, rekey)?;
            }
        }
        Ok(true)
    }

    /// Messages after the handshake (RFC 8446, 4.6).
    fn messages(&mut self, rest: &mut Rest, rekey: &mut bool) -> Result<(), TunnelError> {
        while let Some((&[kind, a, b, c], body)) = self.message.split_first_chunk() {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > LONGEST_MESSAGE {
                return Err(TunnelError::Unexpected("a long handshake message"));
            }
            let Some(message) = body.get(..length) else {
                return Ok(());
            };
            match kind {
                NEW_SESSION_TICKET => rest.ticket(message)?,
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
                    self.opener = rest.next_opener()?;
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

    /// Reads once from the tunnel's socket. Only after [`Inbox::next`] has said [`Item::Empty`] and
    /// all pieces are delivered.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        socket: &Socket,
        buffers: &Lender,
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
        self.appetite.fed(read, room);
        Poll::Ready(Ok(()))
    }

    /// The buffer with what is left of the last record at its beginning.
    fn make_room(&mut self, buffers: &Lender) -> Buffer {
        let wanted = self.appetite.size();
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
    pub(super) fn poll_deliver(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
        buffers: &Lender,
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

    /// Gives the buffer back once nothing in it is needed.
    pub(super) fn release_if_empty(&mut self, buffers: &Lender) {
        if self.pieces.is_empty()
            && self.plain.is_empty()
            && self.sealed.is_empty()
            && let Some(buffer) = self.buffer.take()
        {
            buffers.give(buffer);
        }
    }

    /// Gives back what is lent.
    pub(super) fn release(&mut self, buffers: &Lender) {
        if let Some(buffer) = self.buffer.take() {
            buffers.give(buffer);
        }
    }
}

/// What [`Inbox::next`] found, and whether the peer asked for our next key on the way.
#[derive(Debug)]
pub(super) struct Next {
    pub(super) item: Item,
    pub(super) rekey: bool,
}

impl Next {
    const fn new(item: Item, rekey: bool) -> Self {
        Self { item, rekey }
    }
}
