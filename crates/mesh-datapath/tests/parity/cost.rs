// SPDX-License-Identifier: Apache-2.0
//! The time of a kernel decision by the number of policies. BPF_PROG_TEST_RUN runs the gate's program
//! many times over maps with a compiled plan.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aya::programs::{TestRun as _, TestRunOptions};
use mesh_common::pod::{PodState, PodView};
use mesh_common::{Addr, Endpoint, Port};
use mesh_plan::cluster::{
    ClusterSnapshot, LabelTest, NamespaceMatch, ObjectName, ObjectRef, PeerMatch, Pod, Policy,
    PortMatch, PortRange, Requirement, Rule, RuleAction, Selector, Subject, Tier, Transport,
};
use mesh_plan::{Plan, compile};

use super::{Kernel, TCX_DROP, TCX_NEXT, context, fill, gate};
use crate::world::{Packet, SYN};

const SERVER: &str = "10.1.0.1";
const POLICIES: [usize; 3] = [10, 1_000, 10_000];
/// The number of program runs of one measurement.
const REPEAT: u32 = 20_000;
/// The number of measurements for each number of policies, taken in turns; the median counts.
const ROUNDS: usize = 15;

fn labelled(key: &str, value: &str) -> Selector {
    Selector {
        requirements: vec![Requirement {
            key: key.to_owned(),
            test: LabelTest::In([value.to_owned()].into()),
        }],
    }
}

fn pod(number: usize, role: &str, node: &str) -> Pod {
    let byte = |n: usize| u8::try_from(n % 256).expect("below 256");
    let address = [10, 1, byte(number / 256), byte(number)];
    Pod {
        name: ObjectName::new("shop", format!("pod-{number}")),
        uid: format!("uid-{number:05}").into(),
        labels: BTreeMap::from([("role".to_owned(), role.to_owned())]).into(),
        service_account: "default".to_owned(),
        node: node.to_owned(),
        addresses: [address.into()].into(),
        ready: true,
        ..Pod::default()
    }
}

/// Returns a cluster in which pod 1 is the server: the last of its policies allows pod 2, and none
/// allows pod 3. A tenth of all policies selects the server, at most 100. The others select other pods
/// of the node, so that the maps are as full as in a real cluster.
fn cluster(policies: usize) -> ClusterSnapshot {
    let mut cluster = ClusterSnapshot::default();
    let mut add = |pod: Pod| drop(cluster.pods.insert(Arc::clone(&pod.uid), pod.into()));
    add(pod(1, "server", "n1"));
    add(pod(2, "right", "n2"));
    add(pod(3, "wrong", "n2"));
    for number in 4..104 {
        add(pod(number, &format!("other-{number}"), "n1"));
    }
    for number in 104..1_104 {
        add(pod(number, &format!("peer-{number}"), "n2"));
    }
    let about_server = (policies / 10).clamp(1, 100);
    for number in 0..policies {
        let subject = if number < about_server {
            "server".to_owned()
        } else {
            format!("other-{}", 4 + number % 100)
        };
        let peer = if number + 1 == about_server {
            "right".to_owned()
        } else {
            format!("peer-{}", 104 + number % 1_000)
        };
        let first = u16::try_from(1_000 + number % 40_000).expect("a port");
        let first = if peer == "right" { 80 } else { first };
        let policy = Policy {
            tier: Tier::Namespaced,
            subject: Subject::Pods {
                namespace: "shop".to_owned(),
                pods: labelled("role", &subject),
            },
            ingress: Some(vec![Rule {
                name: "ingress[0]".to_owned(),
                action: RuleAction::Allow,
                peers: Some(vec![
                    PeerMatch::Pods {
                        namespaces: NamespaceMatch::Name("shop".to_owned()),
                        pods: labelled("role", &peer),
                        service_accounts: None,
                    },
                    PeerMatch::Cidr {
                        cidr: format!("172.16.{}.0/24", number % 256)
                            .parse()
                            .expect("a block"),
                        except: Default::default(),
                    },
                ]),
                ports: Some(vec![PortMatch {
                    transport: Some(Transport::Tcp),
                    ports: PortRange::Range(first, first + 7),
                }]),
            }]),
            egress: None,
            audit: false,
        };
        let object = ObjectRef::new("NetworkPolicy", "shop", format!("p{number:05}"));
        cluster.policies.insert(object, policy.into());
    }
    cluster
}

