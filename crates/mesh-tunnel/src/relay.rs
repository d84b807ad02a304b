// SPDX-License-Identifier: Apache-2.0
//! Relays one application connection through a [`Stream`]: both directions in one task, half-close,
//! resets both ways, and nothing held back but what the other side has not taken.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::carrier::{Arrival, CarrierError as _, Stream, TakeError};
use crate::frame::{Cause, CloseReason};
use crate::socket::Socket;

/// Rounds of both directions before other connections of the thread run.
const ROUNDS: u32 = 8;
/// The time for which the acceptor's reply waits for the application's first bytes, to go with them in one
/// record: most requests are answered sooner.
const REPLY_DELAY: Duration = Duration::from_millis(1);
/// The amount of delivered data from which on the reply does not wait: an opener that sent as much
/// probably has more, and may not send it before the reply.
const MUCH_BEFORE_REPLY: usize = 4096;

/// The side of the stream that this relay serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Requested the connection.
    Opener,
    /// Received the request, and has answered.
    Acceptor,
}

/// The end of a relayed connection. `E` is the carrier's error.
#[derive(Debug)]
pub enum Outcome<E> {
    /// Both directions ended in order.
    Finished {
        /// Whether the application of this side finished first.
        local_first: bool,
    },
    /// The application of this side reset its connection, or cannot be reached any more.
    AppReset(io::Error),
    /// The peer reset the stream.
    PeerReset(CloseReason),
    /// The peer did not make the connection.
    Refused(CloseReason),
    /// The carrier failed.
    CarrierFailed {
        /// The failure.
        error: E,
        /// Whether the peer has certainly not acted on the request: another carrier may be tried.
        may_retry: bool,
    },
}

/// The bytes that an opener read from its application before the reply, kept to be sent again through
/// another carrier.
#[derive(Debug, Default)]
pub struct ReplayBuffer {
    /// The bytes.
    pub data: Vec<u8>,
    /// Whether the application has finished.
    pub finished: bool,
}

/// Observes a relayed connection.
pub trait RelayObserver {
    /// `bytes` were read from the application of this side.
    fn taken(&self, app: &Socket, bytes: u64);
    /// `bytes` were written to the application of this side.
    fn delivered(&self, bytes: u64);
    /// The application of this side sends nothing more.
    fn finished(&self);
}

/// One application connection in a stream.
pub struct Relay<'a, S, O> {
    app: &'a Socket,
    stream: S,
    role: Role,
    observer: &'a O,
    /// Before the reply: what was sent already.
    replay: Option<&'a mut ReplayBuffer>,
    /// The application has finished sending.
    app_finished: bool,
    /// The end of the peer's data has arrived.
    peer_finished: bool,
    /// The end of the peer's data was passed on to the application.
    passed_on: bool,
    /// The peer has acknowledged the end of our data.
    acknowledged: bool,
    /// The peer finished before the application of this side.
    remote_first: bool,
    /// The reply waits for data to go with it.
    reply_waits: bool,
}

impl<'a, S: Stream, O: RelayObserver> Relay<'a, S, O> {
    /// The opener's side; the request is queued. The content of `replay` is sent first.
    pub fn opener(
        app: &'a Socket,
        mut stream: S,
        observer: &'a O,
        replay: &'a mut ReplayBuffer,
    ) -> Self {
        if !replay.data.is_empty() {
            stream.resend(&replay.data);
        }
        let app_finished = replay.finished;
        if app_finished {
            stream.finish();
        }
        Self {
            app_finished,
            replay: Some(replay),
            ..Self::new(app, stream, Role::Opener, observer)
        }
    }

    /// The acceptor's side; the reply is queued.
    pub fn acceptor(app: &'a Socket, stream: S, observer: &'a O) -> Self {
        Self::new(app, stream, Role::Acceptor, observer)
    }

