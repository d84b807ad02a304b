// SPDX-License-Identifier: Apache-2.0
//! A synchronous netlink socket: requests with acknowledgment, dumps and attributes.
//!
//! A socket belongs to the network namespace of the thread that creates it. Reads have a time limit, since the
//! kernel replies at once or not at all.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use socket2::SockRef;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Creates the object if it does not exist (NLM_F_CREATE).
pub(crate) const NLM_F_CREATE: u16 = 0x400;
/// Fails if the object exists (NLM_F_EXCL).
pub(crate) const NLM_F_EXCL: u16 = 0x200;
/// Replaces an existing object (NLM_F_REPLACE).
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
/// The mask that removes the flags of an attribute's type.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// The number of attempts for a dump that is interrupted by changes.
const DUMP_ATTEMPTS: u32 = 5;
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// The size of the receive buffer: the kernel limits the parts of a dump to 32 KiB.
const BUFFER: usize = 64 << 10;

/// A netlink socket.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket of a netlink family in this thread's network namespace.
    ///
    /// # Errors
    /// The kernel does not support the family.
    pub(crate) fn open(family: i32) -> io::Result<Self> {
        Self::with_buffer(family, BUFFER)
    }

    /// Opens a nonblocking socket that subscribes to multicast `groups` (`RTNLGRP_...`). Its messages are discarded, so
    /// its receive buffer is small.
    pub(crate) fn listening(family: i32, groups: &[u32]) -> io::Result<Self> {
        let socket = Self::with_buffer(family, HEADER)?;
        socket.subscribe(groups)?;
        Ok(socket)
    }

    fn with_buffer(family: i32, size: usize) -> io::Result<Self> {
        // SAFETY: creates a descriptor and accesses no memory.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                family,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        SockRef::from(&fd).set_read_timeout(Some(REPLY_TIMEOUT))?;
        let socket = Self {
            fd,
            sequence: 0,
            buffer: vec![0; size],
        };
        socket.bind()?;
        Ok(socket)
    }

    /// Binds the socket: an unbound socket receives no notifications of changes by processes.
    fn bind(&self) -> io::Result<()> {
        // SAFETY: an all-zero sockaddr_nl is valid, and means "any address".
        let mut addr: libc::sockaddr_nl = unsafe { mem::zeroed() };
        addr.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or(0);
        let length = libc::socklen_t::try_from(mem::size_of_val(&addr)).unwrap_or(0);
        // SAFETY: `addr` is `length` bytes long and read only.
        let result = unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const addr).cast(), length) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn subscribe(&self, groups: &[u32]) -> io::Result<()> {
        const NETLINK_ADD_MEMBERSHIP: i32 = 1;
        for group in groups {
            let length = libc::socklen_t::try_from(mem::size_of::<u32>()).unwrap_or(0);
            // SAFETY: `group` is `length` bytes long and read only.
            let result = unsafe {
                libc::setsockopt(
                    self.fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    NETLINK_ADD_MEMBERSHIP,
                    std::ptr::from_ref(group).cast(),
                    length,
                )
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        SockRef::from(&self.fd).set_nonblocking(true)
    }

    /// Discards all received messages, and returns whether there were any. An overrun counts as a message.
    pub(crate) fn drain(&mut self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match self.receive_part() {
                Ok(_) => any = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends a request and waits for its acknowledgment.
    pub(crate) fn request(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<()> {
        self.send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body)?;
        loop {
            let length = self.receive()?;
            for message in Messages(&self.buffer[..length]) {
                if message.sequence == self.sequence && message.kind == NLMSG_ERROR {
                    return message.error();
                }
            }
        }
    }

    /// Sends a request and returns the payload of its single reply.
    pub(crate) fn get(&mut self, kind: u16, body: &Body) -> io::Result<Vec<u8>> {
        self.send(kind, NLM_F_REQUEST, body)?;
        loop {
            let length = self.receive()?;
            for message in Messages(&self.buffer[..length]) {
                if message.sequence != self.sequence {
                    continue;
                }
                if message.kind == NLMSG_ERROR {
                    message.error()?;
                } else {
                    return Ok(message.payload.to_vec());
                }
            }
        }
    }

    /// Dumps objects, and returns the results of `parse` for their payloads.
    pub(crate) fn dump<T>(
        &mut self,
        kind: u16,
        body: &Body,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_ATTEMPTS {
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, body)?;
            if let Some(found) = self.dumped(&parse)? {
                return Ok(found);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "the netlink dump was interrupted by changes in every attempt",
        ))
    }

    /// Dumps objects once; `None` = interrupted by a change.
    fn dumped<T>(&mut self, parse: &impl Fn(&[u8]) -> Option<T>) -> io::Result<Option<Vec<T>>> {
        let mut found = Vec::new();
        let mut whole = true;
        loop {
            let length = self.receive()?;
            for message in Messages(&self.buffer[..length]) {
                if message.sequence != self.sequence {
                    continue;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return Ok(whole.then_some(found)),
                    NLMSG_ERROR => message.error()?,
                    _ => found.extend(parse(message.payload)),
                }
            }
        }
    }

    fn send(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER + body.0.len())
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let mut message = Vec::with_capacity(HEADER + body.0.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(&body.0);
        // SAFETY: `message` is read for its own length.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                0,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<usize> {
        let length = self.receive_part()?;
        if length > self.buffer.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "netlink message exceeds the receive buffer",
            ));
        }
        Ok(length)
    }

    /// Receives a datagram, truncated to the buffer, and returns its full length.
    fn receive_part(&mut self) -> io::Result<usize> {
        // SAFETY: the buffer is written for at most its own length.
        let length = unsafe {
            libc::recv(
                self.fd.as_raw_fd(),
                self.buffer.as_mut_ptr().cast(),
                self.buffer.len(),
                libc::MSG_TRUNC,
            )
        };
        usize::try_from(length).map_err(|_negative| io::Error::last_os_error())
    }
}

