// SPDX-License-Identifier: Apache-2.0
//! `control` over real namespaces and a kernel in memory.

use std::fs;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::rc::Rc;

use mesh_common::identity::{IdentityId, Peer};
use mesh_common::policy::{PolicySetId, SetHead};
use mesh_common::service::{Service, ServiceKey};
use mesh_common::{Addr, Endpoint, PodState, Port, Protocol};
use mesh_plan::plan::LocalPod;

use super::fake::{Fake, State};
use super::*;
use mesh_datapath::pods::find::ByAnnotation;
use mesh_datapath::pods::lab::{Lab, V4, V6, lab};
use mesh_identity::TrustDomain;
use mesh_sys::lab::ip;
use mesh_telemetry::record::close_reasons;
use tempfile::TempDir;

const UID: &str = "uid-a";

/// A plan with one pod, whose set exists.
fn plan(lab: &Lab, flags: u32, set: u64) -> Plan {
    let mut local = lab.local.clone();
    local.name.namespace = "shop".to_owned();
    local.name.name = "web".to_owned();
    local.service_account = "web".to_owned();
    local.view.flags = flags;
    local.view.set = PolicySetId(set);
    local.view.id = IdentityId(300);
    local.view.v4 = V4.parse::<std::net::IpAddr>().expect("valid").into();
    local.view.v6 = V6.parse::<std::net::IpAddr>().expect("valid").into();
    let mut plan = Plan::default();
    if set > 1 {
        plan.sets.insert(PolicySetId(set), SetHead::default());
    }
    plan.pods.insert(UID.to_owned(), local);
    plan
}

fn settings() -> Settings {
    Settings {
        node: "n1".to_owned(),
        silent: false,
        close_reporter: close_reasons().0,
        own_addresses: || Ok(BTreeSet::new()),
    }
}

fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").expect("valid")
}

struct Setup {
    control: Control<Fake, ByAnnotation>,
    in_force: watch::Receiver<Arc<InForce>>,
    kernel: Rc<State>,
    fake: Fake,
}

fn setup(fake: &Fake) -> Setup {
    let (publisher, in_force) = channel();
    let (changed, _) = mpsc::channel(4);
    let pods = Pods::new(ByAnnotation, changed);
    Setup {
        control: Control::new(settings(), fake.clone(), pods, publisher),
        in_force,
        kernel: Rc::clone(&fake.0),
        fake: fake.clone(),
    }
}

impl Setup {
    fn pass(&mut self, plan: Plan) -> Result<(), Error> {
        self.control.desired.plan = plan;
        self.control.reconcile()
    }

    fn in_force(&self) -> Arc<InForce> {
        Arc::clone(&self.in_force.borrow())
    }

    fn log(&self) -> Vec<String> {
        self.kernel.log.take()
    }
}

/// Runs in the lab's node, inside a runtime.
fn on_node<T>(lab: &Lab, f: impl FnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built");
    let run = || runtime.block_on(async { f() });
    lab.node.run(run).expect("it can be entered")
}

fn rules(lab: &Lab) -> String {
    lab.pod
        .run(|| ip(&["rule"]) + &ip(&["-6", "rule"]))
        .expect("it can be entered")
}

#[test]
fn pod_is_enrolled_after_its_listeners_and_policy_are_in_place() {
    let lab = lab(&[V4, V6]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        let log = setup.log();
        assert_eq!(log[0], format!("add {UID}"));
        assert!(
            log[1..5].iter().all(|l| l.starts_with("listener 0")),
            "{log:?}"
        );
        assert_eq!(log[5], "write");
        assert!(log[6].starts_with("old 0"), "{log:?}");
        assert_eq!(log[7], "set 0 enrolled 7");
        assert_eq!(log.len(), 8, "{log:?}");
        assert!(setup.fake.view(UID).unwrap().has(PodState::GATED));
        let in_force = setup.in_force();
        let (handle, local) = in_force.pod(UID).unwrap();
        assert!(handle.listeners.is_some());
        assert!(local.view.has(PodState::ENROLLED));
        let identities = in_force.identities(&trust_domain());
        let identities: Vec<String> = identities.iter().map(ToString::to_string).collect();
        assert_eq!(identities, ["spiffe://cluster.local/ns/shop/sa/web"]);
        assert_eq!(in_force.revision, 1);
        // A repeated pass changes nothing.
        setup.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        assert!(Arc::ptr_eq(&setup.in_force(), &in_force));
        assert_eq!(setup.log(), Vec::<String>::new());
    });
}

