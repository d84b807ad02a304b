// SPDX-License-Identifier: Apache-2.0
//! Clusters in few words, and questions to their plans.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::identity::Evidence;
use mesh_common::path::who;
use mesh_common::policy::{Direction, Question, RuleId, decide};
use mesh_common::{Addr, Port, Protocol, Reason};
use mesh_plan::cluster::*;
use mesh_plan::{Index, Rejection, compile};

/// A cluster under construction. Nodes `n1` (10.0.0.1, fd00::1) and `n2` (10.0.0.2, fd00::2) are
/// there from the start.
#[derive(Clone, Debug)]
pub(crate) struct World(pub(crate) ClusterSnapshot);

impl World {
    pub(crate) fn new() -> Self {
        let mut world = Self(ClusterSnapshot::default());
        for n in [1, 2] {
            let node = Node {
                labels: labels(&format!("zone=z{n}")),
                addresses: [ip(&format!("10.0.0.{n}")), ip(&format!("fd00::{n}"))].into(),
                pod_cidrs: [format!("10.1.{n}.0/24").parse().unwrap()].into(),
            };
            world.0.nodes.insert(format!("n{n}"), node);
        }
        world
    }

    pub(crate) fn namespace(mut self, name: &str, text: &str) -> Self {
        let mut labels = labels(text);
        labels.insert("kubernetes.io/metadata.name".into(), name.into());
        let uid = format!("ns-{name}");
        self.0
            .namespaces
            .insert(name.into(), Namespace { uid, labels });
        self
    }

    /// A running pod of service account `default` on the node whose number is the address's third
    /// part (IPv4), `n1` for IPv6. Several addresses are separated by commas.
    pub(crate) fn pod(self, name: &str, addresses: &str, text: &str) -> Self {
        self.pod_with(name, addresses, text, |_| {})
    }

    pub(crate) fn pod_with(
        mut self,
        name: &str,
        addresses: &str,
        text: &str,
        change: impl FnOnce(&mut Pod),
    ) -> Self {
        let addresses: BTreeSet<IpAddr> = addresses
            .split(',')
            .filter(|a| !a.is_empty())
            .map(ip)
            .collect();
        let node = match addresses.first() {
            Some(IpAddr::V4(v4)) => format!("n{}", v4.octets()[2]),
            _ => "n1".to_owned(),
        };
        let mut pod = Pod {
            name: name.to_owned().try_into().unwrap(),
            uid: format!("uid-{name}").into(),
            labels: labels(text).into(),
            service_account: "default".into(),
            node,
            addresses: addresses.into_iter().collect(),
            ready: true,
            workload: ("Deployment".into(), name.into()),
            ..Pod::default()
        };
        change(&mut pod);
        self.0.pods.insert(Arc::clone(&pod.uid), pod.into());
        self
    }

    pub(crate) fn policy(mut self, object: &str, policy: PolicyText) -> Self {
        let object: ObjectRef = object.to_owned().try_into().unwrap();
        self.0.policies.insert(object, policy.0.into());
        self
    }

    pub(crate) fn authentication(mut self, name: &str, a: Authentication) -> Self {
        let name = name.to_owned().try_into().unwrap();
        self.0.authentications.insert(name, a);
        self
    }

    pub(crate) fn service(mut self, name: &str, service: Service) -> Self {
        let name = name.to_owned().try_into().unwrap();
        self.0.services.insert(name, service.into());
        self
    }

    pub(crate) fn on(&self, node: &str) -> Compiled {
        let (plan, rejections) = compile(&self.0, node);
        Compiled {
            plan: Index::new(plan),
            rejections,
        }
    }
}

pub(crate) struct Compiled {
    pub(crate) plan: Index,
    pub(crate) rejections: Vec<Rejection>,
}

impl Compiled {
    /// No rejections, then itself.
    pub(crate) fn clean(self) -> Self {
        assert_eq!(self.rejections, []);
        self
    }

    pub(crate) fn rejected(&self, object: &str, why: &str) {
        let fits = |r: &Rejection| r.object.to_string() == object && r.to_string().contains(why);
        assert!(
            self.rejections.iter().any(fits),
            "{object}: {why}: {:#?}",
            self.rejections
        );
    }

