// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! All maps, and the look-up traits of `mesh_common` over them.
//!
//! Hash maps that user space updates while hooks read them are not preallocated: an update then
//! replaces the element as a whole, and a reader keeps the old one.
//!
//! Look-ups copy their key to the stack: up to Linux 6.1 the verifier refuses a key in memory that a
//! global function was given by pointer.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockMap};
use mesh_common::counter::COUNTERS as COUNTER_SLOTS;
use mesh_common::flow::{Flow, FlowSlot};
use mesh_common::identity::Peer;
use mesh_common::maps::{
    CapturedKey, ConnectionKey, DropRate, EVENT_BYTES, FragmentKey, FragmentVerdict, MARK_STEERED,
    MAX_BACKENDS, MAX_CAPTURED, MAX_FLOWS, MAX_FRAGMENTS, MAX_LOCAL_ADDRS, MAX_MARKED,
    MAX_OLD_CONNECTIONS, MAX_PEERS, MAX_POD_CIDRS, MAX_PODS, MAX_POLICY_CIDRS, MAX_POLICY_PORTS,
    MAX_POLICY_SELECTS, MAX_POLICY_SETS, MAX_PORT_MODES, MAX_SERVICES, MAX_TUNNELS,
};
use mesh_common::path::Peers;
use mesh_common::pod::{GatePod, LocalAddr, ModeKey, PodIndex, PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, Policies, PolicySetId, PortKey, Question, SelectKey, SetHead,
};
use mesh_common::service::{self, BackendKey, Service, ServiceKey, Services};
use mesh_common::socket::{Exempt, SocketState, Translations};
use mesh_common::{Addr, Endpoint, Protocol, Reason, Verdict};

use crate::decision;

#[map]
static PODS: HashMap<PodIndex, PodState> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
static PODS_BY_NETNS: HashMap<u64, PodIndex> =
    HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
static PODS_BY_ADDR: HashMap<Addr, LocalAddr> =
    HashMap::with_max_entries(MAX_LOCAL_ADDRS, BPF_F_NO_PREALLOC);
#[map]
static PODS_BY_LINK: HashMap<u32, GatePod> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
static PEERS: HashMap<Addr, Peer> = HashMap::with_max_entries(MAX_PEERS, BPF_F_NO_PREALLOC);
#[map]
static POD_CIDRS: LpmTrie<Addr, u32> = LpmTrie::with_max_entries(MAX_POD_CIDRS, BPF_F_NO_PREALLOC);
#[map]
static POLICY_SETS: HashMap<PolicySetId, SetHead> =
    HashMap::with_max_entries(MAX_POLICY_SETS, BPF_F_NO_PREALLOC);
#[map]
static POLICY_SELECT: HashMap<SelectKey, Lists> =
    HashMap::with_max_entries(MAX_POLICY_SELECTS, BPF_F_NO_PREALLOC);
#[map]
static POLICY_CIDRS: LpmTrie<CidrKey, ListId> =
    LpmTrie::with_max_entries(MAX_POLICY_CIDRS, BPF_F_NO_PREALLOC);
#[map]
static POLICY_PORTS: LpmTrie<PortKey, Answer> =
    LpmTrie::with_max_entries(MAX_POLICY_PORTS, BPF_F_NO_PREALLOC);
#[map]
static PORT_MODES: HashMap<ModeKey, u8> =
    HashMap::with_max_entries(MAX_PORT_MODES, BPF_F_NO_PREALLOC);
#[map]
static SERVICES: HashMap<ServiceKey, Service> =
    HashMap::with_max_entries(MAX_SERVICES, BPF_F_NO_PREALLOC);
#[map]
static BACKENDS: HashMap<BackendKey, Endpoint> =
    HashMap::with_max_entries(MAX_BACKENDS, BPF_F_NO_PREALLOC);
/// The agent's listeners in pods' network namespaces, four for each pod.
#[map]
pub(crate) static LISTENERS: SockMap = SockMap::with_max_entries(4 * MAX_PODS, 0);
#[map]
pub(crate) static FLOWS: HashMap<FlowSlot, Flow> =
    HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
/// The config generation, in element 0: the agent increments it after each change of pods, peers or
/// policy.
#[map]
static CONFIG_GENERATION: Array<u64> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static CAPTURED: LruHashMap<CapturedKey, Endpoint> =
    LruHashMap::with_max_entries(MAX_CAPTURED, 0);
#[map]
pub(crate) static OLD_CONNECTIONS: HashMap<ConnectionKey, u32> =
    HashMap::with_max_entries(MAX_OLD_CONNECTIONS, BPF_F_NO_PREALLOC);