#[test]
fn new_pod_with_policy_is_isolated_until_its_policy_is_applied() {
    let lab = lab(&[V4, V6]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.kernel.fails_after.set(Some(0));
        assert!(setup.pass(plan(&lab, PodState::ENROLLED, 7)).is_err());
        let view = setup.fake.view(UID).unwrap();
        assert_eq!(view.set, PolicySetId::ISOLATED);
        setup.kernel.fails_after.set(None);
        setup.control.kernel.plan = None;
        setup.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        let view = setup.fake.view(UID).unwrap();
        assert_eq!(view.set, PolicySetId(7));
        assert!(view.has(PodState::ENROLLED));
    });
}

#[test]
fn failed_plan_is_retried_as_a_whole_while_the_old_policy_stays() {
    let lab = lab(&[V4, V6]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        setup.control.desired.plan = plan(&lab, PodState::ENROLLED, 8);
        setup.kernel.fails_after.set(Some(1));
        setup.control.progress.is_dirty = true;
        setup.control.reconcile_if_due();
        assert_eq!(setup.fake.view(UID).unwrap().set, PolicySetId(7));
        assert!(setup.in_force().status.error.is_some());
        setup.kernel.fails_after.set(None);
        let due = Instant::now() + Duration::from_secs(5);
        while setup.fake.view(UID).unwrap().set != PolicySetId(8) {
            assert!(Instant::now() < due, "not retried");
            std::thread::sleep(Duration::from_millis(10));
            setup.control.reconcile_if_due();
        }
        assert_eq!(setup.in_force().status.error, None);
    });
}

#[test]
fn services_that_fail_do_not_hold_up_policy() {
    let lab = lab(&[V4, V6]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        let mut next = plan(&lab, PodState::ENROLLED, 8);
        let key = ServiceKey::new(
            Endpoint::new(Addr::from(V4.parse::<IpAddr>().unwrap()), Port::new(80)),
            Protocol::TCP,
        );
        next.services.insert(key, Service::default());
        setup.control.desired.plan = next;
        setup.kernel.refuses_services.set(true);
        setup.control.progress.is_dirty = true;
        setup.control.reconcile_if_due();
        assert_eq!(setup.fake.view(UID).unwrap().set, PolicySetId(8));
        let error = setup.in_force().status.error.clone().unwrap();
        assert!(error.starts_with("cannot apply services"), "{error}");
        setup.kernel.refuses_services.set(false);
        setup.control.reconcile().unwrap();
        assert!(setup.kernel.plan.borrow().services.contains_key(&key));
    });
}

#[test]
fn restart_takes_over_pods_without_unenrolling_them() {
    let lab = lab(&[V4, V6]);
    let fake = Fake::default();
    on_node(&lab, || {
        let mut first = setup(&fake);
        first.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        drop(first);
        assert!(
            rules(&lab).contains("19781"),
            "dropping a handle removes nothing"
        );
        fake.restart();
        let mut second = setup(&fake);
        second.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        let log = second.log();
        assert!(log.iter().all(|line| !line.contains("plain")), "{log:?}");
        assert!(
            log.iter().any(|line| line.starts_with("listener")),
            "{log:?}"
        );
    });
}

