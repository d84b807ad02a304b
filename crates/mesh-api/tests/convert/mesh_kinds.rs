// SPDX-License-Identifier: Apache-2.0
//! Tests of the mesh's own kinds and of ClusterNetworkPolicy.

use std::collections::BTreeSet;

use mesh_plan::cluster::{
    Entity, Mtls, NamespaceMatch, ObjectName, PeerMatch, Policy, PortRange, Rule, RuleAction,
    Selector, ServiceAccountMatch, Subject, Tier, Transport,
};

use super::{clean, policy, rejections, standalone, warnings};

fn object(group: &str, kind: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: {group}, kind: {kind}, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
    )
}

fn mesh_policy(spec: &str) -> Policy {
    let outcome = clean(&object("mesh.rs/v1alpha1", "MeshPolicy", spec));
    policy(&outcome, "MeshPolicy", "shop/p")
        .cloned()
        .expect("it is in force")
}

fn cluster_policy(spec: &str) -> Policy {
    let outcome = clean(&object("mesh.rs/v1alpha1", "ClusterMeshPolicy", spec));
    policy(&outcome, "ClusterMeshPolicy", "p")
        .cloned()
        .expect("it is in force")
}

fn network(spec: &str) -> (Policy, Vec<String>) {
    let text = object(
        "policy.networking.k8s.io/v1alpha2",
        "ClusterNetworkPolicy",
        spec,
    );
    let outcome = standalone(&text);
    assert_eq!(outcome.rejections, [], "{spec}");
    let policy = policy(&outcome, "ClusterNetworkPolicy", "p")
        .cloned()
        .expect("it is in force");
    (policy, warnings(&outcome))
}

fn account(namespace: Option<&str>, name: Option<&str>) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
    }
}

fn everywhere() -> NamespaceMatch {
    NamespaceMatch::Labels(Selector::default())
}

#[test]
fn mesh_policy_has_action_and_mode() {
    let allow = mesh_policy("{ingress: [{}], egress: []}");
    assert_eq!(allow.ingress.unwrap()[0].action, RuleAction::Allow);
    assert_eq!(allow.egress, Some(Vec::new()));
    assert!(!allow.audit);
    let deny = mesh_policy("{action: Deny, mode: Audit, egress: [{name: never}]}");
    assert_eq!(deny.ingress, None);
    let rule = &deny.egress.as_ref().unwrap()[0];
    assert_eq!(
        (rule.name.as_str(), rule.action),
        ("never", RuleAction::Deny)
    );
    assert!(deny.audit);
}

#[test]
fn service_account_forms_of_a_peer() {
    let rows = [
        (
            "{serviceAccounts: [web]}",
            everywhere(),
            account(Some("shop"), Some("web")),
        ),
        (
            "{serviceAccounts: [a/web]}",
            everywhere(),
            account(Some("a"), Some("web")),
        ),
        (
            "{serviceAccounts: ['a/*']}",
            everywhere(),
            account(Some("a"), None),
        ),
        (
            "{serviceAccounts: ['*']}",
            everywhere(),
            account(None, None),
        ),
        (
            "{serviceAccounts: [web], namespaceSelector: {}}",
            everywhere(),
            account(None, Some("web")),
        ),
    ];
    for (peer, namespaces, account) in rows {
        let rules = mesh_policy(&format!("{{ingress: [{{from: [{peer}]}}]}}"))
            .ingress
            .unwrap();
        assert_eq!(
            rules[0].peers.as_deref().unwrap(),
            [PeerMatch::Pods {
                namespaces,
                pods: Selector::default(),
                service_accounts: Some(BTreeSet::from([account])),
            }],
            "{peer}"
        );
    }
    let bare = object(
        "mesh.rs/v1alpha1",
        "ClusterMeshPolicy",
        "{tier: Admin, priority: 1, ingress: [{from: [{serviceAccounts: [web]}]}]}",
    );
    let outcome = standalone(&bare);
    assert!(outcome.rejections[0].why.contains("NAMESPACE/web"));
}

