// SPDX-License-Identifier: Apache-2.0
//! Single cases: where two readings are possible, and the text that settles which one holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_common::path::Outbound;
use mesh_plan::cluster::{
    ClusterSnapshot, Entity, Namespace, NamespaceMatch, Node, ObjectName, ObjectRef, PeerMatch,
    Pod, Policy, PortMatch, PortRange, Rule, RuleAction, Selector, ServiceAccountMatch, Subject,
    Tier, Transport,
};
use mesh_plan::{Index, compile};

use crate::naive::{Packet, Side, Via, judge};
use crate::world::{ip, net};
use crate::{agrees, decided};

const NODE: &str = "192.168.0.1";
const OTHER_NODE: &str = "192.168.0.2";
const OUTSIDE: &str = "203.0.113.9";
const POD: &str = "10.1.1.10";
const REMOTE: &str = "10.1.2.20";

/// Pod `pod` on `node-1`, pod `remote` on `node-2`, both of namespace `shop`, not enrolled.
fn cluster() -> ClusterSnapshot {
    let mut cluster = ClusterSnapshot::default();
    cluster
        .namespaces
        .insert("shop".to_owned(), Namespace::default());
    let pods = [(1, NODE, "pod", POD), (2, OTHER_NODE, "remote", REMOTE)];
    for (index, node, name, address) in pods {
        let node = Node {
            addresses: BTreeSet::from([ip(node)]),
            pod_cidrs: BTreeSet::from([net(&format!("10.1.{index}.0/24"))]),
            ..Node::default()
        };
        cluster.nodes.insert(format!("node-{index}"), node);
        let pod = Pod {
            name: ObjectName::new("shop", name),
            uid: name.into(),
            service_account: name.to_owned(),
            node: format!("node-{index}"),
            addresses: [ip(address)].into(),
            named_ports: BTreeMap::from([(("http".to_owned(), Transport::Tcp), 8080)]).into(),
            ..Pod::default()
        };
        cluster.pods.insert(name.into(), pod.into());
    }
    cluster
}

type Rules<'a> = &'a [(RuleAction, Option<PeerMatch>)];

/// Adds a policy for every pod of `shop`, of one direction.
fn add(cluster: &mut ClusterSnapshot, name: &str, tier: Tier, side: Side, rules: Rules<'_>) {
    let direction = match side {
        Side::Ingress => "ingress",
        Side::Egress => "egress",
    };
    let rules: Vec<_> = rules
        .iter()
        .enumerate()
        .map(|(index, (action, peer))| Rule {
            name: format!("{direction}[{index}]"),
            action: *action,
            peers: peer.clone().map(|peer| vec![peer]),
            ports: None,
        })
        .collect();
    let (kind, namespace) = match tier {
        Tier::Namespaced => ("MeshPolicy", "shop"),
        Tier::Admin(_) | Tier::Baseline(_) => ("ClusterMeshPolicy", ""),
    };
    let (ingress, egress) = match side {
        Side::Ingress => (Some(rules), None),
        Side::Egress => (None, Some(rules)),
    };
    let policy = Policy {
        tier,
        subject: Subject::Pods {
            namespace: "shop".to_owned(),
            pods: Selector::default(),
        },
        ingress,
        egress,
        audit: false,
    };
    let object = ObjectRef::new(kind, namespace, name);
    cluster.policies.insert(object, policy.into());
}

/// Gives every rule of every policy this port of TCP.
fn on_port(cluster: &mut ClusterSnapshot, ports: &PortRange) {
    let rules = cluster.policies.values_mut().flat_map(|policy| {
        let policy = Arc::make_mut(policy);
        policy
            .ingress
            .iter_mut()
            .chain(&mut policy.egress)
            .flatten()
    });
    for rule in rules {
        rule.ports = Some(vec![PortMatch {
            transport: Some(Transport::Tcp),
            ports: ports.clone(),
        }]);
    }
}

fn block(cidr: &str) -> Option<PeerMatch> {
    Some(PeerMatch::Cidr {
        cidr: net(cidr),
        except: BTreeSet::new(),
    })
}

