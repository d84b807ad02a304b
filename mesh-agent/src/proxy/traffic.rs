// SPDX-License-Identifier: Apache-2.0
//! The counters of a connection that the proxy relays.

use std::os::fd::AsFd as _;

use mesh_sys::socket::tcp_info;
use mesh_tunnel::relay::RelayObserver;
use mesh_tunnel::{Socket, Tunnel};

use super::cpu_affinity;
use super::worker::Load;
use mesh_telemetry::record::Bytes;

/// Counts a relay's bytes, as seen from the application that opened the connection.
pub(crate) struct Traffic<'a> {
    bytes: &'a Bytes,
    /// At the source: the connection's part of its worker's load.
    load: Option<&'a Load>,
}

impl<'a> Traffic<'a> {
    /// Counts at the source's node.
    pub(crate) const fn of_source(bytes: &'a Bytes, load: &'a Load) -> Self {
        Self {
            bytes,
            load: Some(load),
        }
    }

    /// Counts at the destination's node.
    pub(crate) const fn of_destination(bytes: &'a Bytes) -> Self {
        Self { bytes, load: None }
    }
}

impl RelayObserver for Traffic<'_> {
    fn taken(&self, app: &Socket, bytes: u64) {
        if self.load.is_some() {
            self.bytes.add_sent(bytes);
        } else {
            self.bytes.add_received(bytes);
        }
        cpu_affinity::read(app);
    }

    fn delivered(&self, bytes: u64) {
        if self.load.is_some() {
            self.bytes.add_received(bytes);
        } else {
            self.bytes.add_sent(bytes);
        }
    }

    fn finished(&self) {
        if let Some(load) = self.load {
            load.give_back();
        }
    }
}

/// Round-trip time (microseconds) of a tunnel, and segments retransmitted since the last call.
pub(crate) fn transport(tunnel: &mut Tunnel) -> (u32, u32) {
    let info = tcp_info(tunnel.as_fd()).unwrap_or_default();
    (info.rtt_us, tunnel.new_retransmits(info.retransmits))
}
