// SPDX-License-Identifier: Apache-2.0
//! A tunnel: one TLS connection that carries one application connection at a time, in the frames of
//! `mesh/1` (`docs/tunnel.md`).
//!
//! ```text
//! application -> outbox (read, frame, seal) -> tunnel's socket
//! tunnel's socket -> inbox (open, read frames) -> application
//! ```
//! This module moves bytes and keeps the streams of one tunnel apart. Who may use it, and for what,
//! is decided by those who hold it; back-pressure is TCP's: nothing is read while what was read
//! before has not been taken.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use self::frame::{Control, FrameError, StreamId};
use self::inbox::{Inbox, Item};
use self::outbox::Outbox;
pub(crate) use self::outbox::{MOST_EARLY, TakeError};
use super::buffers::Lender;
use super::socket::Socket;
use super::tls::records::RecordError;
use super::tls::{HandshakeError, Rest, Secured};

pub mod frame;
mod inbox;
mod outbox;

/// How long a tunnel that is being closed may take to send its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a tunnel cannot be used any longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelError {
    /// Its socket failed.
    #[error("the tunnel's connection failed")]
    Io(#[from] io::Error),
    /// The peer closed it in order.
    #[error("the peer closed the tunnel")]
    Ended,
    /// It ended without the peer having said so.
    #[error("the tunnel was cut")]
    Cut,
    /// The peer ended it with an alert.
    #[error("the peer ended the tunnel with TLS alert {0}")]
    Alert(u8),
    /// A record is wrong.
    #[error("a TLS record is wrong")]
    Record(#[from] RecordError),
    /// A key or ticket is wrong.
    #[error("a TLS message is wrong")]
    Keys(#[from] HandshakeError),
    /// A frame is wrong.
    #[error("a frame is wrong")]
    Frame(#[from] FrameError),
    /// Something that may not come now.
    #[error("the peer sent {0} where it may not")]
    Unexpected(&'static str),
    /// What was received is no longer there: a mistake of ours.
    #[error("received data was lost")]
    Lost,
}

impl TunnelError {
    /// Whether the peer broke the protocol, rather than the connection breaking.
    pub(crate) const fn is_violation(&self) -> bool {
        match self {
            Self::Io(_) | Self::Ended | Self::Cut | Self::Alert(_) => false,
            Self::Record(_) | Self::Keys(_) | Self::Frame(_) | Self::Unexpected(_) | Self::Lost => {
                true
            }
        }
    }
}

/// A tunnel.
pub(crate) struct Tunnel {
    socket: Rc<Socket>,
    rest: Rest,
    buffers: Lender,
    outbox: Outbox,
    inbox: Inbox,
    /// The stream that is open.
    stream: Option<StreamId>,
    /// The last stream that was opened.
    last: StreamId,
    /// A stream that was refused: what was under way for it is thrown away.
    late: Option<StreamId>,
    retransmits: u32,
}

/// The next thing from the peer, as the relay sees it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// A control frame of the stream that is open, or an OPEN.
    Control(StreamId, Control),
    /// Data, which is to be delivered first.
    Data,
    /// Nothing yet.
    Nothing,
}

impl Tunnel {
    /// A tunnel on a connection that has just been secured.
    pub(crate) fn new(socket: Socket, secured: Secured, buffers: Lender) -> Self {
        Self {
            outbox: Outbox::new(secured.sealer, secured.unsent),
            inbox: Inbox::new(secured.opener, &secured.early, &secured.unread),
            rest: secured.rest,
            retransmits: 0,
            socket: Rc::new(socket),
            buffers,
            stream: None,
            last: 0,
            late: None,
        }
    }

    /// Begins the next stream as the opener; `None` when numbers have run out.
    pub(crate) fn begin(&mut self) -> Option<StreamId> {
        let stream = self.last.checked_add(1)?;
        self.accept(stream).ok()?;
        Some(stream)
    }

    /// Begins a stream that the peer opened: always the next one.
    pub(crate) fn accept(&mut self, stream: StreamId) -> Result<(), TunnelError> {
        if self.stream.is_some() || self.last.checked_add(1) != Some(stream) {
            return Err(TunnelError::Unexpected("an OPEN"));
        }
        self.stream = Some(stream);
        self.last = stream;
        self.late = None;
        Ok(())
    }

    /// Ends the open stream: nothing of it may arrive any more.
    pub(crate) fn end(&mut self) {
        self.stream = None;
        self.inbox.discard_pieces();
    }

    /// Ends the open stream, of which something may still be under way.
    pub(crate) fn refuse(&mut self) {
        self.late = self.stream.take();
        self.inbox.discard_pieces();
    }

    /// The number of streams that were begun.
    pub(crate) const fn streams(&self) -> StreamId {
        self.last
    }

    /// Keeps a control frame for the next record.
    pub(crate) fn queue(&mut self, stream: StreamId, control: &Control) {
        self.outbox.queue(stream, control);
    }

    /// Keeps data, at most one record of it, for the next record.
    pub(crate) fn queue_data(&mut self, stream: StreamId, data: &[u8]) {
        self.outbox.queue_data(stream, data);
    }

    /// Sends what waits.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        loop {
            ready!(self.outbox.poll_flush(cx, &self.socket, &self.buffers))?;
            self.outbox.seal_control(&mut self.rest, &self.buffers)?;
            if !self.outbox.is_blocked() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Sends what was sealed; control frames go on waiting. Ready = there is room for more.
    pub(crate) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        ready!(self.outbox.poll_flush(cx, &self.socket, &self.buffers))?;
        Poll::Ready(Ok(()))
    }

    /// Reads once from the application; what was read goes with the next flush, after the control
    /// frames that wait. `Ok(0)` = the application has finished. Only when there is room. `copy`
    /// keeps what was read, in all less than [`MOST_EARLY`] before and at most that after it.
    pub(crate) fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
        stream: StreamId,
        copy: Option<&mut Vec<u8>>,
    ) -> Poll<Result<usize, TakeError>> {
        let lenders = (&mut self.rest, &self.buffers);
        self.outbox.poll_take(cx, lenders, app, stream, copy)
    }

    /// Whether data waits for the application.
    pub(crate) fn has_data(&self) -> bool {
        self.inbox.has_pieces()
    }

    /// Gives waiting data to the application; returns how many bytes it took.
    pub(crate) fn poll_deliver(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
    ) -> Poll<io::Result<usize>> {
        self.inbox.poll_deliver(cx, app, &self.buffers)
    }

    /// The next thing among what has arrived.
    pub(crate) fn next(&mut self) -> Result<Arrival, TunnelError> {
        loop {
            let found = self.inbox.next(&mut self.rest, self.stream, self.late)?;
            if found.rekey {
                self.outbox.request_rekey();
            }
            return Ok(match found.item {
                Item::Control(stream, _) if Some(stream) == self.late => continue,
                Item::Control(stream, control) => Arrival::Control(stream, control),
                Item::Full => Arrival::Data,
                Item::Empty if self.inbox.has_pieces() => Arrival::Data,
                Item::Empty => {
                    self.inbox.release_if_empty(&self.buffers);
                    Arrival::Nothing
                }
            });
        }
    }

    /// Receives more. Only when [`Tunnel::next`] has said that there is nothing.
    pub(crate) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.inbox.poll_fill(cx, &self.socket, &self.buffers)
    }

    /// Waits for the next control frame between streams, and sends what waits meanwhile.
    pub(crate) async fn control(&mut self) -> Result<(StreamId, Control), TunnelError> {
        std::future::poll_fn(|cx| {
            loop {
                // Pending is polled again together with the other direction.
                let _sent: Poll<()> = self.poll_flush(cx)?;
                match self.next()? {
                    Arrival::Control(stream, control) => {
                        return Poll::Ready(Ok((stream, control)));
                    }
                    Arrival::Data => return Poll::Ready(Err(TunnelError::Unexpected("data"))),
                    Arrival::Nothing => ready!(self.poll_fill(cx))?,
                }
            }
        })
        .await
    }

    /// Whether the tunnel, which the peer may say nothing in, can carry another stream: nothing is
    /// under way.
    pub(crate) fn is_quiet(&mut self) -> Result<bool, TunnelError> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        loop {
            match self.next()? {
                Arrival::Nothing => {}
                Arrival::Control(..) | Arrival::Data => {
                    return Err(TunnelError::Unexpected("a frame between streams"));
                }
            }
            match self.poll_fill(&mut cx)? {
                Poll::Pending => return Ok(self.inbox.at_boundary()),
                Poll::Ready(()) => {}
            }
        }
    }

    /// Round-trip time (microseconds), and segments that were sent again since this was last asked.
    pub(crate) fn transport(&mut self) -> (u32, u32) {
        let (rtt, total) = self.socket.transport();
        let before = std::mem::replace(&mut self.retransmits, total);
        (rtt, total.wrapping_sub(before))
    }

    /// The tunnel's socket.
    pub(crate) const fn socket(&self) -> &Rc<Socket> {
        &self.socket
    }

    /// Says what still has to be said, and that nothing follows; for at most a second.
    pub(crate) async fn close(mut self) {
        let said = tokio::time::timeout(LAST_WORDS, async {
            std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
            self.outbox.seal_close()?;
            std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
            self.socket.finish()?;
            Ok::<_, TunnelError>(())
        });
        match said.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "a tunnel ended before its last words")
            }
            Err(_elapsed) => self.socket.reset_on_drop(),
        }
    }
}

impl AsFd for Tunnel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.outbox.release(&self.buffers);
        self.inbox.release(&self.buffers);
    }
}