    /// `on` = `SHOP/WEB in|out ADDRESS PROTOCOL[/PORT] [proven]`. The answer is `allow` or `deny`
    /// and the rule.
    pub(crate) fn ask(&self, text: &str) -> String {
        let (allowed, reason, rule) = self.decide(text);
        let name = match rule {
            RuleId::NONE => String::new(),
            RuleId::NODE_LOCAL => " node-local".to_owned(),
            rule => format!(" {}", self.plan.names.rules[&rule]),
        };
        let word = if allowed { "allow" } else { "deny" };
        #[expect(clippy::wildcard_enum_match_arm, reason = "policy gives no others")]
        match reason {
            Reason::NoPolicy => "allow by nothing".to_owned(),
            Reason::DefaultDeny => format!("{word} by default of{name}"),
            Reason::PolicyMissing => format!("{word} isolated"),
            _ => format!("{word} by{name}"),
        }
    }

    pub(crate) fn decide(&self, text: &str) -> (bool, Reason, RuleId) {
        let words: Vec<&str> = text.split_whitespace().collect();
        let name = words[0].to_owned().try_into().unwrap();
        let pod = self
            .plan
            .pods
            .values()
            .find(|pod| pod.name == name)
            .expect(words[0]);
        let direction = match words[1] {
            "in" => Direction::Ingress,
            "out" => Direction::Egress,
            other => panic!("{other}"),
        };
        let addr = Addr::from(ip(words[2]));
        let (protocol, port) = words[3].split_once('/').unwrap_or((words[3], "0"));
        let peer = who(&self.plan, &addr);
        let evidence = if words.get(4) == Some(&"proven") {
            Evidence::Tls
        } else {
            peer.evidence
        };
        let question = Question {
            set: pod.view.set,
            direction,
            peer: peer.id,
            addr,
            evidence,
            protocol: match protocol {
                "tcp" => Protocol::TCP,
                "udp" => Protocol::UDP,
                "sctp" => Protocol::SCTP,
                "icmp" => Protocol::ICMP,
                other => panic!("{other}"),
            },
            port: Port::new(port.parse().unwrap()),
        };
        let verdict = decide(&self.plan, &question);
        (verdict.allowed, verdict.reason, verdict.rule)
    }

    /// Each line `QUESTION -> allow|deny`, or the whole answer.
    pub(crate) fn table(&self, text: &str) {
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let (question, expected) = line.split_once("->").expect(line);
            let answer = self.ask(question);
            let expected = expected.trim();
            let agrees = answer == expected || answer.split(' ').next() == Some(expected);
            assert!(agrees, "{line}: {answer}");
        }
    }
}

/// A policy under construction.
#[derive(Clone, Debug)]
pub(crate) struct PolicyText(pub(crate) Policy);

/// NetworkPolicy or MeshPolicy: pods of a namespace.
pub(crate) fn policy(namespace: &str, pods: &str) -> PolicyText {
    let subject = Subject::Pods {
        namespace: namespace.into(),
        pods: selector(pods),
    };
    PolicyText(Policy {
        tier: Tier::Namespaced,
        subject,
        ingress: None,
        egress: None,
        audit: false,
    })
}

/// A cluster-scoped policy.
pub(crate) fn wide(tier: Tier, namespaces: &str, pods: &str) -> PolicyText {
    let subject = Subject::Namespaces {
        namespaces: selector(namespaces),
        pods: selector(pods),
    };
    PolicyText(Policy {
        tier,
        subject,
        ingress: None,
        egress: None,
        audit: false,
    })
}

impl PolicyText {
    /// Rules are named by their position; [`Rule::name`] stays if it is set.
    pub(crate) fn ingress(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.0.ingress = Some(named("ingress", rules));
        self
    }

    pub(crate) fn egress(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.0.egress = Some(named("egress", rules));
        self
    }

    pub(crate) fn audit(mut self) -> Self {
        self.0.audit = true;
        self
    }
}

fn named(direction: &str, rules: impl IntoIterator<Item = Rule>) -> Vec<Rule> {
    let name = |(index, rule): (usize, Rule)| Rule {
        name: match rule.name.is_empty() {
            true => format!("{direction}[{index}]"),
            false => rule.name.clone(),
        },
        ..rule
    };
    rules.into_iter().enumerate().map(name).collect()
}

/// `PEERS : PORTS`, each separated by spaces; `*` = missing. Peers: `pods(SELECTOR)` of namespace
/// `shop`, `ns/NAME(SELECTOR)`, `nss(SELECTOR;SELECTOR)`, `CIDR` or `CIDR-CIDR-..` with exceptions,
/// `@entity`, `nodes(SELECTOR)`, `sa(NAMESPACE/NAME)` (`*` = any). Ports: `tcp`, `tcp/80`,
/// `tcp/80-90`, `tcp/name`.
pub(crate) fn allow(text: &str) -> Rule {
    rule(RuleAction::Allow, text)
}

