// SPDX-License-Identifier: Apache-2.0
//! The manifests of a lab describe its nodes and pods.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_api::convert::{LastGood, Object, Options, convert};
use mesh_api::manifests::{self, Format};
use mesh_plan::cluster::ObjectName;
use mesh_test::manifests::Manifests;
use mesh_test::{Families, Lab, PodSpec, Topology};

#[test]
#[expect(clippy::too_many_lines, reason = "one object after the other")]
fn manifests_describe_the_lab() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("shop", &[("mesh.rs/dataplane", "enabled")])
        .pod(
            PodSpec::new("a", 1)
                .namespace("shop")
                .port("http", 80, "TCP")
                .label("tier", "on"),
        )
        .pod(
            PodSpec::new("b", 2)
                .families(Families::V6)
                .service_account("other"),
        )
        .build()
        .expect("lab");
    lab.apply(
        "policy",
        &serde_json::json!({"kind": "Unread", "spec": [[1, {"a": null}], {}]}),
    )
    .expect("apply");
    let vips = [
        "10.96.0.10".parse().expect("address"),
        "fd00:96::10".parse().expect("address"),
    ];
    lab.service(
        ("shop", "front"),
        &vips,
        ("app", "a"),
        &[(80, 8080, "TCP"), (53, 53, "UDP")],
    )
    .expect("service");
    let mut objects = Vec::new();
    for entry in std::fs::read_dir(lab.manifest_dir()).expect("manifests") {
        let name = entry
            .expect("entry")
            .file_name()
            .into_string()
            .expect("name");
        let format = Format::of(&name).expect("a manifest");
        let text = std::fs::read_to_string(lab.manifest_dir().join(&name)).expect("text");
        let values = manifests::objects(&text, format).expect(&name);
        objects.extend(values.into_iter().map(|value| Object {
            origin: name.clone(),
            value,
        }));
    }
    objects.sort_by(|a, b| a.origin.cmp(&b.origin));
    let written = Manifests::pod_object(&lab.pod("a"));
    assert!(
        objects.iter().any(|object| object.value == written),
        "{objects:?}"
    );
    let unread = objects
        .iter()
        .find(|object| object.origin == "policy.yaml")
        .expect("policy");
    assert_eq!(
        unread.value["spec"],
        serde_json::json!([[1, {"a": null}], {}])
    );
    objects.retain(|object| object.origin != "policy.yaml");

    let outcome = convert(&objects, &LastGood::default(), Options { standalone: true });
    assert_eq!(
        (outcome.rejections, outcome.warnings),
        (Vec::new(), Vec::new())
    );
    assert_eq!(outcome.cluster.pods.len(), 2);
    for pod in lab.pods() {
        let fact = &outcome.cluster.pods[pod.uid()];
        assert_eq!(fact.name, ObjectName::new(pod.namespace(), pod.name()));
        assert_eq!(
            (&fact.node, fact.ready),
            (&pod.node().name().to_owned(), true)
        );
        assert!(fact.addresses.iter().eq(pod.addresses()), "{fact:?}");
        assert_eq!(fact.netns_path, Some(pod.path().display().to_string()));
        let spiffe = format!(
            "spiffe://x/ns/{}/sa/{}",
            fact.name.namespace, fact.service_account
        );
        assert_eq!(spiffe, pod.spiffe_id("x"));
    }
    let service = &outcome.cluster.services[&ObjectName::new("shop", "front")];
    assert!(service.cluster_ips.iter().eq(&vips), "{service:?}");
    let a = lab.pod("a");
    let endpoints = service.endpoints.iter().map(|to| (to.address, to.port));
    let expected = [
        (a.v4().into(), 8080),
        (a.v4().into(), 53),
        (a.v6().into(), 8080),
    ];
    let endpoints: BTreeSet<(IpAddr, u16)> = endpoints.collect();
    assert!(
        expected.iter().all(|end| endpoints.contains(end)),
        "{endpoints:?}"
    );
    for node in lab.nodes() {
        let fact = &outcome.cluster.nodes[node.name()];
        assert!(fact.addresses.contains(&node.v4().into()), "{fact:?}");
        assert!(
            fact.pod_cidrs
                .iter()
                .map(ToString::to_string)
                .eq(node.pod_cidrs()),
            "{fact:?}"
        );
    }
    assert_eq!(
        (
            outcome.cluster.nodes.len(),
            outcome.cluster.namespaces.len()
        ),
        (2, 2)
    );
}
