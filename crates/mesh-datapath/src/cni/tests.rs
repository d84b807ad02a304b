// SPDX-License-Identifier: Apache-2.0

use mesh_api::{LastGood, Object, Options, convert};
use mesh_plan::authentication::DATAPLANE_LABEL;
use serde_json::json;

use super::*;

fn named(config: &[(&str, Value)], links: &[&str]) -> Option<CniPlugin> {
    let dir = tempfile::TempDir::new().unwrap();
    for (name, value) in config {
        fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    let links: Vec<String> = links.iter().map(|link| (*link).to_owned()).collect();
    find(dir.path(), &links)
}

#[test]
fn cni_plugin_is_detected_by_configuration_and_interfaces() {
    let list = |kinds: &[&str]| {
        let plugins: Vec<Value> = kinds.iter().map(|kind| json!({"type": kind})).collect();
        json!({"cniVersion": "0.4.0", "name": "k8s", "plugins": plugins})
    };
    let name = |cni: Option<CniPlugin>| cni.map(|cni| (cni.name, cni.enforces));
    let calico = [("10-calico.conflist", list(&["calico", "portmap"]))];
    assert_eq!(name(named(&calico, &[])), Some(("Calico", Enforces::Yes)));
    let flannel = [("10-flannel.conflist", list(&["flannel", "portmap"]))];
    assert_eq!(
        name(named(&flannel, &["flannel.1"])),
        Some(("Flannel", Enforces::No))
    );
    // Flannel with Calico's policy.
    assert_eq!(
        name(named(&flannel, &["flannel.1", "cali123"])),
        Some(("Calico", Enforces::Yes))
    );
    // The runtime uses the first file by name and ignores the others.
    let two = [
        ("99-bridge.conf", json!({"type": "bridge"})),
        calico[0].clone(),
    ];
    assert_eq!(name(named(&two, &[])), Some(("Calico", Enforces::Yes)));
    let multus = [(
        "00-multus.conf",
        json!({"type": "multus", "delegates": [list(&["cilium-cni"])]}),
    )];
    assert_eq!(name(named(&multus, &[])), Some(("Cilium", Enforces::Yes)));
    let kindnet = [(
        "10-kindnet.conflist",
        json!({"name": "kindnet", "plugins": [{"type": "ptp"}]}),
    )];
    assert_eq!(
        name(named(&kindnet, &[])),
        Some(("kindnet", Enforces::Perhaps))
    );
    assert_eq!(
        name(named(&[], &["lo", "eth0", "cilium_host"])),
        Some(("Cilium", Enforces::Yes))
    );
    assert!(
        !named(&[("1.conf", json!({"type": "macvlan"}))], &[])
            .unwrap()
            .gate
    );
    assert_eq!(named(&[], &["lo", "eth0"]), None);
}

#[test]
fn rules_that_would_drop_tunnels_are_reported() {
    let object = |value| Object {
        origin: String::new(),
        value,
    };
    let policy = |name: &str, app: &str, spec: Value| {
        let mut spec = spec;
        spec["podSelector"] = json!({"matchLabels": {"app": app}});
        object(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
        }))
    };
    let pod = |name: &str| {
        object(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": {"app": name}},
            "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"},
        }))
    };
    let mut out = pod("out");
    out.value["metadata"]["labels"][DATAPLANE_LABEL] = json!("disabled");
    let cluster = convert(
        &[
            object(json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": "shop", "labels": {"mesh.rs/dataplane": "enabled"}},
            })),
            pod("web"),
            out,
            policy(
                "web-port",
                "web",
                json!({"ingress": [{}, {"ports": [{"port": 80}]}]}),
            ),
            policy(
                "udp",
                "web",
                json!({"ingress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]}),
            ),
            policy(
                "has-it",
                "web",
                json!({"ingress": [{"ports": [{"port": 15000, "endPort": 16000}]}]}),
            ),
            policy("nothing", "web", json!({"policyTypes": ["Ingress"]})),
            policy(
                "out",
                "out",
                json!({"ingress": [{"ports": [{"port": 80}]}]}),
            ),
        ],
        &LastGood::default(),
        Options { standalone: false },
    )
    .cluster;
    let blocked = blocked(&cluster, 15008);
    let texts: Vec<String> = blocked.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "NetworkPolicy shop/web-port: spec.ingress[1].ports does not allow the tunnel port; add \
             {protocol: TCP, port: 15008}"
        ]
    );
}

/// A rule matters if the mesh enrolls a pod that its policy selects, by the rules of enrollment
/// themselves: a namespace that requires enrollment overrides the pod's label, and the mesh's own
/// namespace enrolls nothing.
#[test]
fn blocking_rules_are_those_of_enrolled_pods() {
    let object = |value| Object {
        origin: String::new(),
        value,
    };
    let labels = |value: Option<&str>| match value {
        Some(value) => json!({DATAPLANE_LABEL: value}),
        None => json!({}),
    };
    let is_named = |namespace: &str, of_namespace: Option<&str>, of_pod: Option<&str>| {
        let objects = [
            object(json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": namespace, "labels": labels(of_namespace)},
            })),
            object(json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": "web", "namespace": namespace, "uid": "web", "labels": labels(of_pod),
                },
                "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"},
            })),
            object(json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"name": "port", "namespace": namespace},
                "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]},
            })),
        ];
        let options = Options { standalone: false };
        let cluster = convert(&objects, &LastGood::default(), options).cluster;
        !blocked(&cluster, 15008).is_empty()
    };
    for (namespace, of_namespace, of_pod, expected) in [
        ("shop", None, None, false),
        ("shop", Some("enabled"), None, true),
        ("shop", Some("enabled"), Some("disabled"), false),
        ("shop", Some("required"), Some("disabled"), true),
        ("shop", None, Some("enabled"), true),
        ("kube-system", Some("enabled"), None, false),
        ("kube-system", None, Some("enabled"), true),
        ("mesh-system", None, Some("enabled"), false),
        ("mesh-system", Some("required"), Some("enabled"), false),
    ] {
        assert_eq!(
            is_named(namespace, of_namespace, of_pod),
            expected,
            "{namespace} {of_namespace:?}, pod {of_pod:?}"
        );
    }
}