fn pods_of(account: &str) -> Option<PeerMatch> {
    Some(PeerMatch::Pods {
        namespaces: NamespaceMatch::Name("shop".to_owned()),
        pods: Selector::default(),
        service_accounts: Some(BTreeSet::from([ServiceAccountMatch {
            namespace: None,
            name: Some(account.to_owned()),
        }])),
    })
}

/// TCP to port 8080 between the pod `pod` and an address.
fn packet(side: Side, other: &str) -> Packet {
    Packet {
        pod: "pod".to_owned(),
        side,
        other: ip(other),
        protocol: 6,
        port: 8080,
        via: Via::Clear,
    }
}

/// Whether the pod's node lets it pass; the naive reading must admit that.
fn passes(cluster: &ClusterSnapshot, packet: &Packet) -> bool {
    let answer = answer(cluster, packet);
    assert!(
        agrees(cluster, packet, answer),
        "{:?} of {:?}",
        answer,
        judge(cluster, packet)
    );
    answer != Outbound::Refuse
}

fn answer(cluster: &ClusterSnapshot, packet: &Packet) -> Outbound {
    decided(&Index::new(compile(cluster, "node-1").0), packet)
}

/// CNP, networks: "0.0.0.0/0 will match both IPv4 and ICMP traffic, while ::/0 will match both IPv6
/// and ICMPv6 traffic."
#[test]
fn cidr_matches_its_own_family_only() {
    for (denied, v4, v6) in [("0.0.0.0/0", false, true), ("::/0", true, false)] {
        let mut cluster = cluster();
        let rules = [(RuleAction::Deny, block(denied))];
        add(&mut cluster, "a", Tier::Admin(0), Side::Egress, &rules);
        assert_eq!(passes(&cluster, &packet(Side::Egress, OUTSIDE)), v4);
        assert_eq!(passes(&cluster, &packet(Side::Egress, "2001:db8::9")), v6);
    }
}

/// CNP of named ports: "You can't use this in a rule that targets resources without named ports
/// (e.g. Nodes or Networks)." NP does not forbid it and does not say what it means. What cannot be
/// used never opens; where that refuses more than is written, it is reported.
#[test]
fn named_port_of_a_cidr_allows_nothing() {
    for (action, reported) in [(RuleAction::Allow, 0), (RuleAction::Deny, 1)] {
        let mut cluster = cluster();
        let rules = [(action, block("0.0.0.0/0"))];
        add(&mut cluster, "a", Tier::Namespaced, Side::Egress, &rules);
        on_port(&mut cluster, &PortRange::Named("http".to_owned()));
        let packet = packet(Side::Egress, OUTSIDE);
        assert!(!passes(&cluster, &packet), "{action:?}");
        let (_, rejections) = compile(&cluster, "node-1");
        assert_eq!(rejections.len(), reported, "{action:?} {rejections:?}");
    }
}

/// Ours, port: "a named port of the destination pod". A node has none, whoever else it is: nothing
/// matches, as for `host` and `remote-node`.
#[test]
fn named_port_of_an_entity_without_pods_matches_nothing() {
    for (entity, other) in [
        (Entity::RemoteNode, OTHER_NODE),
        (Entity::World, OUTSIDE),
        (Entity::KubeApiserver, OTHER_NODE),
    ] {
        let mut cluster = cluster();
        cluster.api_servers.insert(ip(OTHER_NODE));
        let rules = [(RuleAction::Deny, Some(PeerMatch::Entity(entity)))];
        add(&mut cluster, "a", Tier::Namespaced, Side::Egress, &rules);
        on_port(&mut cluster, &PortRange::Named("http".to_owned()));
        assert!(passes(&cluster, &packet(Side::Egress, other)), "{entity:?}");
    }
}

/// Ours: kube-apiserver: "The Kubernetes API server." world: "Everything outside the cluster." The
/// API server is the cluster's, wherever it runs; on a node it is also that node.
#[test]
fn api_server_never_matches_world() {
    for (address, denied) in [
        (OUTSIDE, &[Entity::KubeApiserver, Entity::Cluster][..]),
        (
            NODE,
            &[Entity::KubeApiserver, Entity::Cluster, Entity::Host],
        ),
        (
            OTHER_NODE,
            &[Entity::KubeApiserver, Entity::Cluster, Entity::RemoteNode],
        ),
    ] {
        for entity in [
            Entity::Host,
            Entity::RemoteNode,
            Entity::KubeApiserver,
            Entity::Cluster,
            Entity::World,
        ] {
            let mut cluster = cluster();
            cluster.api_servers.insert(ip(address));
            let rules = [(RuleAction::Deny, Some(PeerMatch::Entity(entity)))];
            add(&mut cluster, "a", Tier::Admin(0), Side::Egress, &rules);
            let passes = passes(&cluster, &packet(Side::Egress, address));
            assert_eq!(passes, !denied.contains(&entity), "{address} {entity:?}");
        }
    }
}