#[test]
fn inherited_pods_are_removed_unless_the_cluster_has_them() {
    let lab = lab(&[V4, V6]);
    let fake = Fake::default();
    on_node(&lab, || {
        let mut first = setup(&fake);
        first.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        drop(first);
        fake.restart();
        let mut second = setup(&fake);
        let mut waits = plan(&lab, PodState::ENROLLED, 7);
        let there = waits.pods[UID].netns_path.clone();
        waits.pods.get_mut(UID).unwrap().netns_path = None;
        second.pass(waits).unwrap();
        assert_eq!(
            fake.0.pods.borrow().len(),
            1,
            "the slot may belong to the waiting pod"
        );
        assert!(second.control.pods.waiting.contains_key(UID));
        let mut other = plan(&lab, PodState::ENROLLED, 7);
        other.pods.get_mut(UID).unwrap().netns_path = there;
        second.pass(Plan::default()).unwrap();
        assert!(fake.0.pods.borrow().is_empty());
    });
}

#[test]
fn unenrolled_pod_is_switched_first_and_cleaned_up() {
    let lab = lab(&[V4, V6]);
    let before = rules(&lab);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.pass(plan(&lab, PodState::ENROLLED, 0)).unwrap();
        let during = rules(&lab);
        assert_ne!(during, before);
        setup.log();
        setup.pass(plan(&lab, 0, 0)).unwrap();
        assert_eq!(setup.log(), ["set 0 plain 0"]);
        assert_eq!(rules(&lab), before);
        let in_force = setup.in_force();
        assert!(in_force.pods[UID].listeners.is_none());
        assert!(in_force.identities(&trust_domain()).is_empty());
    });
}

#[test]
fn pod_with_the_tunnel_port_in_use_is_not_captured() {
    for (flags, set) in [
        (PodState::ENROLLED, PolicySetId(7)),
        (PodState::ENROLLED | PodState::STRICT, PolicySetId::ISOLATED),
    ] {
        let lab = lab(&[V4, V6]);
        let before = rules(&lab);
        let held = lab
            .pod
            .run(|| TcpListener::bind("0.0.0.0:15008"))
            .unwrap()
            .unwrap();
        on_node(&lab, || {
            let mut setup = setup(&Fake::default());
            setup.pass(plan(&lab, flags, 7)).unwrap();
            let view = setup.fake.view(UID).unwrap();
            assert!(!view.has(PodState::ENROLLED));
            assert_eq!(view.set, set);
            assert_eq!(rules(&lab), before);
            setup.control.publish_status();
            let trouble = setup.in_force().status.pods[UID].trouble.clone().unwrap();
            assert!(trouble.contains("15008"), "{trouble}");
            assert_eq!(
                setup.in_force().status.pods[UID].isolated,
                set == PolicySetId::ISOLATED
            );
            // After the application releases the port, the pod is enrolled without a new snapshot.
            drop(held);
            let due = Instant::now() + Duration::from_secs(10);
            while !setup.fake.view(UID).unwrap().has(PodState::ENROLLED) {
                assert!(Instant::now() < due, "not retried");
                std::thread::sleep(Duration::from_millis(20));
                setup.control.check();
                setup.control.reconcile_if_due();
            }
            assert_eq!(setup.fake.view(UID).unwrap().set, PolicySetId(7));
        });
    }
}

#[test]
fn strict_pod_without_a_gate_is_isolated_and_reported() {
    let lab = lab(&[V4, V6]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.kernel.ungated.set(true);
        setup
            .pass(plan(&lab, PodState::ENROLLED | PodState::STRICT, 7))
            .unwrap();
        assert_eq!(setup.fake.view(UID).unwrap().set, PolicySetId::ISOLATED);
        setup.control.publish_status();
        let status = setup.in_force().status.pods[UID].clone();
        assert!(status.isolated && !status.gated);
        assert!(status.trouble.unwrap().contains("not protected"));
    });
}