#[test]
fn peer_is_selectors_or_entities_or_ip_blocks() {
    let rule = |peer: &str| {
        let rules = mesh_policy(&format!("{{egress: [{{to: [{peer}]}}]}}"))
            .egress
            .unwrap();
        rules[0].peers.clone().unwrap()
    };
    let own = NamespaceMatch::Name("shop".to_owned());
    assert!(matches!(
        &rule("{podSelector: {}}")[0],
        PeerMatch::Pods { namespaces, service_accounts: None, .. } if *namespaces == own
    ));
    assert_eq!(
        rule("{entities: [host, remote-node, kube-apiserver, cluster, world]}"),
        [
            PeerMatch::Entity(Entity::Host),
            PeerMatch::Entity(Entity::RemoteNode),
            PeerMatch::Entity(Entity::KubeApiserver),
            PeerMatch::Entity(Entity::Cluster),
            PeerMatch::Entity(Entity::World),
        ]
    );
    assert_eq!(
        rule("{ipBlocks: [{cidr: 'fd00::/8', except: ['fd01::/16']}, {cidr: 10.0.0.0/8}]}").len(),
        2
    );
    for bad in [
        "{}",
        "{podSelector: {}, entities: [host]}",
        "{ipBlocks: [{cidr: 10.0.0.0/8}], entities: [host]}",
        "{serviceAccounts: []}",
        "{entities: []}",
        "{ipBlocks: []}",
    ] {
        let spec = format!("{{egress: [{{to: [{bad}]}}]}}");
        let outcome = standalone(&object("mesh.rs/v1alpha1", "MeshPolicy", &spec));
        assert_eq!(outcome.rejections.len(), 1, "{bad}");
    }
}

#[test]
fn cluster_mesh_policy_has_priority_and_actions_per_rule() {
    let made = cluster_policy(
        "{tier: Admin, priority: 10, namespaceSelector: {matchLabels: {a: b}}, ingress: [{action: Pass, from: [{entities: [host]}]}, {action: Deny}, {}]}",
    );
    assert_eq!(made.tier, Tier::Admin(10));
    assert!(matches!(made.subject, Subject::Namespaces { .. }));
    let actions: Vec<_> = made
        .ingress
        .unwrap()
        .iter()
        .map(|rule| rule.action)
        .collect();
    assert_eq!(
        actions,
        [RuleAction::Pass, RuleAction::Deny, RuleAction::Allow]
    );
    for bad in [
        "{tier: Baseline, priority: 1, ingress: [{action: Pass}]}",
        "{tier: Admin, priority: 1001, ingress: [{}]}",
        "{tier: Admin, ingress: [{}]}",
        "{tier: Admin, priority: 1, ingress: []}",
    ] {
        let outcome = standalone(&object("mesh.rs/v1alpha1", "ClusterMeshPolicy", bad));
        assert_eq!(
            outcome.rejections.len(),
            1,
            "{bad}: {:?}",
            outcome.rejections
        );
    }
}

#[test]
fn mesh_authentication_has_modes_per_port() {
    let outcome = clean(&object(
        "mesh.rs/v1alpha1",
        "MeshAuthentication",
        "{podSelector: {matchLabels: {a: b}}, mtls: Strict, ports: [{port: 80, mtls: Permissive}]}",
    ));
    let made = &outcome.cluster.authentications[&ObjectName::new("shop", "p")];
    assert_eq!(made.mtls, Some(Mtls::Strict));
    assert_eq!(made.ports, [(80, Mtls::Permissive)].into());
    assert_eq!((made.outbound, made.udp), (None, None));
    assert!(made.pods.is_some());
    let outcome = clean(&object(
        "mesh.rs/v1alpha1",
        "MeshAuthentication",
        "{podSelector: {}}",
    ));
    let made = &outcome.cluster.authentications[&ObjectName::new("shop", "p")];
    assert_eq!(
        made.pods, None,
        "an empty selector is no more specific than none"
    );
}

#[test]
fn cluster_network_policy_has_ordered_rules_and_ports() {
    let (made, warnings) = network(
        "{tier: Baseline, priority: 0, subject: {pods: {podSelector: {}}}, egress: [
          {name: first, action: Deny, to: [{nodes: {}}, {networks: [10.0.0.0/8, 'fd00::/8']}]},
          {action: Accept, to: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}}],
           protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 1, end: 9}}}}, {sctp: {destinationPort: {range: {start: 1, end: 65535}}}}, {destinationNamedPort: http}]},
          {action: Pass, to: [{namespaces: {}}]},
        ]}",
    );
    assert_eq!(warnings, [""; 0]);
    assert_eq!((made.tier, made.ingress), (Tier::Baseline(0), None));
    let rules: Vec<Rule> = made.egress.unwrap();
    let heads: Vec<_> = rules
        .iter()
        .map(|rule| (rule.name.as_str(), rule.action))
        .collect();
    assert_eq!(
        heads,
        [
            ("first", RuleAction::Deny),
            ("egress[1]", RuleAction::Allow),
            ("egress[2]", RuleAction::Pass)
        ]
    );
    assert_eq!(rules[0].peers.as_ref().unwrap().len(), 3);
    let ports: Vec<_> = rules[1]
        .ports
        .iter()
        .flatten()
        .map(|port| (port.transport.unwrap(), port.ports.clone()))
        .collect();
    let named = PortRange::Named("http".to_owned());
    assert_eq!(
        ports,
        [
            (Transport::Tcp, PortRange::Range(80, 80)),
            (Transport::Udp, PortRange::Range(1, 9)),
            (Transport::Sctp, PortRange::Range(1, 65535)),
            (Transport::Tcp, named.clone()),
            (Transport::Udp, named.clone()),
            (Transport::Sctp, named),
        ]
    );
}