/// Open tunnels to and from applications' own ports.
#[map]
pub(crate) static TUNNELS: HashMap<ConnectionKey, u32> =
    HashMap::with_max_entries(MAX_TUNNELS, BPF_F_NO_PREALLOC);
/// Connections to a pod whose SYN has the tunnel option, until they are established.
#[map]
pub(crate) static MARKED: LruHashMap<ConnectionKey, u32> =
    LruHashMap::with_max_entries(MAX_MARKED, 0);
#[map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentVerdict> =
    LruHashMap::with_max_entries(MAX_FRAGMENTS, 0);
#[map]
pub(crate) static DROP_RATE: HashMap<PodIndex, DropRate> =
    HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(EVENT_BYTES, 0);
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_SLOTS, 0);
#[btf_map]
pub(crate) static EXEMPT: SkStorage<Exempt> = SkStorage::new();
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketState> = SkStorage::new();
#[btf_map]
pub(crate) static VIPS: SkStorage<Translations> = SkStorage::new();

/// Returns the config generation. A caller that stores a decision reads the generation before the
/// decision is made, so that the decision is never taken for newer than it is.
#[inline(always)]
pub(crate) fn config_generation() -> u64 {
    // SAFETY: the element lives as long as the program.
    CONFIG_GENERATION
        .get(0)
        .map_or(0, |generation| unsafe { ptr::read_volatile(generation) })
}

/// Returns the value of a socket's storage, or null. With `create`, a missing value is made.
#[inline(always)]
pub(crate) fn storage<S, T>(map: &'static S, sk: *mut bpf_sock, create: bool) -> *mut T {
    let flags = if create {
        u64::from(BPF_SK_STORAGE_GET_F_CREATE)
    } else {
        0
    };
    let map: *mut c_void = ptr::from_ref(map).cast_mut().cast();
    // SAFETY: `map` is a socket storage of `T`; `sk` was checked or comes from the context.
    unsafe { bpf_sk_storage_get(map, sk.cast(), ptr::null_mut(), flags) }.cast()
}

/// The look-up traits of `mesh_common` over the maps.
pub(crate) struct Tables;

