// SPDX-License-Identifier: Apache-2.0
//! A TCP socket for the relay: large vectored reads and writes, no system call that is known to find
//! nothing, and a reset where TCP would reset.

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

/// A non-blocking TCP socket that is connected or connecting.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    reset: Cell<bool>,
}

impl Socket {
    /// Registers a socket with this thread's runtime.
    pub fn new(stream: std::net::TcpStream) -> io::Result<Self> {
        TcpStream::from_std(stream).map(Self::from_tokio)
    }

    /// Makes a socket of one that this thread's runtime knows already.
    pub fn from_tokio(stream: TcpStream) -> Self {
        Self {
            stream,
            reset: Cell::new(false),
        }
    }

    /// The local address: for a steered connection, the address that the peer connected to.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// Waits for the result of connect().
    pub async fn connected(&self) -> io::Result<()> {
        self.stream.writable().await?;
        self.stream.take_error()?.map_or(Ok(()), Err)
    }

    /// Waits until there is data to read, or its end. Asks the kernel, because readiness can be reported
    /// although there is nothing to read.
    pub async fn readable(&self) -> io::Result<()> {
        self.stream.peek(&mut [0]).await.map(drop)
    }

    /// Reads into `room` bytes of `buffers`. `Ok(0)` if the peer has finished.
    pub fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        room: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.stream.try_read_vectored(buffers) {
                Ok(read) => {
                    if read > 0 && read < room {
                        self.exhausted(Interest::READABLE);
                    }
                    return Poll::Ready(Ok(read));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.stream.poll_read_ready(cx))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Writes some of the `length` bytes of `buffers`.
    pub fn poll_write(
        &self,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
        length: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.stream.try_write_vectored(buffers) {
                Ok(written) => {
                    if written < length {
                        self.exhausted(Interest::WRITABLE);
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.stream.poll_write_ready(cx))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Clears a readiness that a short read or write has used up, which saves a system call that would
    /// return EAGAIN. No event is lost: epoll reports what arrives later as a new edge, and this thread
    /// is the one that polls epoll.
    fn exhausted(&self, interest: Interest) {
        let used_up: io::Result<()> = self
            .stream
            .try_io(interest, || Err(io::ErrorKind::WouldBlock.into()));
        debug_assert!(used_up.is_err());
    }

    /// Ends the sending direction.
    pub fn finish(&self) -> io::Result<()> {
        socket2::SockRef::from(&self.stream).shutdown(std::net::Shutdown::Write)
    }

    /// Waits for a reset or another error that neither reading nor writing meets, because neither is
    /// going on.
    pub async fn failed(&self) -> io::Error {
        loop {
            if let Err(error) = self.stream.ready(Interest::ERROR).await {
                return error;
            }
            match self.stream.take_error() {
                Ok(None) => {
                    // Not an error after all; wait for the next event.
                    self.exhausted(Interest::ERROR);
                }
                Ok(Some(error)) | Err(error) => return error,
            }
        }
    }

    /// Resets the connection when the socket is dropped.
    pub fn reset_on_drop(&self) {
        self.reset.set(true);
    }

    /// Closes the connection in order when the socket is dropped: undoes [`Socket::reset_on_drop`].
    pub fn close_on_drop(&self) {
        self.reset.set(false);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.get()
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(%error, "cannot reset a connection");
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
