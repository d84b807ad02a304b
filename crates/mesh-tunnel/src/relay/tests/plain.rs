// SPDX-License-Identifier: Apache-2.0
//! A second carrier, which proves the seam: application bytes over a plain TCP connection, one stream
//! in all, without frames, encryption or replies.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::pin::Pin;
use std::task::ready;

use super::*;
use crate::carrier::{CarrierError, Protocol};
use crate::testing::sockets;

#[derive(Debug)]
pub(super) struct PlainError(io::Error);

impl std::fmt::Display for PlainError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for PlainError {}

impl From<io::Error> for PlainError {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

impl CarrierError for PlainError {
    fn unexpected(what: &'static str) -> Self {
        Self(io::Error::other(what))
    }

    fn is_orderly(&self) -> bool {
        false
    }

    fn is_violation(&self) -> bool {
        self.0.kind() == io::ErrorKind::Other
    }
}

/// A plain TCP connection.
pub(super) struct Plain {
    socket: Rc<Socket>,
    failed: Pin<Box<dyn Future<Output = io::Error>>>,
    outgoing: VecDeque<u8>,
    incoming: VecDeque<u8>,
    messages: VecDeque<Arrival>,
    finish: bool,
    shut_down: bool,
    peer_finished: bool,
}

impl Plain {
    fn new(socket: Socket) -> Self {
        let socket = Rc::new(socket);
        let watched = Rc::clone(&socket);
        Self {
            socket,
            failed: Box::pin(async move { watched.failed().await }),
            outgoing: VecDeque::new(),
            incoming: VecDeque::new(),
            messages: VecDeque::new(),
            finish: false,
            shut_down: false,
            peer_finished: false,
        }
    }
}

impl Fresh for Plain {
    async fn fresh() -> (Self, Self) {
        let (near, far) = sockets();
        (Self::new(near), Self::new(far))
    }
}

impl Carrier for Plain {
    type Error = PlainError;
    type Stream<'a> = &'a mut Self;

    const PROTOCOL: Protocol = Protocol {
        alpn: b"plain",
        multiplexed: false,
    };

    fn open(&mut self, _request: &Open) -> Option<StreamId> {
        self.messages.push_back(Arrival::Opened);
        Some(1)
    }

    async fn accept(&mut self) -> Result<Option<(StreamId, Open)>, PlainError> {
        Ok(Some((1, REQUEST)))
    }

    fn confirm(&mut self, _stream: StreamId) {}

    fn refuse(&mut self, _stream: StreamId, _reason: &CloseReason) {
        self.socket.reset_on_drop();
    }

    fn stream(&mut self, _stream: StreamId) -> &mut Self {
        self
    }

    fn end(&mut self, _stream: StreamId) {}

    fn reset(&mut self, _stream: StreamId, _reason: &CloseReason) {
        self.socket.reset_on_drop();
    }

    async fn close(self) {}
}

impl Stream for &mut Plain {
    type Error = PlainError;

    const MAX_BEFORE_REPLY: usize = 1000;

    fn resend(&mut self, data: &[u8]) {
        self.outgoing.extend(data);
    }

    fn finish(&mut self) {
        self.finish = true;
    }

    fn acknowledge(&mut self) {}

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PlainError>> {
        while !self.outgoing.is_empty() {
            let (bytes, _) = self.outgoing.as_slices();
            let written = ready!(
                self.socket
                    .poll_write(cx, &[IoSlice::new(bytes)], bytes.len())
            )?;
            self.outgoing.drain(..written);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PlainError>> {
        ready!(self.poll_room(cx))?;
        if self.finish && !self.shut_down {
            self.socket.finish()?;
            self.shut_down = true;
            self.messages.push_back(Arrival::Acknowledged);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        app: &Socket,
        copy: Option<&mut Vec<u8>>,
    ) -> Poll<Result<usize, TakeError<PlainError>>> {
        let room = match &copy {
            Some(kept) => Plain::most() - kept.len(),
            None => 16_384,
        };
        let mut buffer = vec![0; room];
        let read = ready!(app.poll_read(cx, &mut [IoSliceMut::new(&mut buffer)], room))
            .map_err(TakeError::App)?;
        self.outgoing.extend(&buffer[..read]);
        if let Some(copy) = copy {
            copy.extend_from_slice(&buffer[..read]);
        }
        Poll::Ready(Ok(read))
    }

    fn has_data(&self) -> bool {
        !self.incoming.is_empty()
    }

    fn poll_deliver(&mut self, cx: &mut Context<'_>, app: &Socket) -> Poll<io::Result<usize>> {
        let (bytes, _) = self.incoming.as_slices();
        let written = ready!(app.poll_write(cx, &[IoSlice::new(bytes)], bytes.len()))?;
        self.incoming.drain(..written);
        Poll::Ready(Ok(written))
    }

    fn next(&mut self) -> Result<Arrival, PlainError> {
        if self.has_data() {
            return Ok(Arrival::Data);
        }
        Ok(self.messages.pop_front().unwrap_or(Arrival::Nothing))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PlainError>> {
        let reset = Arrival::Reset(CloseReason::APPLICATION);
        if self.peer_finished {
            ready!(self.failed.as_mut().poll(cx));
            self.messages.push_back(reset);
            return Poll::Ready(Ok(()));
        }
        let mut buffer = vec![0; 16_384];
        let room = buffer.len();
        let mut place = [IoSliceMut::new(&mut buffer)];
        match ready!(self.socket.poll_read(cx, &mut place, room)) {
            Ok(0) => {
                self.peer_finished = true;
                self.messages.push_back(Arrival::Finished);
            }
            Ok(read) => self.incoming.extend(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.messages.push_back(reset);
            }
            Err(error) => return Poll::Ready(Err(error.into())),
        }
        Poll::Ready(Ok(()))
    }

    fn failed(&self) -> impl Future<Output = io::Error> + 'static {
        let socket = Rc::clone(&self.socket);
        async move { socket.failed().await }
    }
}

impl Plain {
    const fn most() -> usize {
        <&mut Self as Stream>::MAX_BEFORE_REPLY
    }
}
