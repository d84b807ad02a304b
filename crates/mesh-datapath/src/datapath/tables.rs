// SPDX-License-Identifier: Apache-2.0
//! Writes, removes and reads the entries of the plan's maps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aya::maps::lpm_trie::Key as LpmKey;
use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError, SockMap};
use aya::{Ebpf, Pod};
use mesh_common::flow::{Flow, FlowSlot};
use mesh_common::identity::Peer;
use mesh_common::maps::ConnectionKey;
use mesh_common::pod::{GatePod, LocalAddr, ModeKey, PodIndex, PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, PolicySetId, PortKey, SelectKey, SetHead,
};
use mesh_common::service::{BackendKey, Service, ServiceKey};
use mesh_common::{Addr, Endpoint};
use mesh_plan::Plan;
use mesh_plan::plan::{Entry, Key, LocalPod, MapOp, Prefix};

use super::{Datapath, Error};
use mesh_sys::clock;

/// The maps that user space writes.
pub(crate) struct Maps {
    pub(super) pods: HashMap<MapData, PodIndex, PodState>,
    pub(super) by_netns: HashMap<MapData, u64, PodIndex>,
    pub(super) by_addr: HashMap<MapData, Addr, LocalAddr>,
    pub(super) by_link: HashMap<MapData, u32, GatePod>,
    pub(super) listeners: SockMap<MapData>,
    pub(super) flows: HashMap<MapData, FlowSlot, Flow>,
    config_generation: Array<MapData, u64>,
    pub(super) old_connections: HashMap<MapData, ConnectionKey, u32>,
    peers: HashMap<MapData, Addr, Peer>,
    pod_cidrs: LpmTrie<MapData, Addr, u32>,
    sets: HashMap<MapData, PolicySetId, SetHead>,
    selects: HashMap<MapData, SelectKey, Lists>,
    cidrs: LpmTrie<MapData, CidrKey, ListId>,
    ports: LpmTrie<MapData, PortKey, Answer>,
    port_modes: HashMap<MapData, ModeKey, u8>,
    services: HashMap<MapData, ServiceKey, Service>,
    backends: HashMap<MapData, BackendKey, Endpoint>,
}

/// Takes a map with its type out of the object.
macro_rules! take {
    ($object:expr, $name:literal) => {
        $object
            .take_map($name)
            .ok_or(Error::Missing($name))?
            .try_into()
            .map_err(|source| failed("open", $name, source))?
    };
}

fn failed(action: impl Into<String>, map: &'static str, source: MapError) -> Error {
    Error::Map {
        action: action.into(),
        map,
        source: Box::new(source),
    }
}

impl Maps {
    pub(super) fn take(object: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            pods: take!(object, "PODS"),
            by_netns: take!(object, "PODS_BY_NETNS"),
            by_addr: take!(object, "PODS_BY_ADDR"),
            by_link: take!(object, "PODS_BY_LINK"),
            listeners: take!(object, "LISTENERS"),
            flows: take!(object, "FLOWS"),
            config_generation: take!(object, "CONFIG_GENERATION"),
            old_connections: take!(object, "OLD_CONNECTIONS"),
            peers: take!(object, "PEERS"),
            pod_cidrs: take!(object, "POD_CIDRS"),
            sets: take!(object, "POLICY_SETS"),
            selects: take!(object, "POLICY_SELECT"),
            cidrs: take!(object, "POLICY_CIDRS"),
            ports: take!(object, "POLICY_PORTS"),
            port_modes: take!(object, "PORT_MODES"),
            services: take!(object, "SERVICES"),
            backends: take!(object, "BACKENDS"),
        })
    }
}

/// Returns whether an operation can change a decision of the hooks. Services are looked up before the decision.
fn decides(op: &MapOp) -> bool {
    !matches!(
        op,
        MapOp::Put(Entry::Service(..) | Entry::Backend(..))
            | MapOp::Remove(Key::Service(_) | Key::Backend(_))
    )
}

