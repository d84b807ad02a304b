// SPDX-License-Identifier: Apache-2.0
//! A tunnel: one TLS connection that carries one application connection at a time, in the frames of
//! `mesh/1` (`docs/tunnel.md`).
//!
//! ```text
//! application -> outbox (read, frame, seal) -> tunnel's socket
//! tunnel's socket -> inbox (open, read frames) -> application
//! ```
//! This module moves bytes and keeps the streams of one tunnel apart. Its callers decide who may use
//! the tunnel, and for what. Back-pressure is TCP's: nothing is read while data that was read before
//! waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use self::inbox::{Inbox, Item};
use self::outbox::{MOST_EARLY, Outbox, Take};
use crate::buffers::BufferAccount;
use crate::carrier::{Arrival, Carrier, CarrierError, Protocol, Stream, TakeError};
use crate::frame::{CloseReason, Control, FrameError, Open, StreamId};
use crate::records::RecordError;
use crate::socket::Socket;
use crate::tls::{HandshakeError, PostHandshake, SecureConnection};

mod inbox;
mod outbox;

/// Time limit for the last messages of a tunnel that is being closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a tunnel can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The tunnel's socket failed.
    #[error("the tunnel's connection failed")]
    Io(#[from] io::Error),
    /// The peer closed the tunnel in order.
    #[error("the peer closed the tunnel")]
    Closed,
    /// The connection ended without the peer having closed the tunnel.
    #[error("the tunnel's connection ended without close_notify")]
    Cut,
    /// The peer ended the tunnel with an alert.
    #[error("the peer ended the tunnel with TLS alert {0}")]
    Alert(u8),
    /// A record is invalid.
    #[error("invalid TLS record")]
    Record(#[from] RecordError),
    /// A key or a ticket is invalid.
    #[error("invalid TLS message")]
    Keys(#[from] HandshakeError),
    /// A frame is invalid.
    #[error("invalid frame")]
    Frame(#[from] FrameError),
    /// A message arrived where the protocol does not allow it.
    #[error("protocol violation: the peer sent {0} out of order")]
    Unexpected(&'static str),
    /// Received data is no longer there: a bug of ours.
    #[error("received data was lost")]
    Lost,
}

impl CarrierError for TunnelError {
    fn unexpected(what: &'static str) -> Self {
        Self::Unexpected(what)
    }

    fn is_orderly(&self) -> bool {
        matches!(self, Self::Closed)
    }

    fn is_violation(&self) -> bool {
        match self {
            Self::Io(_) | Self::Closed | Self::Cut | Self::Alert(_) => false,
            Self::Record(_) | Self::Keys(_) | Self::Frame(_) | Self::Unexpected(_) | Self::Lost => {
                true
            }
        }
    }
}

/// A tunnel.
pub struct Tunnel {
    socket: Rc<Socket>,
    keys: PostHandshake,
    buffers: BufferAccount,
    outbox: Outbox,
    inbox: Inbox,
    /// The open stream.
    stream: Option<StreamId>,
    /// The last stream that was opened.
    last: StreamId,
    /// A stream that was refused: data under way for it is discarded.
    refused: Option<StreamId>,
    retransmits: u32,
}

/// The next message from the peer, of any stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A control frame of the open stream, or an OPEN.
    Control(StreamId, Control),
    /// Data, which must be delivered first.
    Data,
    /// Nothing yet.
    Nothing,
}

impl Tunnel {
    /// Makes a tunnel of a connection that has just been secured.
    #[must_use]
    pub fn new(socket: Socket, secured: SecureConnection, buffers: BufferAccount) -> Self {
        Self {
            outbox: Outbox::new(secured.sealer, secured.unsent),
            inbox: Inbox::new(secured.opener, &secured.early, &secured.unread),
            keys: secured.keys,
            retransmits: 0,
            socket: Rc::new(socket),
            buffers,
            stream: None,
            last: 0,
            refused: None,
        }
    }

    /// Begins the next stream as the opener. `None` when stream numbers have run out.
    pub fn begin(&mut self) -> Option<StreamId> {
        let stream = self.last.checked_add(1)?;
        self.begin_accepted(stream).ok()?;
        Some(stream)
    }

    /// Begins a stream that the peer has opened: always the next number.
    ///
    /// # Errors
    /// A stream is open, or the number is another one.
    pub fn begin_accepted(&mut self, stream: StreamId) -> Result<(), TunnelError> {
        if self.stream.is_some() || self.last.checked_add(1) != Some(stream) {
            return Err(TunnelError::Unexpected("an OPEN"));
        }
        self.stream = Some(stream);
        self.last = stream;
        self.refused = None;
        Ok(())
    }

    /// Ends the open stream. No further message of it may arrive.
    pub fn end_stream(&mut self) {
        self.stream = None;
        self.inbox.discard_pieces();
    }

    /// Ends the open stream, of which data may still be under way.
    pub fn refuse_stream(&mut self) {
        self.refused = self.stream.take();
        self.inbox.discard_pieces();
    }

    /// The number of streams that were begun.
    #[must_use]
    pub const fn streams(&self) -> StreamId {
        self.last
    }

    /// Queues a control frame for the next record.
    pub fn queue(&mut self, stream: StreamId, control: &Control) {
        self.outbox.queue(stream, control);
    }

    /// Queues data, at most one record of it, for the next record.
    pub fn queue_data(&mut self, stream: StreamId, data: &[u8]) {
        self.outbox.queue_data(stream, data);
    }

    /// Sends everything that is queued.
    ///
    /// # Errors
    /// The tunnel can no longer be used.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        loop {
            ready!(self.outbox.poll_flush(cx, &self.socket, &self.buffers))?;
            self.outbox.seal_control(&mut self.keys, &self.buffers)?;
            if !self.outbox.is_blocked() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// The next message among what has arrived.
    ///
    /// # Errors
    /// The tunnel can no longer be used.
    pub fn received(&mut self) -> Result<Received, TunnelError> {
        loop {
            let found = self.inbox.next(&mut self.keys, self.stream, self.refused)?;
            if found.rekey {
                self.outbox.request_rekey();
            }
            return Ok(match found.item {
                Item::Control(stream, _) if Some(stream) == self.refused => continue,
                Item::Control(stream, control) => Received::Control(stream, control),
                Item::Full => Received::Data,
                Item::Empty if self.inbox.has_pieces() => Received::Data,
                Item::Empty => {
                    self.inbox.release_if_empty(&self.buffers);
                    Received::Nothing
                }
            });
        }
    }

    /// Receives more. Call it only after [`Tunnel::received`] has returned [`Received::Nothing`].
    ///
    /// # Errors
    /// The tunnel can no longer be used.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.inbox.poll_fill(cx, &self.socket, &self.buffers)
    }

    /// Waits for the next control frame between streams, and sends what is queued meanwhile.
    ///
    /// # Errors
    /// The tunnel can no longer be used.
    pub async fn control(&mut self) -> Result<(StreamId, Control), TunnelError> {
        std::future::poll_fn(|cx| {
            loop {
                // Pending is polled again together with the other direction.
                let _sent: Poll<()> = self.poll_flush(cx)?;
                match self.received()? {
                    Received::Control(stream, control) => {
                        return Poll::Ready(Ok((stream, control)));
                    }
                    Received::Data => return Poll::Ready(Err(TunnelError::Unexpected("data"))),
                    Received::Nothing => ready!(self.poll_fill(cx))?,
                }
            }
        })
        .await
    }

    /// Whether an idle tunnel, in which the peer may send no frame, can carry another stream: nothing
    /// is under way.
    ///
    /// # Errors
    /// The tunnel can no longer be used.
    pub fn is_quiet(&mut self) -> Result<bool, TunnelError> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        loop {
            match self.received()? {
                Received::Nothing => {}
                Received::Control(..) | Received::Data => {
                    return Err(TunnelError::Unexpected("a frame between streams"));
                }
            }
            match self.poll_fill(&mut cx)? {
                Poll::Pending => return Ok(self.inbox.at_boundary()),
                Poll::Ready(()) => {}
            }
        }
    }

    /// The difference between `total`, the retransmitted segments of the tunnel's connection, and the
    /// total of the last call.
    pub const fn new_retransmits(&mut self, total: u32) -> u32 {
        let before = std::mem::replace(&mut self.retransmits, total);
        total.wrapping_sub(before)
    }

    /// The tunnel's socket.
    #[must_use]
    pub const fn socket(&self) -> &Rc<Socket> {
        &self.socket
    }
}

impl Carrier for Tunnel {
    type Error = TunnelError;
    type Stream<'a> = TunnelStream<'a>;

    const PROTOCOL: Protocol = Protocol {
        alpn: b"mesh/1",
        multiplexed: false,
    };

    fn open(&mut self, request: &Open) -> Option<StreamId> {
        let stream = self.begin()?;
        self.queue(stream, &Control::Open(*request));
        Some(stream)
    }

    async fn accept(&mut self) -> Result<Option<(StreamId, Open)>, TunnelError> {
        loop {
            match self.control().await? {
                (stream, Control::Open(request)) => {
                    self.begin_accepted(stream)?;
                    return Ok(Some((stream, request)));
                }
                // The opener's last message of a stream that has ended here.
                (stream, Control::FinAck) if stream == self.last => {}
                // Its application went away after both directions had ended.
                (stream, Control::Reset(_)) if stream == self.last => return Ok(None),
                (_, Control::FinAck | Control::Reset(_)) => {
                    return Err(TunnelError::Unexpected("the end of another stream"));
                }
                (_, Control::Opened | Control::Refused(_) | Control::Fin) => {
                    return Err(TunnelError::Unexpected("a frame between streams"));
                }
            }
        }
    }

    fn confirm(&mut self, stream: StreamId) {
        self.queue(stream, &Control::Opened);
    }

    fn refuse(&mut self, stream: StreamId, reason: &CloseReason) {
        self.queue(stream, &Control::Refused(*reason));
        self.refuse_stream();
    }

    fn stream(&mut self, stream: StreamId) -> TunnelStream<'_> {
        TunnelStream {
            tunnel: self,
            number: stream,
        }
    }

    fn end(&mut self, _stream: StreamId) {
        self.end_stream();
    }

    fn reset(&mut self, stream: StreamId, reason: &CloseReason) {
        self.queue(stream, &Control::Reset(*reason));
    }

    /// Sends what is queued, then `close_notify` and FIN; takes at most [`CLOSE_TIMEOUT`].
    async fn close(mut self) {
        let closed = tokio::time::timeout(CLOSE_TIMEOUT, async {
            std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
            self.outbox.seal_close()?;
            std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
            self.socket.finish()?;
            Ok::<_, TunnelError>(())
        });
        match closed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, "tunnel failed before close_notify was sent");
            }
            Err(_elapsed) => self.socket.reset_on_drop(),
        }
    }
}

