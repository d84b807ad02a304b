// SPDX-License-Identifier: Apache-2.0
//! Carries one application connection through a tunnel: both directions in one task, half-close,
//! resets both ways, and nothing held back but what the other end has not taken.

use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::follow;
use super::socket::Socket;
use super::tunnel::frame::{Cause, Control, StreamId, Why};
use super::tunnel::{Arrival, MOST_EARLY, TakeError, Tunnel, TunnelError};

/// Turns of both directions before other connections of the worker get theirs.
const TURNS: u32 = 8;
/// How long OPENED waits for the application's first bytes, to go with them in one record: most
/// requests are answered sooner.
const REPLY_WAIT: Duration = Duration::from_millis(1);
/// Early data from which on OPENED does not wait: an opener that sent as much is likely to have
/// more, and soon may not send it before the reply.
const MUCH_EARLY: usize = 4096;

/// Which end of the tunnel this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Sent OPEN.
    Opener,
    /// Received it, and has answered.
    Acceptor,
}

/// How a relayed connection came to its end.
#[derive(Debug)]
pub(crate) enum End {
    /// Both directions ended in order.
    Finished {
        /// Whether the application at this end was the first to finish.
        local_first: bool,
    },
    /// This end's application reset it, or cannot be reached any more.
    AppReset(io::Error),
    /// The other end says that it ended.
    PeerReset(Why),
    /// The other end did not make the connection.
    Refused(Why),
    /// The tunnel failed. `unused` = the peer has certainly not acted on OPEN, and another tunnel
    /// may be tried.
    Tunnel {
        /// Why.
        error: TunnelError,
        /// See above.
        unused: bool,
    },
}

/// What an opener has taken from its application before the reply: kept to be sent again.
#[derive(Debug, Default)]
pub(crate) struct Retained {
    /// The bytes.
    pub(crate) data: Vec<u8>,
    /// The application has finished.
    pub(crate) finished: bool,
}

/// Takes note of what an application sends and is given.
pub(crate) trait Count {
    /// From this end's application.
    fn taken(&self, bytes: u64);
    /// To this end's application.
    fn given(&self, bytes: u64);
    /// This end's application sends nothing more.
    fn finished(&self);
}

/// One application connection in a tunnel.
pub(crate) struct Relay<'a, C> {
    app: &'a Socket,
    tunnel: &'a mut Tunnel,
    stream: StreamId,
    role: Role,
    count: &'a C,
    /// Before the reply to OPEN: what was sent already.
    retained: Option<&'a mut Retained>,
    /// The application has finished sending.
    app_finished: bool,
    /// FIN was received; and passed on.
    peer_finished: bool,
    passed_on: bool,
    /// FIN_ACK was received.
    acknowledged: bool,
    /// FIN was received before the application finished.
    remote_first: bool,
    /// OPENED waits for something to go with it.
    reply_waits: bool,
}

impl<'a, C: Count> Relay<'a, C> {
    /// The opener's end; OPEN is queued. What `retained` holds is sent first.
    pub(crate) fn opener(
        app: &'a Socket,
        tunnel: &'a mut Tunnel,
        stream: StreamId,
        count: &'a C,
        retained: &'a mut Retained,
    ) -> Self {
        if !retained.data.is_empty() {
            tunnel.queue_data(stream, &retained.data);
        }
        let app_finished = retained.finished;
        if app_finished {
            tunnel.queue(stream, &Control::Fin);
        }
        Self {
            app_finished,
            retained: Some(retained),
            ..Self::new(app, tunnel, stream, Role::Opener, count)
        }
    }

    /// The acceptor's end; OPENED is queued.
    pub(crate) fn acceptor(
        app: &'a Socket,
        tunnel: &'a mut Tunnel,
        stream: StreamId,
        count: &'a C,
    ) -> Self {
        Self::new(app, tunnel, stream, Role::Acceptor, count)
    }