/// Returns the node's plan and the pods of its maps. Pods are gated, and silent, so that the gate decides
/// TCP.
fn in_force(policies: usize) -> (Plan, Vec<PodView>) {
    let (mut plan, rejections) = compile(&cluster(policies), "n1");
    assert_eq!(rejections, []);
    for pod in plan.pods.values_mut() {
        pod.view.flags |= PodState::GATED | PodState::SILENT;
    }
    // The pod on the test's interface is first.
    let server = "uid-00001";
    let first = plan.pods[server].view;
    let others = plan.pods.iter().filter(|(uid, _)| *uid != server);
    let views = std::iter::once(first).chain(others.map(|(_, pod)| pod.view));
    let views = views.collect();
    (plan, views)
}

fn frame(client: &str) -> Vec<u8> {
    let ip = |text: &str| Addr::from(text.parse::<std::net::IpAddr>().expect("an address"));
    let at = |address: &str, port: u16| Endpoint::new(ip(address), Port::new(port));
    let packet = Packet::segment(at(SERVER, 80), at(client, 80), Port::new(20_000), SYN);
    packet.directed(true).frame()
}

#[test]
fn decision_time_does_not_grow_with_the_number_of_policies() {
    let mut kernels: Vec<(usize, Plan, Kernel)> = POLICIES
        .into_iter()
        .map(|policies| {
            let (plan, views) = in_force(policies);
            let mut kernel = Kernel::load();
            fill(&mut kernel, &plan, &views);
            (policies, plan, kernel)
        })
        .collect();
    // Measured is an allowed packet: a denied one is also counted and reported.
    let allowed = frame("10.1.0.2");
    let denied = frame("10.1.0.3");
    let context = context(0);
    let mut took: BTreeMap<usize, Vec<Duration>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        for (policies, _, kernel) in &mut kernels {
            let mut run = |frame: &[u8], repeat| {
                let options = TestRunOptions {
                    data_in: Some(frame),
                    ctx_in: Some(&context),
                    repeat,
                    ..TestRunOptions::default()
                };
                let program = gate(&mut kernel.object, "gate_to_pod");
                program.test_run(options).expect("the program runs")
            };
            assert_eq!(run(&denied, 1).return_value, TCX_DROP, "{policies}");
            let result = run(&allowed, REPEAT);
            assert_eq!(result.return_value, TCX_NEXT, "{policies}");
            // The first round only warms up.
            if round > 0 {
                took.entry(*policies).or_default().push(result.duration);
            }
        }
    }
    let mut medians = Vec::new();
    for (policies, plan, _) in &kernels {
        let mut all = took.remove(policies).expect("it was measured");
        all.sort();
        let (least, median, most) = (all[0], all[ROUNDS / 2], all[ROUNDS - 1]);
        medians.push(median);
        // A row of `cargo xtask bench policy`.
        println!(
            "{{\"policies\":{policies},\"sets\":{},\"pairs\":{},\"blocks\":{},\"port_prefixes\":{},\
             \"decision_ns\":{},\"decision_ns_min\":{},\"decision_ns_max\":{}}}",
            plan.sets.len(),
            plan.selects.len(),
            plan.cidrs.len(),
            plan.ports.len(),
            median.as_nanos(),
            least.as_nanos(),
            most.as_nanos(),
        );
    }
    // With a thousand times the policies, only cache misses in larger maps may add up.
    assert!(medians[2] < medians[0] * 2, "{medians:?}");
}
