// SPDX-License-Identifier: Apache-2.0
//! Tests of NetworkPolicy conversion.

use std::collections::BTreeSet;

use mesh_plan::cluster::{
    LabelTest, NamespaceMatch, PeerMatch, Policy, PortRange, Requirement, Rule, Selector, Subject,
    Tier, Transport,
};

use super::{clean, policy, rejections, standalone, warnings};

fn with_spec(spec: &str) -> String {
    format!(
        "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
    )
}

fn good(spec: &str) -> Policy {
    let outcome = clean(&with_spec(spec));
    policy(&outcome, "NetworkPolicy", "shop/p")
        .cloned()
        .expect("it is in force")
}

fn only_ingress(spec: &str) -> Rule {
    let policy = good(&format!("{{podSelector: {{}}, ingress: [{spec}]}}"));
    let [rule] = <[Rule; 1]>::try_from(policy.ingress.expect("ingress")).expect("one rule");
    rule
}

fn errors(spec: &str) -> Vec<String> {
    let outcome = standalone(&with_spec(spec));
    outcome
        .rejections
        .iter()
        .map(|r| format!("{}: {}", r.field, r.why))
        .collect()
}

#[test]
fn policy_types_default_to_ingress_and_to_egress_with_egress_rules() {
    let rows = [
        ("{podSelector: {}}", (true, false)),
        ("{}", (true, false)),
        ("{podSelector: {}, egress: []}", (true, false)),
        ("{podSelector: {}, egress: [{}]}", (true, true)),
        ("{podSelector: {}, ingress: [{}]}", (true, false)),
        ("{podSelector: {}, policyTypes: []}", (true, false)),
        ("{podSelector: {}, policyTypes: [Egress]}", (false, true)),
        (
            "{podSelector: {}, policyTypes: [Ingress, Egress]}",
            (true, true),
        ),
        (
            "{podSelector: {}, policyTypes: [Ingress], egress: []}",
            (true, false),
        ),
    ];
    for (spec, directions) in rows {
        let policy = good(spec);
        assert_eq!(policy.tier, Tier::Namespaced);
        assert!(!policy.audit);
        assert_eq!(
            (policy.ingress.is_some(), policy.egress.is_some()),
            directions,
            "{spec}"
        );
    }
    let outcome = standalone(&with_spec(
        "{podSelector: {}, policyTypes: [Ingress], egress: [{}]}",
    ));
    assert!(warnings(&outcome)[0].contains("spec.egress: has no effect"));
}

#[test]
fn absent_and_empty_rule_lists_match_everything() {
    for spec in ["{}", "{from: [], ports: []}", "{from: null, ports: null}"] {
        let rule = only_ingress(spec);
        assert_eq!(
            (rule.name.as_str(), rule.peers, rule.ports),
            ("ingress[0]", None, None)
        );
    }
    assert_eq!(
        good("{podSelector: {}}").ingress,
        Some(Vec::new()),
        "nothing is allowed"
    );
}

#[test]
fn ports() {
    let rows = [
        ("{}", Transport::Tcp, PortRange::All),
        ("{protocol: UDP}", Transport::Udp, PortRange::All),
        ("{port: 80}", Transport::Tcp, PortRange::Range(80, 80)),
        (
            "{port: 65535, protocol: SCTP}",
            Transport::Sctp,
            PortRange::Range(65535, 65535),
        ),
        (
            "{port: 80, endPort: 90}",
            Transport::Tcp,
            PortRange::Range(80, 90),
        ),
        (
            "{port: 80, endPort: 80}",
            Transport::Tcp,
            PortRange::Range(80, 80),
        ),
        (
            "{port: http}",
            Transport::Tcp,
            PortRange::Named("http".to_owned()),
        ),
    ];
    for (port, transport, ports) in rows {
        let rule = only_ingress(&format!("{{ports: [{port}]}}"));
        let [made] = rule.ports.as_deref().unwrap() else {
            panic!("{port}")
        };
        assert_eq!(
            (made.transport, &made.ports),
            (Some(transport), &ports),
            "{port}"
        );
    }
}

#[test]
fn peers() {
    let pods = |rule: Rule| {
        let PeerMatch::Pods {
            namespaces,
            pods,
            service_accounts: None,
        } = rule.peers.unwrap().remove(0)
        else {
            panic!("not pods")
        };
        (namespaces, pods)
    };
    let app = Selector {
        requirements: vec![Requirement {
            key: "app".to_owned(),
            test: LabelTest::In(["a".to_owned()].into()),
        }],
    };
    let own = NamespaceMatch::Name("shop".to_owned());
    let all = Selector::default();
    assert_eq!(
        pods(only_ingress("{from: [{podSelector: {}}]}")),
        (own.clone(), all.clone())
    );
    assert_eq!(
        pods(only_ingress(
            "{from: [{podSelector: {matchLabels: {app: a}}}]}"
        )),
        (own, app.clone())
    );
    assert_eq!(
        pods(only_ingress("{from: [{namespaceSelector: {}}]}")),
        (NamespaceMatch::Labels(all.clone()), all)
    );
    assert_eq!(
        pods(only_ingress(
            "{from: [{namespaceSelector: {matchLabels: {app: a}}, podSelector: {matchLabels: {app: a}}}]}"
        )),
        (NamespaceMatch::Labels(app.clone()), app)
    );
    let block =
        only_ingress("{from: [{ipBlock: {cidr: 10.1.2.3/8, except: [10.1.0.0/16, 10.2.0.0/16]}}]}");
    assert_eq!(
        block.peers.unwrap(),
        [PeerMatch::Cidr {
            cidr: "10.0.0.0/8".parse().unwrap(),
            except: BTreeSet::from([
                "10.1.0.0/16".parse().unwrap(),
                "10.2.0.0/16".parse().unwrap()
            ]),
        }]
    );
}