pub(crate) fn deny(text: &str) -> Rule {
    rule(RuleAction::Deny, text)
}

pub(crate) fn pass(text: &str) -> Rule {
    rule(RuleAction::Pass, text)
}

fn rule(action: RuleAction, text: &str) -> Rule {
    let (peers, ports) = text.split_once(" : ").unwrap_or((text, "*"));
    fn many<T>(text: &str, one: fn(&str) -> T) -> Option<Vec<T>> {
        (text.trim() != "*").then(|| text.split_whitespace().map(one).collect())
    }
    Rule {
        name: String::new(),
        action,
        peers: many(peers, peer),
        ports: many(ports, port),
    }
}

fn peer(text: &str) -> PeerMatch {
    let pods = |namespaces, pods| PeerMatch::Pods {
        namespaces,
        pods: selector(pods),
        service_accounts: None,
    };
    if let Some(entity) = text.strip_prefix('@') {
        return PeerMatch::Entity(match entity {
            "host" => Entity::Host,
            "remote-node" => Entity::RemoteNode,
            "kube-apiserver" => Entity::KubeApiserver,
            "cluster" => Entity::Cluster,
            "world" => Entity::World,
            other => panic!("{other}"),
        });
    }
    let Some((head, inner)) = text.strip_suffix(')').and_then(|t| t.split_once('(')) else {
        let mut parts = text.split('-').map(|part| part.parse().expect(part));
        return PeerMatch::Cidr {
            cidr: parts.next().unwrap(),
            except: parts.collect(),
        };
    };
    match head.split_once('/') {
        None if head == "pods" => pods(NamespaceMatch::Name("shop".into()), inner),
        None if head == "nodes" => PeerMatch::Nodes(selector(inner)),
        None if head == "nss" => {
            let (outer, inner) = inner.split_once(';').unwrap_or((inner, ""));
            pods(NamespaceMatch::Labels(selector(outer)), inner)
        }
        None if head == "sa" => {
            let (namespace, name) = inner.split_once('/').unwrap();
            let part = |part: &str| (part != "*").then(|| part.to_owned());
            let account = ServiceAccountMatch {
                namespace: part(namespace),
                name: part(name),
            };
            PeerMatch::Pods {
                namespaces: NamespaceMatch::Labels(Selector::default()),
                pods: Selector::default(),
                service_accounts: Some([account].into()),
            }
        }
        Some(("ns", name)) => pods(NamespaceMatch::Name(name.into()), inner),
        _ => panic!("{text}"),
    }
}

fn port(text: &str) -> PortMatch {
    let (transport, ports) = text.split_once('/').unwrap_or((text, ""));
    let transport = match transport {
        "tcp" => Some(Transport::Tcp),
        "udp" => Some(Transport::Udp),
        "sctp" => Some(Transport::Sctp),
        "any" => None,
        other => panic!("{other}"),
    };
    let number = |text: &str| text.parse::<u16>();
    let ports = match (ports, number(ports), ports.split_once('-')) {
        ("", ..) => PortRange::All,
        (_, Ok(n), _) => PortRange::Range(n, n),
        (_, _, Some((a, b))) => PortRange::Range(number(a).unwrap(), number(b).unwrap()),
        (name, ..) => PortRange::Named(name.into()),
    };
    PortMatch { transport, ports }
}

/// `key=value,key=a|b,key!=a|b,key,!key`.
pub(crate) fn selector(text: &str) -> Selector {
    let values = |text: &str| text.split('|').map(str::to_owned).collect();
    let requirement = |part: &str| {
        let (key, test) = if let Some((key, list)) = part.split_once("!=") {
            (key, LabelTest::NotIn(values(list)))
        } else if let Some((key, list)) = part.split_once('=') {
            (key, LabelTest::In(values(list)))
        } else if let Some(key) = part.strip_prefix('!') {
            (key, LabelTest::DoesNotExist)
        } else {
            (part, LabelTest::Exists)
        };
        let key = key.to_owned();
        Requirement { key, test }
    };
    Selector {
        requirements: text
            .split(',')
            .filter(|p| !p.is_empty())
            .map(requirement)
            .collect(),
    }
}

pub(crate) fn labels(text: &str) -> BTreeMap<String, String> {
    text.split(',')
        .filter(|part| !part.is_empty())
        .map(|part| part.split_once('=').expect(part))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

/// A small deterministic generator (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}