impl AsRawFd for Netlink {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The payload of a request: a fixed header, then attributes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Body(Vec<u8>);

impl Body {
    /// Creates a payload with a fixed header.
    pub(crate) fn new(fixed: &[u8]) -> Self {
        Self(fixed.to_vec()).aligned()
    }

    /// Appends an attribute.
    pub(crate) fn with(mut self, kind: u16, data: &[u8]) -> Self {
        let length = u16::try_from(4 + data.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(data);
        self.aligned()
    }

    /// Returns the payload as the data of an enclosing attribute.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn aligned(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// Returns the error of an NLMSG_ERROR; 0 is an acknowledgment.
    fn error(&self) -> io::Result<()> {
        match word(self.payload, 0) {
            Some(0) => Ok(()),
            Some(number) => Err(io::Error::from_raw_os_error(-number.cast_signed())),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "netlink error without an error number",
            )),
        }
    }
}

/// Iterates over the messages of a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = usize::try_from(word(self.0, 0)?).ok()?;
        let message = self.0.get(..length)?;
        let item = Message {
            kind: half(message, 4)?,
            flags: half(message, 6)?,
            sequence: word(message, 8)?,
            payload: message.get(HEADER..)?,
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(item)
    }
}

/// Iterates over the attributes after a payload's fixed header, as (type, data).
pub(crate) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Creates an iterator for a payload with a fixed header of this length.
    pub(crate) fn after(payload: &'a [u8], header: usize) -> Self {
        Self(payload.get(header..).unwrap_or(&[]))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(half(self.0, 0)?);
        let kind = half(self.0, 2)? & NLA_TYPE_MASK;
        let data = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, data))
    }
}

/// Returns the 32-bit number at an offset.
pub(crate) fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at + 4)?;
    Some(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Returns the 16-bit number at an offset.
pub(crate) fn half(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at + 2)?;
    Some(u16::from_ne_bytes([bytes[0], bytes[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip_and_malformed_ones_end_iteration() {
        let body = Body::new(&[1, 2, 3, 4])
            .with(7, &[9])
            .with(8 | 0x8000, &[1, 2, 3, 4, 5]);
        let found: Vec<_> = Attributes::after(&body.0, 4).collect();
        assert_eq!(found, [(7, &[9u8][..]), (8, &[1, 2, 3, 4, 5][..])]);
        for broken in [&[0u8, 0, 1, 0][..], &[3, 0, 1, 0], &[200, 0, 1, 0], &[1]] {
            assert_eq!(Attributes::after(broken, 0).count(), 0, "{broken:?}");
        }
    }

    #[test]
    fn truncated_messages_end_iteration() {
        let mut data = vec![0u8; 16];
        data[0] = 16;
        assert_eq!(Messages(&data).count(), 1);
        data[0] = 17;
        assert_eq!(Messages(&data).count(), 0);
        data[0] = 3;
        assert_eq!(Messages(&data).count(), 0);
    }
}