#[test]
fn unknown_peer_fails_closed() {
    let spec = |action: &str, peer: &str| {
        format!(
            "{{tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, egress: [{{action: {action}, to: [{{namespaces: {{}}}}, {peer}]}}]}}"
        )
    };
    for (action, expected, matches_all) in [
        ("Accept", RuleAction::Allow, false),
        ("Deny", RuleAction::Deny, true),
        ("Pass", RuleAction::Deny, true),
    ] {
        let (made, warnings) = network(&spec(action, "{planets: {}}"));
        let rule = &made.egress.unwrap()[0];
        assert_eq!(
            (rule.action, rule.peers.is_none()),
            (expected, matches_all),
            "{action}"
        );
        assert!(
            warnings
                .iter()
                .any(|w| w.contains("spec.egress[0].to[1]: this version cannot match this peer"))
        );
    }
    let (made, warnings) = network(&spec("Accept", "{domainNames: [example.org]}"));
    let peers = made.egress.unwrap()[0].peers.clone().unwrap();
    assert!(
        matches!(&peers[1], PeerMatch::Nothing { what } if what == "spec.egress[0].to[1].domainNames")
    );
    assert!(warnings[0].contains("matches nothing"));
    // Names are valid in Accept rules only.
    for action in ["Deny", "Pass"] {
        let (made, warnings) = network(&spec(action, "{domainNames: [example.org]}"));
        let rule = &made.egress.unwrap()[0];
        assert_eq!((rule.action, &rule.peers), (RuleAction::Deny, &None));
        assert!(
            warnings[0].contains("domainNames: this version cannot match this peer"),
            "{warnings:?}"
        );
    }
}

#[test]
fn values_that_the_policy_api_refuses_are_rejected_by_field() {
    let egress = |rule: &str| {
        format!("{{tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, egress: [{rule}]}}")
    };
    let to = |peer: &str| egress(&format!("{{action: Accept, to: [{peer}]}}"));
    let ports = |protocol: &str| {
        egress(&format!(
            "{{action: Accept, to: [{{namespaces: {{}}}}], protocols: [{protocol}]}}"
        ))
    };
    let many = ["{namespaces: {}}"; 26].join(", ");
    for (spec, field, why) in [
        (
            to("{networks: [10.0.0.0/8, 10.0.0.0/8]}"),
            "to[0].networks[1]",
            "duplicate value",
        ),
        (
            to("{domainNames: [a.b, a.b]}"),
            "to[0].domainNames[1]",
            "duplicate value",
        ),
        (
            to("{domainNames: []}"),
            "to[0].domainNames",
            "must have 1 to 25 items, has 0",
        ),
        (
            to("{domainNames: ['not a name!']}"),
            "to[0].domainNames[0]",
            "invalid domain name",
        ),
        (to(&many), "to", "must have 1 to 25 items, has 26"),
        (
            ports("{tcp: {}}"),
            "protocols[0].tcp.destinationPort",
            "is required",
        ),
        (
            ports("{tcp: {sourcePort: 80}}"),
            "protocols[0].tcp.destinationPort",
            "is required",
        ),
        (
            egress("{action: Accept, to: [{nodes: {}}], protocols: [{destinationNamedPort: web}]}"),
            "protocols",
            "must not use named ports",
        ),
    ] {
        let text = object(
            "policy.networking.k8s.io/v1alpha2",
            "ClusterNetworkPolicy",
            &spec,
        );
        let said = rejections(&standalone(&text));
        let field = format!("spec.egress[0].{field}: ");
        assert!(
            said.iter()
                .any(|it| it.contains(&field) && it.contains(why)),
            "{spec}: {said:?}"
        );
    }
}

#[test]
fn invalid_selector_of_a_subject_is_rejected_by_field() {
    for (subject, field) in [
        (
            "{namespaces: {matchLabels: {'a b': c}}}",
            "spec.subject.namespaces.matchLabels.a b",
        ),
        (
            "{pods: {namespaceSelector: {matchLabels: {'a b': c}}, podSelector: {}}}",
            "spec.subject.pods.namespaceSelector.matchLabels.a b",
        ),
        (
            "{pods: {podSelector: {matchLabels: {'a b': c}}}}",
            "spec.subject.pods.podSelector.matchLabels.a b",
        ),
    ] {
        let text = object(
            "policy.networking.k8s.io/v1alpha2",
            "ClusterNetworkPolicy",
            &format!("{{tier: Admin, priority: 1, subject: {subject}}}"),
        );
        let fields: Vec<_> = standalone(&text)
            .rejections
            .into_iter()
            .map(|rejection| rejection.field)
            .collect();
        assert_eq!(fields, [field], "{subject}");
    }
}
