// SPDX-License-Identifier: Apache-2.0
//! Datapath operations for tasks that do not own the [`Datapath`](super::Datapath).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_common::counter::{COUNTERS, Counter};
use mesh_common::maps::{
    CapturedKey, ConnectionKey, MARK_STEERED, MAX_BACKENDS, MAX_MARKED, MAX_OLD_CONNECTIONS,
    MAX_PEERS, MAX_POD_CIDRS, MAX_PODS, MAX_POLICY_CIDRS, MAX_POLICY_PORTS, MAX_POLICY_SELECTS,
    MAX_POLICY_SETS, MAX_PORT_MODES, MAX_SERVICES, MAX_TUNNELS,
};
use mesh_common::settings::TUNNEL_PORT;
use mesh_common::socket::Exempt;
use mesh_common::{Endpoint, Port, Protocol};
use mesh_plan::Plan;
use zerocopy::{FromBytes as _, IntoBytes as _};

use mesh_sys::bpf;
use mesh_sys::sock_diag::{Socket, state};

/// The maps that a plan fills, with their capacities. Their usage comes from the plan.
const REPORTED: [(&str, u32); 10] = [
    ("PODS", MAX_PODS),
    ("PEERS", MAX_PEERS),
    ("POD_CIDRS", MAX_POD_CIDRS),
    ("POLICY_SETS", MAX_POLICY_SETS),
    ("POLICY_SELECT", MAX_POLICY_SELECTS),
    ("POLICY_CIDRS", MAX_POLICY_CIDRS),
    ("POLICY_PORTS", MAX_POLICY_PORTS),
    ("PORT_MODES", MAX_PORT_MODES),
    ("SERVICES", MAX_SERVICES),
    ("BACKENDS", MAX_BACKENDS),
];

/// The maps of connections, with their capacities. Each request counts their entries.
const COUNTED: [(&str, u32); 3] = [
    ("OLD_CONNECTIONS", MAX_OLD_CONNECTIONS),
    ("TUNNELS", MAX_TUNNELS),
    ("MARKED", MAX_MARKED),
];

/// Handles to the maps of the datapath. They are cheap to clone.
#[derive(Clone, Debug)]
pub struct Handles {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    exempt: OwnedFd,
    decided: OwnedFd,
    captured: OwnedFd,
    counters: OwnedFd,
    cpus: usize,
    usage: [AtomicU64; REPORTED.len()],
    counted: [OwnedFd; COUNTED.len()],
}

impl Handles {
    pub(super) fn open(pins: &Path) -> io::Result<Self> {
        let [old, tunnels, marked] = COUNTED.map(|(name, _)| bpf::open_pin(&pins.join(name)));
        Ok(Self {
            inner: Arc::new(Inner {
                exempt: bpf::open_pin(&pins.join("EXEMPT"))?,
                decided: bpf::open_pin(&pins.join("SOCKETS"))?,
                captured: bpf::open_pin(&pins.join("CAPTURED"))?,
                counters: bpf::open_pin(&pins.join("COUNTERS"))?,
                cpus: possible_cpus()?,
                usage: std::array::from_fn(|_| AtomicU64::new(0)),
                counted: [old?, tunnels?, marked?],
            }),
        })
    }

    /// Exempts a socket of the agent from the hooks. With `marked`, its SYN carries the TCP option that marks a
    /// tunnel. Call this before connect().
    ///
    /// # Errors
    /// The descriptor is not a socket.
    pub fn exempt(&self, socket: BorrowedFd<'_>, marked: bool) -> io::Result<()> {
        let value = Exempt {
            exempt: if marked {
                Exempt::MARKED
            } else {
                Exempt::PLAIN
            },
            spare: 0,
        };
        bpf::put(
            self.inner.exempt.as_fd(),
            &socket.as_raw_fd().to_ne_bytes(),
            value.as_bytes(),
        )
    }

