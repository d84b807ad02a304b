// SPDX-License-Identifier: Apache-2.0
//! The seam between the relay and the protocol that carries application connections between two agents.
//!
//! A [`Carrier`] is one connection between two agents; a [`Stream`] is one application connection
//! inside it. `mesh/1` ([`Tunnel`](crate::Tunnel)) is the only implementation; a protocol such as
//! HTTP/2 CONNECT implements the same two traits, and the [relay](crate::relay) stays as it is.

use std::io;
use std::task::{Context, Poll};

use crate::frame::{CloseReason, Open, StreamId};
use crate::socket::Socket;

/// The properties of a carrier that two agents have negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// The protocol's name in ALPN.
    pub alpn: &'static [u8],
    /// Whether one carrier has several streams open at a time. A pool may lend a carrier without this
    /// to one connection only.
    pub multiplexed: bool,
}

/// A failure that ends a carrier.
pub trait CarrierError: std::error::Error + From<io::Error> + 'static {
    /// The peer sent `what` where the protocol does not allow it.
    fn unexpected(what: &'static str) -> Self;

    /// Whether the peer closed the carrier in order. A request that it has not answered may then be
    /// sent again through another carrier.
    fn is_orderly(&self) -> bool;

    /// Whether the peer violated the protocol, as opposed to a broken connection.
    fn is_violation(&self) -> bool;
}

/// One connection between two agents.
pub trait Carrier {
    /// The failure that ends it.
    type Error: CarrierError;
    /// One application connection.
    type Stream<'a>: Stream<Error = Self::Error>
    where
        Self: 'a;

    /// Name and properties of the protocol.
    const PROTOCOL: Protocol;

    /// Requests a connection. `None` if this carrier takes no more streams.
    fn open(&mut self, request: &Open) -> Option<StreamId>;

    /// Waits for the peer's next request. `Ok(None)` if there will be none.
    fn accept(&mut self) -> impl Future<Output = Result<Option<(StreamId, Open)>, Self::Error>>;

    /// Answers a request: the application has accepted the connection.
    fn confirm(&mut self, stream: StreamId);

    /// Answers a request: the connection is not made. The carrier takes further requests.
    fn refuse(&mut self, stream: StreamId, reason: &CloseReason);

    /// The stream for the relay.
    fn stream(&mut self, stream: StreamId) -> Self::Stream<'_>;

    /// Forgets a stream that both sides have closed, or that the peer has refused.
    fn end(&mut self, stream: StreamId);

    /// Resets a stream. Close the carrier next, unless it is multiplexed.
    fn reset(&mut self, stream: StreamId, reason: &CloseReason);

    /// Sends what is queued and closes the carrier in order.
    fn close(self) -> impl Future<Output = ()>;
}

/// The next event of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Data waits for the application and must be delivered first.
    Data,
    /// The peer has connected to its application.
    Opened,
    /// The peer has not.
    Refused(CloseReason),
    /// The peer's application sends nothing more.
    Finished,
    /// Everything up to our own end, and the end itself, reached the peer's application. A protocol
    /// without such a message reports it once the end is sent.
    Acknowledged,
    /// The peer has reset the stream.
    Reset(CloseReason),
    /// Nothing has arrived.
    Nothing,
}

/// The side on which [`Stream::poll_take`] failed.
#[derive(Debug)]
pub enum TakeError<E> {
    /// The application's connection failed.
    App(io::Error),
    /// The carrier failed.
    Carrier(E),
}

/// One application connection inside a carrier, as the relay drives it.
///
/// A stream applies back-pressure by order of calls: it takes from the application only while
/// [`Stream::poll_room`] is ready, and receives only after everything that arrived is delivered.
pub trait Stream {
    /// The failure that ends the carrier.
    type Error: CarrierError;

    /// The most data that may be sent before the peer has answered the request. The relay keeps a copy
    /// of it, to send it again elsewhere.
    const MAX_BEFORE_REPLY: usize;

    /// Queues data that was taken from the application before: at most
    /// [`Stream::MAX_BEFORE_REPLY`] bytes.
    fn resend(&mut self, data: &[u8]);

    /// Queues the end of this side's data.
    fn finish(&mut self);

    /// Queues the acknowledgement that the peer's data, and their end, were passed on.
    fn acknowledge(&mut self);

    /// Sends until there is room for more data. Queued control messages may stay queued.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>>;

    /// Sends everything that is queued.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>>;

    /// Reads once from the application and queues what was read. `Ok(0)` if the application has
    /// finished. Call it only while there is room. `copy` is extended by what was read, up to
    /// [`Stream::MAX_BEFORE_REPLY`] bytes in all.
    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
        copy: Option<&mut Vec<u8>>,
    ) -> Poll<Result<usize, TakeError<Self::Error>>>;

    /// Whether received data waits for the application.
    fn has_data(&self) -> bool;

    /// Gives received data to the application; returns how many bytes it took.
    fn poll_deliver(&mut self, cx: &mut Context<'_>, app: &Socket) -> Poll<io::Result<usize>>;

    /// The next event among what has arrived.
    ///
    /// # Errors
    /// The carrier can no longer be used.
    fn next(&mut self) -> Result<Arrival, Self::Error>;

    /// Receives more. Call it only after [`Stream::next`] has returned [`Arrival::Nothing`].
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>>;

    /// Waits for a failure of the carrier's connection that neither reading nor writing meets, because
    /// neither is going on.
    fn failed(&self) -> impl Future<Output = io::Error> + 'static;
}