#[test]
fn removed_network_configuration_is_restored_and_counted() {
    let lab = lab(&[V4, V6]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        setup.pass(plan(&lab, PodState::ENROLLED, 0)).unwrap();
        let whole = rules(&lab);
        lab.pod
            .run(|| ip(&["rule", "del", "table", "19781"]))
            .unwrap();
        assert_ne!(rules(&lab), whole);
        setup.control.repair(UID);
        assert_eq!(rules(&lab).len(), whole.len());
        assert_eq!(setup.in_force().status.restored, 1);
    });
}

/// A connection in the pod to a peer on the node's side; both ends.
fn connection(lab: &Lab, peer: &str) -> (TcpStream, TcpStream) {
    let listener = lab
        .node
        .run(|| {
            ip(&["addr", "replace", &format!("{peer}/24"), "dev", "host7"]);
            TcpListener::bind(format!("{peer}:7000"))
        })
        .unwrap()
        .unwrap();
    let client = lab
        .pod
        .run(|| TcpStream::connect(format!("{peer}:7000")))
        .unwrap()
        .unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

fn with_peer(mut plan: Plan, peer: &str, flags: u32) -> Plan {
    let addr = peer.parse::<std::net::IpAddr>().expect("valid").into();
    let peer = Peer {
        id: IdentityId(400),
        flags,
        pad: 0,
    };
    plan.peers.insert(addr, peer);
    plan
}

const ELSEWHERE: &str = "10.244.9.77";
const READY: u32 = Peer::POD | Peer::ENROLLED | Peer::READY;

#[test]
fn connection_older_than_enrollment_is_kept_or_closed() {
    for (flags, peer, left) in [
        (PodState::ENROLLED, READY, true),
        (PodState::ENROLLED, READY | Peer::STRICT, false),
        (PodState::ENROLLED | PodState::STRICT, READY, false),
        (PodState::ENROLLED | PodState::REQUIRED, READY, false),
        (PodState::ENROLLED | PodState::REQUIRED, Peer::POD, false),
    ] {
        let lab = lab(&[V4, V6]);
        let (client, _server) = connection(&lab, ELSEWHERE);
        on_node(&lab, || {
            let mut setup = setup(&Fake::default());
            setup
                .pass(with_peer(plan(&lab, flags, 0), ELSEWHERE, peer))
                .unwrap();
            let alive = client.peer_addr().is_ok();
            assert_eq!(alive, left, "{flags:x} {peer:x}");
            let old = setup
                .kernel
                .old
                .borrow()
                .values()
                .map(Vec::len)
                .sum::<usize>();
            assert_eq!(old, usize::from(left));
            assert_eq!(setup.control.progress.closed, u64::from(!left));
        });
    }
}

#[test]
fn connections_become_old_when_their_peer_becomes_ready_and_policy_closes_them() {
    let lab = lab(&[V4, V6]);
    let (client, _server) = connection(&lab, ELSEWHERE);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        let enrolled = || plan(&lab, PodState::ENROLLED, 0);
        setup
            .pass(with_peer(enrolled(), ELSEWHERE, Peer::POD))
            .unwrap();
        assert!(setup.kernel.old.borrow().values().all(Vec::is_empty));
        setup.pass(with_peer(enrolled(), ELSEWHERE, READY)).unwrap();
        let old: Vec<_> = setup
            .kernel
            .old
            .borrow()
            .values()
            .flatten()
            .copied()
            .collect();
        assert_eq!(old.len(), 1);
        assert_eq!(old[0].2, mesh_common::Reason::PeerNotReady);
        assert!(client.peer_addr().is_ok());
        let mut denied = with_peer(plan(&lab, PodState::ENROLLED, 9), ELSEWHERE, READY);
        denied.sets.insert(
            PolicySetId(9),
            SetHead {
                flags: SetHead::ISOLATED_EGRESS,
                ..SetHead::default()
            },
        );
        setup.pass(denied).unwrap();
        assert!(client.peer_addr().is_err(), "policy denies it now");
        assert!(setup.kernel.old.borrow().values().all(Vec::is_empty));
    });
}