    fn new(app: &'a Socket, stream: S, role: Role, observer: &'a O) -> Self {
        Self {
            app,
            stream,
            role,
            observer,
            replay: None,
            app_finished: false,
            peer_finished: false,
            passed_on: false,
            acknowledged: false,
            remote_first: false,
            reply_waits: role == Role::Acceptor,
        }
    }

    /// Relays until the connection ends. Cancel safe: reset the stream then.
    pub async fn run(mut self) -> Outcome<S::Error> {
        let app = self.app;
        let mut app_failed = pin!(app.failed());
        let mut carrier_failed = pin!(self.stream.failed());
        let mut reply_delay = pin!(tokio::time::sleep(REPLY_DELAY));
        let outcome = std::future::poll_fn(|cx| {
            if self.reply_waits && reply_delay.as_mut().poll(cx).is_ready() {
                self.reply_waits = false;
            }
            if let Poll::Ready(outcome) = self.poll(cx) {
                return Poll::Ready(outcome);
            }
            // Nobody reads from an application that has finished: its reset has to be asked for.
            if self.app_finished
                && let Poll::Ready(error) = app_failed.as_mut().poll(cx)
            {
                return Poll::Ready(Outcome::AppReset(error));
            }
            // Nor from a carrier whose data the application does not take.
            if self.stream.has_data()
                && let Poll::Ready(error) = carrier_failed.as_mut().poll(cx)
            {
                return Poll::Ready(self.failed(error.into()));
            }
            Poll::Pending
        });
        outcome.await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Outcome<S::Error>> {
        for _ in 0..ROUNDS {
            let moved = match self.upstream(cx) {
                Ok(moved) => moved,
                Err(outcome) => return Poll::Ready(outcome),
            };
            let moved = match self.downstream(cx) {
                Ok(also) => moved | also,
                Err(outcome) => return Poll::Ready(outcome),
            };
            if self.is_finished() {
                return Poll::Ready(Outcome::Finished {
                    local_first: !self.remote_first,
                });
            }
            if !moved {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The acceptor need not wait for the acknowledgement: the opener begins no stream before it has
    /// sent it.
    fn is_finished(&self) -> bool {
        self.app_finished && self.passed_on && (self.acknowledged || self.role == Role::Acceptor)
    }

    /// Moves data from the application to the stream; returns whether anything moved.
    fn upstream(&mut self, cx: &mut Context<'_>) -> Result<bool, Outcome<S::Error>> {
        match self.stream.poll_room(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Err(self.failed(error)),
            Poll::Pending => return Ok(false),
        }
        let mut moved = false;
        // What is sent before the reply is bounded: it might have to be sent again.
        let may_take =
            (self.replay.as_ref()).is_none_or(|kept| kept.data.len() < S::MAX_BEFORE_REPLY);
        if !self.app_finished && may_take {
            let copy = self.replay.as_deref_mut().map(|kept| &mut kept.data);
            match self.stream.poll_take(cx, self.app, copy) {
                Poll::Ready(Ok(0)) => {
                    self.finish_upstream();
                    moved = true;
                }
                Poll::Ready(Ok(taken)) => {
                    self.observer.taken(self.app, taken as u64);
                    self.reply_waits = false;
                    moved = true;
                }
                Poll::Ready(Err(TakeError::App(error))) => return Err(Outcome::AppReset(error)),
                Poll::Ready(Err(TakeError::Carrier(error))) => return Err(self.failed(error)),
                Poll::Pending => {}
            }
        }
        let sent = if self.reply_waits {
            self.stream.poll_room(cx)
        } else {
            self.stream.poll_flush(cx)
        };
        match sent {
            Poll::Ready(Err(error)) => Err(self.failed(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(moved),
        }
    }

    fn finish_upstream(&mut self) {
        self.app_finished = true;
        self.observer.finished();
        self.reply_waits = false;
        self.remote_first = self.peer_finished;
        if let Some(replay) = &mut self.replay {
            replay.finished = true;
        }
        self.stream.finish();
        if self.passed_on {
            self.stream.acknowledge();
        }
    }

    /// Moves data from the stream to the application; returns whether anything moved.
    fn downstream(&mut self, cx: &mut Context<'_>) -> Result<bool, Outcome<S::Error>> {
        let mut moved = false;
        loop {
            if self.stream.has_data() {
                if self.passed_on {
                    return Err(self.violation("data behind FIN"));
                }
                match self.stream.poll_deliver(cx, self.app) {
                    Poll::Ready(Ok(delivered)) => {
                        self.observer.delivered(delivered as u64);
                        self.reply_waits &= delivered < MUCH_BEFORE_REPLY;
                    }
                    Poll::Ready(Err(error)) => return Err(Outcome::AppReset(error)),
                    Poll::Pending => return Ok(moved),
                }
                moved = true;
                if self.stream.has_data() {
                    continue;
                }
            }
            if self.peer_finished && !self.passed_on {
                self.pass_on_end()?;
                moved = true;
            }
            match self.stream.next() {
                Ok(Arrival::Data) => {}
                Ok(Arrival::Nothing) => match self.stream.poll_fill(cx) {
                    // One read in each round: the other direction has its share.
                    Poll::Ready(Ok(())) if moved => return Ok(true),
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(error)) => return Err(self.failed(error)),
                    Poll::Pending => return Ok(moved),
                },
                Ok(message) => {
                    self.message(message)?;
                    moved = true;
                    if self.is_finished() {
                        return Ok(true);
                    }
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    /// Ends the application's receiving direction, and acknowledges that. The acknowledgement waits
    /// for our own end, because it is of no use before; an opener's last one even waits for its next
    /// request.
    fn pass_on_end(&mut self) -> Result<(), Outcome<S::Error>> {
        self.app.finish().map_err(Outcome::AppReset)?;
        self.passed_on = true;
        if self.app_finished {
            self.stream.acknowledge();
        }
        Ok(())
    }

    fn message(&mut self, message: Arrival) -> Result<(), Outcome<S::Error>> {
        let awaits_reply = self.replay.is_some();
        match message {
            Arrival::Opened if awaits_reply => {
                if let Some(replay) = self.replay.take() {
                    replay.data = Vec::new();
                }
                Ok(())
            }
            Arrival::Refused(reason) if awaits_reply => Err(Outcome::Refused(reason)),
            Arrival::Reset(reason) => Err(Outcome::PeerReset(reason)),
            Arrival::Finished if !self.peer_finished && !awaits_reply => {
                self.peer_finished = true;
                Ok(())
            }
            Arrival::Acknowledged if self.app_finished && !self.acknowledged && !awaits_reply => {
                self.acknowledged = true;
                Ok(())
            }
            Arrival::Opened
            | Arrival::Refused(_)
            | Arrival::Finished
            | Arrival::Acknowledged
            | Arrival::Data
            | Arrival::Nothing => Err(self.violation("a reply or end")),
        }
    }

    fn violation(&self, what: &'static str) -> Outcome<S::Error> {
        self.failed(S::Error::unexpected(what))
    }

    fn failed(&self, error: S::Error) -> Outcome<S::Error> {
        // A peer that closes in order without having replied has not acted on the request.
        let may_retry = self.replay.is_some() && error.is_orderly();
        Outcome::CarrierFailed { error, may_retry }
    }
}

/// The cause of a failed connect to the application, for the opener.
#[must_use]
pub fn cause(error: &io::Error) -> Cause {
    use io::ErrorKind as Kind;

    let is = |kinds: &[Kind]| kinds.contains(&error.kind());
    if is(&[Kind::ConnectionRefused, Kind::ConnectionReset]) {
        Cause::Refused
    } else if is(&[Kind::TimedOut]) {
        Cause::TimedOut
    } else if is(&[Kind::HostUnreachable, Kind::NetworkUnreachable]) {
        Cause::Unreachable
    } else if is(&[Kind::AddrInUse, Kind::AddrNotAvailable]) {
        Cause::AddressInUse
    } else {
        Cause::None
    }
}

#[cfg(test)]
mod tests;