#[test]
fn selector_operators() {
    let policy = good(
        "{podSelector: {matchLabels: {z: '1'}, matchExpressions: [{key: a, operator: In, values: [x, y]}, {key: b, operator: NotIn, values: [x]}, {key: c, operator: Exists}, {key: d, operator: DoesNotExist}]}}",
    );
    let Subject::Pods { namespace, pods } = policy.subject else {
        panic!()
    };
    assert_eq!(namespace, "shop");
    let labels = |pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    };
    assert!(pods.matches(&labels(&[("z", "1"), ("a", "y"), ("b", "y"), ("c", "")])));
    assert!(pods.matches(&labels(&[("z", "1"), ("a", "y"), ("c", "")])));
    assert!(!pods.matches(&labels(&[("z", "2"), ("a", "y"), ("c", "")])));
    assert!(!pods.matches(&labels(&[("z", "1"), ("a", "z"), ("c", "")])));
    assert!(!pods.matches(&labels(&[("z", "1"), ("a", "y"), ("b", "x"), ("c", "")])));
    assert!(!pods.matches(&labels(&[("z", "1"), ("a", "y")])));
    assert!(!pods.matches(&labels(&[("z", "1"), ("a", "y"), ("c", ""), ("d", "")])));
}

/// A spec, and the beginning of its only rejection.
const REFUSED: &[(&str, &str)] = &[
    (
        "{ingress: [{from: [{}]}]}",
        "spec.ingress[0].from[0]: must set podSelector",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr: invalid CIDR \"10.0.0.0/33\"",
    ),
    (
        "{ingress: [{from: [{ipBlock: {}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr: invalid CIDR \"\"",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except[0]: 11.0.0.0/16 must be a strict subset",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except[0]: 10.0.0.0/8 must be a strict subset",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}",
        "spec.ingress[0].from[0].ipBlock: must not be set with podSelector",
    ),
    (
        "{ingress: [{ports: [{port: 0}]}]}",
        "spec.ingress[0].ports[0].port: invalid port 0",
    ),
    (
        "{egress: [{ports: [{port: 65536}]}]}",
        "spec.egress[0].ports[0].port: invalid port 65536",
    ),
    (
        "{ingress: [{ports: [{port: 90, endPort: 80}]}]}",
        "spec.ingress[0].ports[0].endPort: must be greater than or equal to port 90",
    ),
    (
        "{ingress: [{ports: [{port: http, endPort: 80}]}]}",
        "spec.ingress[0].ports[0].endPort: must not be set with a named port",
    ),
    (
        "{ingress: [{ports: [{endPort: 80}]}]}",
        "spec.ingress[0].ports[0].endPort: must not be set without port",
    ),
    (
        "{ingress: [{ports: [{port: HTTP}]}]}",
        "spec.ingress[0].ports[0].port: invalid port name \"HTTP\"",
    ),
    (
        "{ingress: [{ports: [{port: '80'}]}]}",
        "spec.ingress[0].ports[0].port: invalid port name \"80\"",
    ),
    (
        "{ingress: [{ports: [{protocol: ICMP}]}]}",
        "spec.ingress[0].ports[0].protocol: unsupported value \"ICMP\"",
    ),
    (
        "{policyTypes: [Both]}",
        "spec.policyTypes[0]: unsupported value \"Both\": must be Ingress or Egress",
    ),
    (
        "{podSelector: {matchLabels: {'a b': c}}}",
        "spec.podSelector.matchLabels.a b: invalid label key \"a b\"",
    ),
    (
        "{podSelector: {matchLabels: {a: 'b c'}}}",
        "spec.podSelector.matchLabels.a: invalid label value \"b c\"",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Is}]}}",
        "spec.podSelector.matchExpressions[0].operator: unsupported value \"Is\"",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
        "spec.podSelector.matchExpressions[0].values: must not be empty for operator In",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
        "spec.podSelector.matchExpressions[0].values: must be empty for operator Exists",
    ),
    (
        "{podSelector: {matchLabels: {a: 1}}}",
        "spec.podSelector.matchLabels.a: invalid type",
    ),
    ("{ingress: {from: []}}", "spec.ingress: invalid type"),
    (
        "{ingress: [{ports: [{port: [80]}]}]}",
        "spec.ingress[0].ports[0].port: ",
    ),
];

#[test]
fn values_that_the_api_server_refuses_are_rejected_by_field() {
    for (spec, expected) in REFUSED {
        let errors = errors(spec);
        assert!(
            errors.len() == 1 && errors[0].starts_with(expected),
            "{spec}\n  expected {expected}\n  got      {errors:?}"
        );
    }
}

#[test]
fn every_problem_is_reported() {
    let errors =
        errors("{ingress: [{ports: [{port: 0}]}, {ports: [{port: 0}, {port: 1}, {protocol: X}]}]}");
    assert_eq!(errors.len(), 3, "{errors:?}");
}

#[test]
fn unknown_field_is_a_warning() {
    let outcome = standalone(&with_spec("{podSelector: {}, ingress: [{form: []}]}"));
    assert_eq!(rejections(&outcome), [""; 0]);
    assert_eq!(
        warnings(&outcome),
        ["NetworkPolicy shop/p: spec.ingress[0].form: unknown field; it is ignored"]
    );
}