    fn new(
        app: &'a Socket,
        tunnel: &'a mut Tunnel,
        stream: StreamId,
        role: Role,
        count: &'a C,
    ) -> Self {
        Self {
            app,
            tunnel,
            stream,
            role,
            count,
            retained: None,
            app_finished: false,
            peer_finished: false,
            passed_on: false,
            acknowledged: false,
            remote_first: false,
            reply_waits: role == Role::Acceptor,
        }
    }

    /// Carries the connection to its end. Cancel safe: but then the stream is to be reset.
    pub(crate) async fn run(mut self) -> End {
        let app = self.app;
        let socket = Rc::clone(self.tunnel.socket());
        let mut app_failed = pin!(app.failed());
        let mut tunnel_failed = pin!(socket.failed());
        let mut waited = pin!(tokio::time::sleep(REPLY_WAIT));
        let end = std::future::poll_fn(|cx| {
            if self.reply_waits && waited.as_mut().poll(cx).is_ready() {
                self.reply_waits = false;
            }
            if let Poll::Ready(end) = self.poll(cx) {
                return Poll::Ready(end);
            }
            // Nobody reads from an application that has finished: a reset has to be asked for.
            if self.app_finished
                && let Poll::Ready(error) = app_failed.as_mut().poll(cx)
            {
                return Poll::Ready(End::AppReset(error));
            }
            // Nor from a tunnel whose data the application does not take.
            if self.tunnel.has_data()
                && let Poll::Ready(error) = tunnel_failed.as_mut().poll(cx)
            {
                return Poll::Ready(self.broken(error.into()));
            }
            Poll::Pending
        });
        end.await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        for _ in 0..TURNS {
            let moved = match self.upstream(cx) {
                Ok(moved) => moved,
                Err(end) => return Poll::Ready(end),
            };
            let moved = match self.downstream(cx) {
                Ok(also) => moved | also,
                Err(end) => return Poll::Ready(end),
            };
            if self.is_finished() {
                return Poll::Ready(End::Finished {
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

    /// The acceptor need not wait for the acknowledgement: the opener begins nothing before it has
    /// sent it.
    fn is_finished(&self) -> bool {
        self.app_finished && self.passed_on && (self.acknowledged || self.role == Role::Acceptor)
    }

    /// From the application to the tunnel.
    fn upstream(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        match self.tunnel.poll_room(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Err(self.broken(error)),
            Poll::Pending => return Ok(false),
        }
        let mut moved = false;
        // Before the reply only one record is taken: it might have to be sent again.
        let may_take = (self.retained.as_ref()).is_none_or(|r| r.data.len() < MOST_EARLY);
        if !self.app_finished && may_take {
            let copy = self.retained.as_deref_mut().map(|kept| &mut kept.data);
            match self.tunnel.poll_take(cx, self.app, self.stream, copy) {
                Poll::Ready(Ok(0)) => {
                    self.finish_upstream();
                    moved = true;
                }
                Poll::Ready(Ok(taken)) => {
                    self.count.taken(taken as u64);
                    follow::read(self.app);
                    self.reply_waits = false;
                    moved = true;
                }
                Poll::Ready(Err(TakeError::App(error))) => return Err(End::AppReset(error)),
                Poll::Ready(Err(TakeError::Tunnel(error))) => return Err(self.broken(error)),
                Poll::Pending => {}
            }
        }
        let sent = if self.reply_waits {
            self.tunnel.poll_room(cx)
        } else {
            self.tunnel.poll_flush(cx)
        };
        match sent {
            Poll::Ready(Err(error)) => Err(self.broken(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(moved),
        }
    }

    fn finish_upstream(&mut self) {
        self.app_finished = true;
        self.count.finished();
        self.reply_waits = false;
        self.remote_first = self.peer_finished;
        if let Some(retained) = &mut self.retained {
            retained.finished = true;
        }
        self.tunnel.queue(self.stream, &Control::Fin);
        if self.passed_on {
            self.tunnel.queue(self.stream, &Control::FinAck);
        }
    }

    /// From the tunnel to the application.
    fn downstream(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut moved = false;
        loop {
            if self.tunnel.has_data() {
                if self.passed_on {
                    return Err(self.broken(TunnelError::Unexpected("data behind FIN")));
                }
                match self.tunnel.poll_deliver(cx, self.app) {
                    Poll::Ready(Ok(given)) => {
                        self.count.given(given as u64);
                        self.reply_waits &= given < MUCH_EARLY;
                    }
                    Poll::Ready(Err(error)) => return Err(End::AppReset(error)),
                    Poll::Pending => return Ok(moved),
                }
                moved = true;
                if self.tunnel.has_data() {
                    continue;
                }
            }
            if self.peer_finished && !self.passed_on {
                self.pass_on_end()?;
                moved = true;
            }
            match self.tunnel.next() {
                Ok(Arrival::Data) => {}
                Ok(Arrival::Control(stream, control)) => {
                    self.control(stream, control)?;
                    moved = true;
                    if self.is_finished() {
                        return Ok(true);
                    }
                }
                Ok(Arrival::Nothing) => match self.tunnel.poll_fill(cx) {
                    // One read each turn: the other direction has its share.
                    Poll::Ready(Ok(())) if moved => return Ok(true),
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(error)) => return Err(self.broken(error)),
                    Poll::Pending => return Ok(moved),
                },
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    /// Tells the application that the peer has finished, and the peer that it was told. The
    /// acknowledgement waits for our own FIN, because it is of no use before; the last word of an
    /// opener even waits for its next OPEN.
    fn pass_on_end(&mut self) -> Result<(), End> {
        self.app.finish().map_err(End::AppReset)?;
        self.passed_on = true;
        if self.app_finished {
            self.tunnel.queue(self.stream, &Control::FinAck);
        }
        Ok(())
    }

    fn control(&mut self, stream: StreamId, control: Control) -> Result<(), End> {
        if stream != self.stream {
            return Err(self.broken(TunnelError::Unexpected("a frame of another stream")));
        }
        let awaiting_reply = self.retained.is_some();
        match control {
            Control::Opened if awaiting_reply => {
                if let Some(retained) = self.retained.take() {
                    retained.data = Vec::new();
                }
                Ok(())
            }
            Control::Refused(why) if awaiting_reply => Err(End::Refused(why)),
            Control::Reset(why) => Err(End::PeerReset(why)),
            Control::Fin if !self.peer_finished && !awaiting_reply => {
                self.peer_finished = true;
                Ok(())
            }
            Control::FinAck if self.app_finished && !self.acknowledged && !awaiting_reply => {
                self.acknowledged = true;
                Ok(())
            }
            Control::Open(_) => Err(self.broken(TunnelError::Unexpected("an OPEN"))),
            Control::Opened | Control::Refused(_) | Control::Fin | Control::FinAck => {
                Err(self.broken(TunnelError::Unexpected("a reply or end")))
            }
        }
    }

    fn broken(&self, error: TunnelError) -> End {
        // A peer that closes in order without having replied has not acted on OPEN.
        let unused = self.retained.is_some() && matches!(error, TunnelError::Ended);
        End::Tunnel { error, unused }
    }
}

/// What a failed connect to the application was, for the frame that tells the opener.
pub(crate) fn cause(error: &io::Error) -> Cause {
    use io::ErrorKind as Kind;

    let of = |kinds: &[Kind]| kinds.contains(&error.kind());
    if of(&[Kind::ConnectionRefused, Kind::ConnectionReset]) {
        Cause::Refused
    } else if of(&[Kind::TimedOut]) {
        Cause::TimedOut
    } else if of(&[Kind::HostUnreachable, Kind::NetworkUnreachable]) {
        Cause::Unreachable
    } else if of(&[Kind::AddrInUse, Kind::AddrNotAvailable]) {
        Cause::AddressInUse
    } else {
        Cause::None
    }
}

#[cfg(test)]
mod tests;
