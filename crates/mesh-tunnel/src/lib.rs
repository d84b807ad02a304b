// SPDX-License-Identifier: Apache-2.0
//! The tunnel protocol `mesh/1` (`docs/tunnel.md`), and the relay of application connections through
//! it.
//!
//! ```text
//! application -> relay -> Stream of a Carrier (tunnel: frames -> TLS records) -> other agent
//! ```
//! The crate moves bytes. It knows no pods, policies, certificates or metrics: who may open a
//! connection is decided by its caller, and what it needs of the caller (permits for CPU time, accounts
//! of buffers, an observer of the relay) are traits that the caller implements.

#![forbid(unsafe_code)]

pub mod buffers;
pub mod carrier;
pub mod frame;
pub mod records;
pub mod relay;
pub mod socket;
pub mod tls;
pub mod tunnel;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;

#[cfg(test)]
mod testing;

pub use self::carrier::{Carrier, CarrierError, Protocol, Stream, TakeError};
pub use self::frame::CloseReason;
pub use self::socket::Socket;
pub use self::tunnel::{Tunnel, TunnelError};

/// The only protocol of this version, as TLS certificates' handshakes negotiate it.
pub const ALPN: &[u8] = <Tunnel as Carrier>::PROTOCOL.alpn;
