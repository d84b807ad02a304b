// SPDX-License-Identifier: Apache-2.0
//! Packet sockets (`packet(7)`): what capture and forged frames are made of.
//!
//! Never parses or builds a frame.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{check, set_option};

/// `PACKET_IGNORE_OUTGOING` of `linux/if_packet.h` (4.20).
const PACKET_IGNORE_OUTGOING: i32 = 23;
/// `PACKET_QDISC_BYPASS` of `linux/if_packet.h` (3.14).
const PACKET_QDISC_BYPASS: i32 = 20;

/// As `sockaddr_ll` has it; libc's constant is an `int`.
const AF_PACKET: u16 = 17;

/// A packet socket that sees or sends whole Ethernet frames.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One frame as the socket delivered it.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes of the frame in the buffer.
    pub len: usize,
    /// Interface on which it was seen.
    pub ifindex: i32,
}

/// Index of an interface in the calling thread's network namespace.
///
/// # Errors
/// ENODEV if there is none of this name.
pub fn ifindex(name: &str) -> io::Result<i32> {
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the name is NUL-terminated and lives until the call returns.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(index).map_err(io::Error::other)
}

fn link_address(index: i32, protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = AF_PACKET;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index;
    address
}

impl PacketSocket {
    /// A socket in the calling thread's namespace that sees nothing yet.
    ///
    /// # Errors
    /// EPERM without CAP_NET_RAW.
    pub fn new() -> io::Result<Self> {
        // SAFETY: socket takes integers and returns a new descriptor or an error.
        let fd = check(unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0)
        })?;
        // SAFETY: the kernel has just returned this descriptor to us, nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Frames that leave through the interface are not delivered (from then on).
    ///
    /// # Errors
    /// ENOPROTOOPT before 4.20.
    pub fn ignore_outgoing(&self) -> io::Result<()> {
        set_option(self, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    }

    /// Sent frames skip the queueing discipline, and with it every egress classifier.
    ///
    /// # Errors
    /// Whatever `setsockopt` reports.
    pub fn bypass_qdisc(&self) -> io::Result<()> {
        set_option(self, libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    }

    /// Begins to receive every frame of one interface, or of all (index 0).
    ///
    /// # Errors
    /// ENODEV, EPERM.
    pub fn bind_all(&self, index: i32) -> io::Result<()> {
        let all = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?;
        let address = link_address(index, all);
        let len = address_len()?;
        // SAFETY: pointer and length describe a live sockaddr_ll.
        check(unsafe { libc::bind(self.0.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
    }

    /// Takes one frame without waiting; none if there is none.
    ///
    /// # Errors
    /// ENETDOWN and the like.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        let mut address = link_address(0, 0);
        let mut len = address_len()?;
        // SAFETY: buffer and address are live, exclusively borrowed, and given with their lengths.
        let got = unsafe {
            libc::recvfrom(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
                (&raw mut address).cast(),
                &raw mut len,
            )
        };
        match usize::try_from(got) {
            Ok(len) => Ok(Some(Received {
                len,
                ifindex: address.sll_ifindex,
            })),
            Err(_negative) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Frames lost for want of buffer since the last call.
    ///
    /// # Errors
    /// Whatever `getsockopt` reports.
    pub fn take_lost(&self) -> io::Result<u32> {
        let mut stats = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let size = size_of::<libc::tpacket_stats>();
        let mut len = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: pointer and length describe a live, exclusively borrowed structure.
        check(unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut len,
            )
        })?;
        Ok(stats.tp_drops)
    }

    /// Sends one whole frame through the interface.
    ///
    /// # Errors
    /// Whatever `sendto` reports.
    pub fn send(&self, index: i32, frame: &[u8]) -> io::Result<()> {
        let ethertype = frame
            .get(12..14)
            .map_or(0, |t| u16::from_be_bytes([t[0], t[1]]));
        let address = link_address(index, ethertype);
        let len = address_len()?;
        // SAFETY: frame and address are live for the call, with their own lengths.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                len,
            )
        };
        if usize::try_from(sent) == Ok(frame.len()) {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn address_len() -> io::Result<libc::socklen_t> {
    libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)
}