/// Returns whether the agent listens in a slot of `LISTENERS`. Without a listener, a captured
/// connection would time out: the kernel sends no reset from an IPv4 address that is not its own.
#[inline(always)]
pub(crate) fn agent_listens(slot: u32) -> bool {
    let map = (&raw const LISTENERS).cast_mut().cast();
    // SAFETY: the map's keys are 4 bytes, and it outlives the program.
    let socket = unsafe { bpf_map_lookup_elem(map, (&raw const slot).cast()) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the look-up took a reference, which is released here, once.
    let _ = unsafe { bpf_sk_release(socket) };
    true
}

impl Policies for Tables {
    #[inline(always)]
    fn head(&self, set: PolicySetId) -> Option<SetHead> {
        // SAFETY: not preallocated, and read at once.
        unsafe { POLICY_SETS.get(set) }.copied()
    }

    #[inline(always)]
    fn select(&self, key: &SelectKey) -> Option<Lists> {
        // SAFETY: as above.
        unsafe { POLICY_SELECT.get(*key) }.copied()
    }

    #[inline(always)]
    fn cidr(&self, key: &CidrKey) -> Option<ListId> {
        longest(&POLICY_CIDRS, CidrKey::FIXED_BITS + 128, *key).copied()
    }

    #[inline(always)]
    fn answer(&self, key: &PortKey) -> Option<&Answer> {
        longest(&POLICY_PORTS, PortKey::FIXED_BITS + 16, *key)
    }

    #[inline(always)]
    fn decide(&self, q: &Question) -> Verdict {
        let mut verdict = Verdict::refuse(Reason::PolicyMissing);
        match decision::mesh_decide(q, &mut verdict) {
            decision::ANSWERED => verdict,
            _ => Verdict::refuse(Reason::PolicyMissing),
        }
    }
}

/// A key of a longest-prefix map. Aya's key type is packed, so its fields are copied byte by byte.
#[repr(C)]
struct Key<K> {
    bits: u32,
    data: K,
}

/// Returns the value of the longest prefix that contains `data`.
#[inline(always)]
fn longest<K, V>(map: &'static LpmTrie<K, V>, bits: u32, data: K) -> Option<&'static V> {
    const { assert!(align_of::<K>() == 4, "a key without padding") };
    let key = Key { bits, data };
    let map = core::ptr::from_ref(map).cast_mut().cast();
    // SAFETY: the map is one of `K` and `V`, and the key has the layout the kernel asks for.
    let value = unsafe { bpf_map_lookup_elem(map, (&raw const key).cast()) };
    // SAFETY: null, or a value that lives until the program ends.
    unsafe { value.cast::<V>().as_ref() }
}

impl Peers for Tables {
    #[inline(always)]
    fn peer(&self, addr: &Addr) -> Option<Peer> {
        // SAFETY: not preallocated, and read at once.
        unsafe { PEERS.get(*addr) }.copied()
    }

    #[inline(always)]
    fn local(&self, addr: &Addr) -> Option<PodView> {
        pod(pod_by_addr(addr)?).map(|state| state.view)
    }

    #[inline(always)]
    fn in_pod_cidr(&self, addr: &Addr) -> bool {
        longest(&POD_CIDRS, 128, *addr).is_some()
    }

    #[inline(always)]
    fn port_mode(&self, key: &ModeKey) -> Option<u8> {
        // SAFETY: not preallocated, and read at once.
        unsafe { PORT_MODES.get(*key) }.copied()
    }
}

impl Services for Tables {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        // SAFETY: not preallocated, and read at once.
        unsafe { SERVICES.get(*key) }.copied()
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<Endpoint> {
        // SAFETY: as above.
        unsafe { BACKENDS.get(*key) }.copied()
    }
}

/// Returns whether packets to an endpoint need service translation. The function has a stack frame of
/// its own, because the callers' stacks are full.
#[inline(never)]
pub(crate) fn is_virtual(to: &Endpoint, protocol: Protocol) -> bool {
    service::is_virtual(&Tables, to, protocol)
}

/// Returns the managed pod of a network namespace.
#[inline(always)]
pub(crate) fn pod_by_netns(cookie: u64) -> Option<PodIndex> {
    // SAFETY: not preallocated, and read at once.
    unsafe { PODS_BY_NETNS.get(cookie) }.copied()
}

/// Returns the managed pod of this node that has an address, with its interface.
#[inline(always)]
pub(crate) fn local(addr: &Addr) -> Option<LocalAddr> {
    // SAFETY: as above.
    unsafe { PODS_BY_ADDR.get(*addr) }.copied()
}

/// Returns the managed pod of this node that has an address.
#[inline(always)]
pub(crate) fn pod_by_addr(addr: &Addr) -> Option<PodIndex> {
    local(addr).map(|local| local.index)
}

/// Returns the gate's state of the pod behind a host-side interface, to be read in place.
#[inline(always)]
pub(crate) fn gate(link: u32) -> Option<&'static GatePod> {
    let pod = PODS_BY_LINK.get_ptr(link)?;
    // SAFETY: the element lives until the program ends.
    Some(unsafe { &*pod })
}

/// Returns whether an open connection of a pod is a tunnel, which only the agent's own sockets are. The
/// function has a stack frame of its own for the key, because the callers' stacks are full.
#[inline(never)]
pub(crate) fn is_tunnel(local: &Endpoint, remote: &Endpoint) -> bool {
    let key = ConnectionKey {
        local: *local,
        remote: *remote,
    };
    // SAFETY: only the key's presence is used.
    unsafe { TUNNELS.get(key) }.is_some()
}

/// Returns whether the SYN of a connection to a pod has the tunnel option, and records that the agent
/// gets the connection.
#[inline(never)]
pub(crate) fn steer_marked(local: &Endpoint, remote: &Endpoint) -> bool {
    let key = ConnectionKey {
        local: *local,
        remote: *remote,
    };
    let Some(mark) = MARKED.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: an aligned word of the map; every writer writes the same value.
    unsafe { mark.write_volatile(MARK_STEERED) };
    true
}

/// Returns whether a connection with a marked SYN was given to the agent. A marked SYN that belongs to
/// an existing connection does not make it a tunnel.
#[inline(never)]
pub(crate) fn is_steered(local: &Endpoint, remote: &Endpoint) -> bool {
    let key = ConnectionKey {
        local: *local,
        remote: *remote,
    };
    // SAFETY: a word, read once.
    unsafe { MARKED.get(key) }.is_some_and(|mark| *mark == MARK_STEERED)
}

/// Returns a pod's state, to be read in place.
#[inline(always)]
pub(crate) fn pod(index: PodIndex) -> Option<&'static PodState> {
    let state = PODS.get_ptr(index)?;
    // SAFETY: the element lives until the program ends; `decision` compares the two revisions.
    Some(unsafe { &*state })
}