/// The open stream of a tunnel.
pub struct TunnelStream<'a> {
    tunnel: &'a mut Tunnel,
    number: StreamId,
}

impl Stream for TunnelStream<'_> {
    type Error = TunnelError;

    const MAX_BEFORE_REPLY: usize = MOST_EARLY;

    fn resend(&mut self, data: &[u8]) {
        self.tunnel.queue_data(self.number, data);
    }

    fn finish(&mut self) {
        self.tunnel.queue(self.number, &Control::Fin);
    }

    fn acknowledge(&mut self) {
        self.tunnel.queue(self.number, &Control::FinAck);
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        let Tunnel {
            outbox,
            socket,
            buffers,
            ..
        } = &mut *self.tunnel;
        ready!(outbox.poll_flush(cx, socket, buffers))?;
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.tunnel.poll_flush(cx)
    }

    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
        copy: Option<&mut Vec<u8>>,
    ) -> Poll<Result<usize, TakeError<TunnelError>>> {
        let Tunnel {
            outbox,
            keys,
            buffers,
            ..
        } = &mut *self.tunnel;
        let take = Take {
            app,
            stream: self.number,
            copy,
        };
        outbox.poll_take(cx, keys, buffers, take)
    }

    fn has_data(&self) -> bool {
        self.tunnel.inbox.has_pieces()
    }

    fn poll_deliver(&mut self, cx: &mut Context<'_>, app: &Socket) -> Poll<io::Result<usize>> {
        let Tunnel { inbox, buffers, .. } = &mut *self.tunnel;
        inbox.poll_deliver(cx, app, buffers)
    }

    fn next(&mut self) -> Result<Arrival, TunnelError> {
        let control = match self.tunnel.received()? {
            Received::Control(stream, control) if stream == self.number => control,
            Received::Control(..) => {
                return Err(TunnelError::Unexpected("a frame of another stream"));
            }
            Received::Data => return Ok(Arrival::Data),
            Received::Nothing => return Ok(Arrival::Nothing),
        };
        Ok(match control {
            Control::Open(_) => return Err(TunnelError::Unexpected("an OPEN")),
            Control::Opened => Arrival::Opened,
            Control::Refused(reason) => Arrival::Refused(reason),
            Control::Fin => Arrival::Finished,
            Control::FinAck => Arrival::Acknowledged,
            Control::Reset(reason) => Arrival::Reset(reason),
        })
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.tunnel.poll_fill(cx)
    }

    fn failed(&self) -> impl Future<Output = io::Error> + 'static {
        let socket = Rc::clone(&self.tunnel.socket);
        async move { socket.failed().await }
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