    /// Returns the socket storage map in which the hooks keep their decision about a socket.
    #[must_use]
    pub fn decided(&self) -> BorrowedFd<'_> {
        self.inner.decided.as_fd()
    }

    /// Returns and removes the original service address of a captured connection.
    #[must_use]
    pub fn take_captured(
        &self,
        netns_cookie: u64,
        to: Endpoint,
        local_port: Port,
    ) -> Option<Endpoint> {
        let key = CapturedKey {
            netns_cookie,
            to,
            local_port,
            pad: 0,
        };
        let mut value = [0u8; size_of::<Endpoint>()];
        let map = self.inner.captured.as_fd();
        if !matches!(bpf::get(map, key.as_bytes(), &mut value), Ok(true)) {
            return None;
        }
        // The map is an LRU: an entry that is not removed here is evicted later.
        bpf::remove(map, key.as_bytes()).ok()?;
        Endpoint::read_from_bytes(&value).ok()
    }

    /// Returns whether a socket is the agent's endpoint of a tunnel, also during the handshake. Returns false if
    /// the maps cannot be read.
    #[must_use]
    pub fn is_tunnel(&self, socket: &Socket) -> bool {
        if socket.protocol != Protocol::TCP {
            return false;
        }
        let key = ConnectionKey {
            local: socket.local,
            remote: socket.remote,
        };
        let value_in = |map: &OwnedFd| {
            let mut value = [0u8; size_of::<u32>()];
            let found = bpf::get(map.as_fd(), key.as_bytes(), &mut value);
            matches!(found, Ok(true)).then_some(u32::from_ne_bytes(value))
        };
        // The order matters: a connection that becomes established moves from the first map to the second.
        let [_, tunnels, marked] = &self.inner.counted;
        // The sk_lookup hook gives connection requests to the agent: those for the tunnel port, and those that
        // it has marked.
        let begins = socket.state == state::SYN_RECV
            && (socket.local.port == TUNNEL_PORT || value_in(marked) == Some(MARK_STEERED));
        begins || value_in(tunnels).is_some()
    }

    /// Returns the sum of a counter over all CPUs; 0 if the map cannot be read.
    #[must_use]
    pub fn counter(&self, counter: Counter) -> u64 {
        debug_assert!(
            counter.index() < COUNTERS,
            "the map has an entry for each counter"
        );
        let mut values = vec![0u8; 8 * self.inner.cpus];
        let key = counter.index().to_ne_bytes();
        match bpf::get(self.inner.counters.as_fd(), &key, &mut values) {
            Ok(true) => values
                .as_chunks::<8>()
                .0
                .iter()
                .map(|bytes| u64::from_ne_bytes(*bytes))
                .sum(),
            _ => 0,
        }
    }

    /// Returns name, entries and capacity of the maps that a plan fills and of the maps of connections. Omits maps
    /// that cannot be read.
    #[must_use]
    pub fn map_usage(&self) -> Vec<(&'static str, u64, u64)> {
        let filled = REPORTED.iter().zip(&self.inner.usage);
        let filled = filled.map(|((name, capacity), used)| {
            (*name, used.load(Ordering::Relaxed), u64::from(*capacity))
        });
        let sizes = (size_of::<ConnectionKey>(), size_of::<u32>());
        let counted = COUNTED.iter().zip(&self.inner.counted);
        let counted = counted.filter_map(|((name, capacity), map)| {
            let used = bpf::count(map.as_fd(), sizes).ok()?;
            Some((*name, used, u64::from(*capacity)))
        });
        filled.chain(counted).collect()
    }

    /// Stores the usage of the maps that `plan` fills.
    pub(super) fn note(&self, plan: &Plan) {
        for (map, entries, _) in plan.fill() {
            let slots = REPORTED.iter().zip(&self.inner.usage);
            for (_, slot) in slots.filter(|((name, _), _)| *name == map) {
                slot.store(entries as u64, Ordering::Relaxed);
            }
        }
    }
}

/// Returns the number of values of a per-CPU map: the number of possible CPUs, from a range list.
fn possible_cpus() -> io::Result<usize> {
    use std::io::Read as _;
    let mut text = String::new();
    File::open("/sys/devices/system/cpu/possible")?.read_to_string(&mut text)?;
    text.trim()
        .rsplit([',', '-'])
        .next()
        .and_then(|last| last.parse::<usize>().ok())
        .map(|last| last + 1)
        .ok_or_else(|| io::Error::other(format!("invalid list of CPUs: {text:?}")))
}
