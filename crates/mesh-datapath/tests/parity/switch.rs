// SPDX-License-Identifier: Apache-2.0
//! Decisions while policy changes. Two revisions of policy allow the same client and deny the same other
//! client, but by other rules, labels and identities: any mixture of the two would allow the wrong
//! client or deny the right one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use aya::maps::lpm_trie::{Key as LpmKey, LpmTrie};
use aya::maps::{HashMap, Map, MapData};
use aya::programs::{TestRun as _, TestRunOptions};
use mesh_common::identity::Peer;
use mesh_common::pod::{PodIndex, PodState, PodView};
use mesh_common::policy::{
    Answer, CidrKey, ListId, Lists, PolicySetId, PortKey, SelectKey, SetHead,
};
use mesh_common::{Addr, Endpoint, Port};
use mesh_plan::cluster::{
    ClusterSnapshot, LabelTest, NamespaceMatch, ObjectName, ObjectRef, PeerMatch, Pod, Policy,
    PortMatch, PortRange, Requirement, Rule, RuleAction, Selector, Subject, Tier, Transport,
};
use mesh_plan::plan::{Entry, Key, MapOp};
use mesh_plan::{Plan, compile, diff};
use mesh_sys::clock::wait_for_programs;

use super::{Kernel, LINK, TCX_DROP, TCX_NEXT, context, fill, gate};
use crate::world::{Packet, SYN};

/// The number of decisions.
const READS: u64 = 1_000_000;
const SERVER: &str = "10.1.0.1";
/// The clients: the first is allowed in both revisions, the second denied in both.
const CLIENTS: [&str; 2] = ["10.1.1.1", "10.1.1.2"];
const PORT: u16 = 80;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn role(value: &str) -> Selector {
    Selector {
        requirements: vec![Requirement {
            key: "role".into(),
            test: LabelTest::In([value.to_owned()].into()),
        }],
    }
}

/// Returns the cluster of a revision, which allows one of two roles: the first client always has it.
fn cluster(revision: usize) -> ClusterSnapshot {
    let mut cluster = ClusterSnapshot::default();
    let roles = ["x", "y"];
    let mut pod = |name: &str, address: &str, node: &str, role: &str| {
        let pod = Pod {
            name: ObjectName::new("shop", name),
            uid: name.into(),
            labels: BTreeMap::from([("role".to_owned(), role.to_owned())]).into(),
            service_account: "default".to_owned(),
            node: node.to_owned(),
            addresses: [ip(address)].into(),
            ready: true,
            ..Pod::default()
        };
        cluster.pods.insert(name.into(), pod.into());
    };
    pod("server", SERVER, "n1", "server");
    pod("right", CLIENTS[0], "n2", roles[revision % 2]);
    pod("wrong", CLIENTS[1], "n2", roles[(revision + 1) % 2]);
    let rule = Rule {
        name: "ingress[0]".to_owned(),
        action: RuleAction::Allow,
        peers: Some(vec![PeerMatch::Pods {
            namespaces: NamespaceMatch::Name("shop".to_owned()),
            pods: role(roles[revision % 2]),
            service_accounts: None,
        }]),
        ports: Some(vec![PortMatch {
            transport: Some(Transport::Tcp),
            // Each revision has other ports, so that each update also removes entries.
            ports: PortRange::Range(
                PORT,
                PORT + 1 + u16::try_from(revision % 1000).expect("small"),
            ),
        }]),
    };
    let policy = Policy {
        tier: Tier::Namespaced,
        subject: Subject::Pods {
            namespace: "shop".to_owned(),
            pods: role("server"),
        },
        ingress: Some(vec![rule]),
        egress: None,
        audit: false,
    };
    let object = ObjectRef::new("NetworkPolicy", "shop", "server");
    cluster.policies.insert(object, policy.into());
    cluster
}

/// Returns the plan of a revision. Pods are gated, and silent, so that the gate decides TCP.
fn in_force(revision: usize) -> Plan {
    let (mut plan, rejections) = compile(&cluster(revision), "n1");
    assert_eq!(rejections, []);
    for pod in plan.pods.values_mut() {
        pod.view.flags |= PodState::GATED | PodState::SILENT;
    }
    plan
}

type Lpm<K, V> = LpmTrie<MapData, K, V>;

/// The maps as the writer uses them.
struct Tables {
    pods: HashMap<MapData, PodIndex, PodState>,
    peers: HashMap<MapData, Addr, Peer>,
    sets: HashMap<MapData, PolicySetId, SetHead>,
    selects: HashMap<MapData, SelectKey, Lists>,
    cidrs: Lpm<CidrKey, ListId>,
    ports: Lpm<PortKey, Answer>,
    revision: u64,
}

impl Tables {
    fn take(kernel: &mut Kernel) -> Self {
        let mut take = |name: &str| -> Map { kernel.object.take_map(name).expect(name) };
        Self {
            pods: take("PODS").try_into().expect("a hash"),
            peers: take("PEERS").try_into().expect("a hash"),
            sets: take("POLICY_SETS").try_into().expect("a hash"),
            selects: take("POLICY_SELECT").try_into().expect("a hash"),
            cidrs: take("POLICY_CIDRS").try_into().expect("prefixes"),
            ports: take("POLICY_PORTS").try_into().expect("prefixes"),
            revision: 1,
        }
    }