/// Writes an entry.
pub(super) fn put<K: Pod + std::fmt::Debug, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: K,
    value: V,
) -> Result<(), Error> {
    map.insert(key, value, 0)
        .map_err(|source| failed(format!("write {key:?} to"), name, source))
}

/// Removes an entry. A missing entry is not an error.
pub(super) fn remove<K: Pod + std::fmt::Debug, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: K,
) -> Result<(), Error> {
    absent_is_fine(map.remove(&key))
        .map_err(|source| failed(format!("remove {key:?} from"), name, source))
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(err)) if err.io_error.raw_os_error() == Some(libc::ENOENT) => {
            Ok(())
        }
        other => other,
    }
}

fn put_prefix<K: Pod + std::fmt::Debug, V: Pod>(
    map: &mut LpmTrie<MapData, K, V>,
    name: &'static str,
    key: Prefix<K>,
    value: V,
) -> Result<(), Error> {
    map.insert(&LpmKey::new(key.bits, key.data), value, 0)
        .map_err(|source| failed(format!("write {key:?} to"), name, source))
}

fn remove_prefix<K: Pod + std::fmt::Debug, V: Pod>(
    map: &mut LpmTrie<MapData, K, V>,
    name: &'static str,
    key: Prefix<K>,
) -> Result<(), Error> {
    absent_is_fine(map.remove(&LpmKey::new(key.bits, key.data)))
        .map_err(|source| failed(format!("remove {key:?} from"), name, source))
}

/// Returns all entries of a hash map. The agent must not write the map meanwhile: entries could be missing or
/// returned twice.
pub(super) fn all<K: Pod + Ord, V: Pod>(
    map: &HashMap<MapData, K, V>,
    name: &'static str,
) -> Result<BTreeMap<K, V>, Error> {
    map.iter()
        .collect::<Result<_, _>>()
        .map_err(|source| failed("read", name, source))
}

fn all_prefixes<K: Pod + Ord, V: Pod>(
    map: &LpmTrie<MapData, K, V>,
    name: &'static str,
) -> Result<BTreeMap<Prefix<K>, V>, Error> {
    map.iter()
        .map(|item| {
            item.map(|(key, value)| {
                (
                    Prefix {
                        bits: key.prefix_len(),
                        data: key.data(),
                    },
                    value,
                )
            })
        })
        .collect::<Result<_, _>>()
        .map_err(|source| failed("read", name, source))
}

impl Datapath {
    /// Applies the operations in order.
    ///
    /// # Errors
    /// The first operation that failed. Earlier operations are applied; applying all of them again is safe.
    pub fn apply(&mut self, ops: &[MapOp]) -> Result<(), Error> {
        let applied = self.apply_each(ops);
        // Operations before a failure also count.
        if ops.iter().any(decides) {
            self.next_generation()?;
        }
        applied
    }

    /// Increments the config generation after a configuration change, so that the hooks re-evaluate cached flows.
    pub(super) fn next_generation(&mut self) -> Result<(), Error> {
        let map = &mut self.maps.config_generation;
        map.get(&0, 0)
            .and_then(|generation| map.set(0, generation.wrapping_add(1), 0))
            .map_err(|source| failed("increment the generation in", "CONFIG_GENERATION", source))
    }

    fn apply_each(&mut self, ops: &[MapOp]) -> Result<(), Error> {
        let mut put = false;
        for op in ops {
            match op {
                MapOp::Put(entry) => {
                    self.put_entry(entry)?;
                    put = true;
                }
                MapOp::Remove(key) => {
                    // A running program that read the previous reference to this entry can still look the
                    // entry up.
                    if std::mem::take(&mut put)
                        && let Err(error) = clock::wait_for_programs()
                    {
                        mesh_log::warn_limited!(
                            "membarrier",
                            error,
                            "cannot wait for running eBPF programs: a connection may be denied wrongly \
                             during a policy change"
                        );
                    }
                    self.remove_key(key)?;
                }
            }
        }
        Ok(())
    }

    /// Stores the usage of the maps that `plan` fills, for metrics.
    pub fn note(&self, plan: &Plan) {
        self.handles.note(plan);
    }