/// `run`, over a snapshot.
#[test]
fn pod_is_detached_within_a_second_of_its_namespace_removal() {
    let Lab {
        node,
        pod,
        mut local,
    } = lab(&[V4, V6]);
    // The lab's path is the number of a descriptor, which a lab of another test gets after this one is
    // closed: `run` would then attach that lab's namespace. A link of this test's own never leads there.
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("netns");
    symlink(local.netns_path.take().expect("a lab has a path"), &path).unwrap();
    local.netns_path = Some(path.display().to_string());
    let cluster = snapshot(&local);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let fake = Fake::default();
    let scenario = async {
        let (publisher, mut in_force) = channel();
        let (_snapshots, receiver) = watch::channel(Arc::new(cluster));
        let (_stop, stopped) = watch::channel(false);
        let kernel = fake.clone();
        let run = run(
            settings(),
            kernel,
            ByAnnotation,
            receiver,
            publisher,
            stopped,
        );
        let watcher = async {
            let limit = Duration::from_secs(10);
            let attached = in_force.wait_for(|now| !now.pods.is_empty());
            tokio::time::timeout(limit, attached)
                .await
                .expect("it is attached")
                .unwrap();
            fs::remove_file(&path).unwrap();
            drop(pod);
            let gone = Instant::now();
            while ip(&["-o", "link"]).contains("host7") {
                assert!(gone.elapsed() < limit, "the namespace is still there");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert!(
                gone.elapsed() < Duration::from_secs(1),
                "{:?}",
                gone.elapsed()
            );
            let emptied = in_force.wait_for(|now| now.pods.is_empty());
            tokio::time::timeout(limit, emptied).await.unwrap().unwrap();
        };
        tokio::select! {
            result = run => panic!("control ended: {result:?}"),
            () = watcher => {}
        }
    };
    node.run(|| runtime.block_on(scenario)).unwrap();
    assert!(fake.0.pods.borrow().is_empty());
}

#[test]
fn agent_reads_the_kernel_and_claims_listeners_when_it_becomes_the_writer_again() {
    let lab = lab(&[V4]);
    on_node(&lab, || {
        let mut setup = setup(&Fake::default());
        assert!(setup.control.is_writer());
        setup.pass(plan(&lab, PodState::ENROLLED, 7)).unwrap();
        setup.kernel.replaced.set(true);
        assert!(!setup.control.is_writer());
        // The successor writes another policy.
        *setup.kernel.plan.borrow_mut() = Plan::default();
        setup.log();
        setup.kernel.replaced.set(false);
        assert!(setup.control.is_writer());
        let log = setup.log();
        assert!(
            !log.is_empty() && log.iter().all(|l| l.starts_with("listener 0")),
            "{log:?}"
        );
        setup.control.reconcile().unwrap();
        assert!(
            setup
                .kernel
                .plan
                .borrow()
                .sets
                .contains_key(&PolicySetId(7))
        );
    });
}

/// The snapshot of a cluster with one enrolled pod.
fn snapshot(local: &LocalPod) -> ClusterSnapshot {
    let mut cluster = ClusterSnapshot::default();
    let labels = [("mesh.rs/dataplane".to_owned(), "enabled".to_owned())];
    let namespace = mesh_plan::cluster::Namespace {
        uid: "ns".to_owned(),
        labels: labels.into_iter().collect(),
    };
    cluster.namespaces.insert("shop".to_owned(), namespace);
    cluster
        .nodes
        .insert("n1".to_owned(), mesh_plan::cluster::Node::default());
    let pod = mesh_plan::cluster::Pod {
        name: mesh_plan::cluster::ObjectName::new("shop", "web"),
        uid: UID.into(),
        service_account: "web".to_owned(),
        node: "n1".to_owned(),
        addresses: local.addresses.iter().copied().collect(),
        ready: true,
        netns_path: local.netns_path.clone(),
        ..mesh_plan::cluster::Pod::default()
    };
    cluster.pods.insert(UID.into(), pod.into());
    cluster
}