    /// Applies operations in their order, as the agent does.
    fn apply(&mut self, ops: &[MapOp]) {
        let mut put = false;
        for op in ops {
            match op {
                MapOp::Put(entry) => {
                    self.put(entry);
                    put = true;
                }
                MapOp::Remove(key) => {
                    if std::mem::take(&mut put) {
                        wait_for_programs().expect("the kernel waits");
                    }
                    self.remove(key);
                }
            }
        }
    }

    fn put(&mut self, entry: &Entry) {
        match entry {
            Entry::Peer(key, value) => self.peers.insert(key, value, 0),
            Entry::Set(key, value) => self.sets.insert(key, value, 0),
            Entry::Select(key, value) => self.selects.insert(key, value, 0),
            Entry::Cidr(key, value) => {
                let key = LpmKey::new(key.bits, key.data);
                self.cidrs.insert(&key, value, 0)
            }
            Entry::Port(key, value) => {
                let key = LpmKey::new(key.bits, key.data);
                self.ports.insert(&key, value, 0)
            }
            Entry::Pod(_, view) => self.switch(view),
            Entry::PodCidr(_) | Entry::PortMode(..) | Entry::Service(..) | Entry::Backend(..) => {
                unreachable!("{entry:?} in these revisions")
            }
        }
        .expect("the map takes it");
    }

    fn switch(&mut self, view: &PodView) -> Result<(), aya::maps::MapError> {
        self.revision += 1;
        let state = PodState {
            revision: self.revision,
            view: *view,
            link: LINK,
            revision_end: self.revision,
            ..PodState::default()
        };
        self.pods.insert(PodIndex(0), state, 0)
    }

    /// Removes a key; a missing key is not an error.
    fn remove(&mut self, key: &Key) {
        let _absent = match key {
            Key::Peer(key) => self.peers.remove(key),
            Key::Set(key) => self.sets.remove(key),
            Key::Select(key) => self.selects.remove(key),
            Key::Cidr(key) => self.cidrs.remove(&LpmKey::new(key.bits, key.data)),
            Key::Port(key) => self.ports.remove(&LpmKey::new(key.bits, key.data)),
            Key::PodCidr(_) | Key::PortMode(_) | Key::Service(_) | Key::Backend(_) => {
                unreachable!("{key:?} in these revisions")
            }
        };
    }
}

fn packet(client: &str, number: u64) -> Packet {
    let at = |address: &str, port: u16| Endpoint::new(Addr::from(ip(address)), Port::new(port));
    let source = Port::new(20_000 + u16::try_from(number % 10_000).expect("small"));
    Packet::segment(at(SERVER, PORT), at(client, PORT), source, SYN)
}

#[test]
fn policy_update_is_atomic_for_decisions() {
    let mut kernel = Kernel::load();
    let mut now = in_force(0);
    let views: Vec<PodView> = now.pods.values().map(|pod| pod.view).collect();
    fill(&mut kernel, &now, &views);
    let mut tables = Tables::take(&mut kernel);
    let (reads, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut revisions = 0;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let program = gate(&mut kernel.object, "gate_to_pod");
            let context = context(0);
            let mut wrong = Vec::new();
            for read in 0..READS {
                let client = usize::from(read % 2 == 1);
                let frame = packet(CLIENTS[client], read).directed(true).frame();
                let options = TestRunOptions {
                    data_in: Some(&frame),
                    ctx_in: Some(&context),
                    ..TestRunOptions::default()
                };
                let verdict = program.test_run(options).expect("it runs").return_value;
                if verdict != [TCX_NEXT, TCX_DROP][client] {
                    wrong.push((read, client, verdict));
                }
                reads.store(read + 1, Relaxed);
            }
            ended.store(true, Relaxed);
            wrong
        });
        while !ended.load(Relaxed) && !reader.is_finished() {
            revisions += 1;
            let next = in_force(revisions);
            tables.apply(&diff(&now, &next));
            now = next;
        }
        let wrong = reader.join().expect("no panic");
        assert!(
            wrong.is_empty(),
            "{} of {READS}: {:?}",
            wrong.len(),
            &wrong[..1]
        );
    });
    println!("{READS} reads over {revisions} revisions");
    assert!(revisions > 100, "only {revisions} revisions meanwhile");
    assert_eq!(reads.load(Relaxed), READS);
}

#[test]
fn operations_in_reverse_order_are_noticed() {
    let mut kernel = Kernel::load();
    let (old, new) = (in_force(0), in_force(1));
    let views: Vec<PodView> = old.pods.values().map(|pod| pod.view).collect();
    fill(&mut kernel, &old, &views);
    let mut tables = Tables::take(&mut kernel);
    let ask = |kernel: &mut Kernel| {
        let frame = packet(CLIENTS[0], 0).directed(true).frame();
        let context = context(0);
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let program = gate(&mut kernel.object, "gate_to_pod");
        program.test_run(options).expect("it runs").return_value
    };
    assert_eq!(ask(&mut kernel), TCX_NEXT);
    let mut ops = diff(&old, &new);
    ops.reverse();
    let mut refused = 0;
    for op in &ops {
        tables.apply(std::slice::from_ref(op));
        refused += u32::from(ask(&mut kernel) == TCX_DROP);
    }
    assert!(refused > 0, "what the other test looks for cannot be seen");
}