    fn put_entry(&mut self, entry: &Entry) -> Result<(), Error> {
        let maps = &mut self.maps;
        match entry {
            Entry::Peer(key, value) => put(&mut maps.peers, "PEERS", *key, *value),
            Entry::PodCidr(key) => put_prefix(&mut maps.pod_cidrs, "POD_CIDRS", *key, 1),
            Entry::Set(key, value) => put(&mut maps.sets, "POLICY_SETS", *key, *value),
            Entry::Select(key, value) => put(&mut maps.selects, "POLICY_SELECT", *key, *value),
            Entry::Cidr(key, value) => put_prefix(&mut maps.cidrs, "POLICY_CIDRS", *key, *value),
            Entry::Port(key, value) => put_prefix(&mut maps.ports, "POLICY_PORTS", *key, *value),
            Entry::PortMode(key, value) => put(&mut maps.port_modes, "PORT_MODES", *key, *value),
            Entry::Service(key, value) => put(&mut maps.services, "SERVICES", *key, *value),
            Entry::Backend(key, value) => put(&mut maps.backends, "BACKENDS", *key, *value),
            Entry::Pod(uid, view) => {
                let index = self
                    .by_uid
                    .get(uid)
                    .copied()
                    .ok_or_else(|| Error::UnknownPod(uid.clone()))?;
                self.switch_pod(index, view)
            }
        }
    }

    fn remove_key(&mut self, key: &Key) -> Result<(), Error> {
        let maps = &mut self.maps;
        match key {
            Key::Peer(key) => remove(&mut maps.peers, "PEERS", *key),
            Key::PodCidr(key) => remove_prefix(&mut maps.pod_cidrs, "POD_CIDRS", *key),
            Key::Set(key) => remove(&mut maps.sets, "POLICY_SETS", *key),
            Key::Select(key) => remove(&mut maps.selects, "POLICY_SELECT", *key),
            Key::Cidr(key) => remove_prefix(&mut maps.cidrs, "POLICY_CIDRS", *key),
            Key::Port(key) => remove_prefix(&mut maps.ports, "POLICY_PORTS", *key),
            Key::PortMode(key) => remove(&mut maps.port_modes, "PORT_MODES", *key),
            Key::Service(key) => remove(&mut maps.services, "SERVICES", *key),
            Key::Backend(key) => remove(&mut maps.backends, "BACKENDS", *key),
        }
    }

    /// Returns the content of the maps. Includes only pods that this process added; names are not in the maps.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn dump(&self) -> Result<Plan, Error> {
        let maps = &self.maps;
        let states = all(&maps.pods, "PODS")?;
        let pods = self
            .by_uid
            .iter()
            .filter_map(|(uid, index)| Some((uid.clone(), local_pod(&states.get(index)?.view))))
            .collect();
        Ok(Plan {
            peers: all(&maps.peers, "PEERS")?.into(),
            pod_cidrs: all_prefixes(&maps.pod_cidrs, "POD_CIDRS")?
                .into_keys()
                .collect(),
            sets: all(&maps.sets, "POLICY_SETS")?.into(),
            selects: all(&maps.selects, "POLICY_SELECT")?.into(),
            cidrs: all_prefixes(&maps.cidrs, "POLICY_CIDRS")?.into(),
            ports: all_prefixes(&maps.ports, "POLICY_PORTS")?.into(),
            port_modes: all(&maps.port_modes, "PORT_MODES")?.into(),
            services: all(&maps.services, "SERVICES")?.into(),
            backends: all(&maps.backends, "BACKENDS")?.into(),
            pods,
            names: mesh_plan::plan::Names::default(),
        })
    }
}

/// Returns a pod with the data that the maps contain.
fn local_pod(view: &PodView) -> LocalPod {
    let addresses = [view.v4, view.v6]
        .into_iter()
        .filter(|addr| !addr.is_none())
        .map(IpAddr::from)
        .collect();
    LocalPod {
        addresses,
        view: *view,
        ..LocalPod::default()
    }
}