/// Ours: "An Allow that names service accounts needs tls or node; a Deny that names them matches
/// address too." A Pass exempts from the denials behind it as an Allow does: it needs proof.
#[test]
fn allow_and_pass_by_service_account_require_proof() {
    for (action, in_clear, in_tunnel) in [
        (RuleAction::Allow, false, true),
        (RuleAction::Pass, false, true),
        (RuleAction::Deny, false, false),
    ] {
        let mut cluster = cluster();
        for pod in cluster.pods.values_mut() {
            let label = ("mesh.rs/dataplane".to_owned(), "enabled".to_owned());
            Arc::make_mut(&mut Arc::make_mut(pod).labels).extend([label]);
        }
        let rules = [(action, pods_of("remote")), (RuleAction::Deny, None)];
        add(&mut cluster, "a", Tier::Admin(0), Side::Ingress, &rules);
        let mut packet = packet(Side::Ingress, REMOTE);
        assert_eq!(passes(&cluster, &packet), in_clear, "{action:?}");
        packet.via = Via::Tunnel;
        assert_eq!(passes(&cluster, &packet), in_tunnel, "{action:?}");
    }
}

/// NP: "Traffic is allowed to a pod if ..., OR if the traffic source is the pod's local node".
/// Ours: it "can be denied by the Admin tier only".
#[test]
fn node_reaches_its_pods_unless_the_admin_tier_denies_it() {
    for (tier, passes_in) in [
        (Tier::Namespaced, true),
        (Tier::Baseline(0), true),
        (Tier::Admin(0), false),
    ] {
        let mut cluster = cluster();
        let host = Some(PeerMatch::Entity(Entity::Host));
        add(
            &mut cluster,
            "a",
            tier,
            Side::Ingress,
            &[(RuleAction::Deny, host)],
        );
        let mut packet = packet(Side::Ingress, NODE);
        assert_eq!(passes(&cluster, &packet), passes_in, "{tier:?}");
        // Translated on its way, it is not the node's.
        packet.via = Via::Translated;
        assert!(passes(&cluster, &packet), "{tier:?}");
    }
}

/// Ours: "Traffic that was translated to a node's address on its way (NodePort without Local) is
/// world, not host": nor is it the API server that runs on the node.
#[test]
fn traffic_translated_to_a_node_address_does_not_match_kube_apiserver() {
    let mut cluster = cluster();
    cluster.api_servers.insert(ip(NODE));
    let api_server = Some(PeerMatch::Entity(Entity::KubeApiserver));
    let rules = [(RuleAction::Allow, api_server)];
    add(&mut cluster, "a", Tier::Namespaced, Side::Ingress, &rules);
    let mut packet = packet(Side::Ingress, NODE);
    assert!(passes(&cluster, &packet));
    packet.via = Via::Translated;
    assert!(!passes(&cluster, &packet));
}

/// CNP: of equal priorities "the implementation can apply any of the matching policies". Ours:
/// "Equal priorities: Deny first": the first match of one of them is a Deny.
#[test]
fn deny_decides_at_equal_priority() {
    for other in [RuleAction::Allow, RuleAction::Pass] {
        for names in [["a", "b"], ["b", "a"]] {
            let mut cluster = cluster();
            let elsewhere = block("10.7.0.0/16");
            let first = [(RuleAction::Allow, elsewhere), (RuleAction::Deny, None)];
            add(&mut cluster, names[0], Tier::Admin(5), Side::Egress, &first);
            let second = [(other, None)];
            add(
                &mut cluster,
                names[1],
                Tier::Admin(5),
                Side::Egress,
                &second,
            );
            let packet = packet(Side::Egress, OUTSIDE);
            assert!(!passes(&cluster, &packet), "{other:?} {names:?}");
        }
    }
}
