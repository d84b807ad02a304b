// SPDX-License-Identifier: Apache-2.0
//! Tests of pods, namespaces, nodes, services and endpoints.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_plan::cluster::{ClusterSnapshot, Pod, ServiceEndpoint, Transport};

use super::{clean, in_cluster, rejections, service, standalone};

fn pod_object(metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: web-1, namespace: shop, uid: u1, {metadata}}}, spec: {{nodeName: n1, {spec}}}, status: {{podIPs: [{{ip: 10.0.0.1}}, {{ip: 'fd00::1'}}], {status}}}}}"
    )
}

fn pod(metadata: &str, spec: &str, status: &str) -> Pod {
    Pod::clone(&clean(&pod_object(metadata, spec, status)).cluster.pods["u1"])
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn pod_defaults() {
    let pod = pod("", "", "");
    assert_eq!(pod.service_account, "default");
    assert_eq!(pod.node, "n1");
    assert_eq!(pod.addresses, [ip("10.0.0.1"), ip("fd00::1")].into());
    assert_eq!(pod.workload, ("Pod".to_owned(), "web-1".to_owned()));
    assert!(pod.ready && !pod.terminating && !pod.host_network);
    assert_eq!(pod.netns_path, None);
    let bare = clean("{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: 10.0.0.9}}");
    assert_eq!(
        bare.cluster.pods["default.a"].addresses,
        [ip("10.0.0.9")].into()
    );
    let labels = &bare.cluster.namespaces["default"].labels;
    assert_eq!(labels["kubernetes.io/metadata.name"], "default");
}

#[test]
fn workload_is_the_owner_or_a_label() {
    let owned = |kind: &str, name: &str, labels: &str| {
        let metadata = format!(
            "labels: {{{labels}}}, ownerReferences: [{{apiVersion: v1, kind: X, name: other, uid: x}}, {{apiVersion: v1, kind: {kind}, name: {name}, uid: x, controller: true}}]"
        );
        let (kind, name) = pod(&metadata, "", "").workload;
        format!("{kind} {name}")
    };
    let rows = [
        (
            "ReplicaSet",
            "web-5f6d",
            "pod-template-hash: 5f6d",
            "Deployment web",
        ),
        ("ReplicaSet", "web-5f6d", "", "ReplicaSet web-5f6d"),
        ("StatefulSet", "db", "", "StatefulSet db"),
        ("Node", "n1", "", "Pod web-1"),
        ("Node", "n1", "app.kubernetes.io/name: web", "Pod web"),
    ];
    for (kind, name, labels, expected) in rows {
        assert_eq!(owned(kind, name, labels), expected);
    }
}

#[test]
fn named_ports_come_from_containers_and_sidecars() {
    let pod = pod(
        "",
        "initContainers: [{name: i, ports: [{name: gone, containerPort: 1}]}, {name: s, restartPolicy: Always, ports: [{name: side, containerPort: 2}]}], containers: [{name: a, ports: [{name: http, containerPort: 8080}, {containerPort: 9}]}, {name: b, ports: [{name: http, containerPort: 8081}, {name: http, containerPort: 53, protocol: UDP}]}]",
        "",
    );
    let named: Vec<_> = pod
        .named_ports
        .iter()
        .map(|((name, transport), port)| (name.as_str(), *transport, *port))
        .collect();
    assert_eq!(
        named,
        [
            ("http", Transport::Tcp, 8080),
            ("http", Transport::Udp, 53),
            ("side", Transport::Tcp, 2)
        ]
    );
}

#[test]
fn readiness_follows_phase_and_conditions() {
    for phase in ["Succeeded", "Failed"] {
        let text = pod_object("", "containers: 3", &format!("phase: {phase}"));
        assert!(clean(&text).cluster.pods.is_empty(), "{phase}");
    }
    assert!(!pod("", "", "phase: Pending").ready);
    assert!(
        !pod(
            "",
            "",
            "phase: Running, conditions: [{type: Ready, status: 'False'}]"
        )
        .ready
    );
    assert!(
        pod(
            "",
            "",
            "phase: Running, conditions: [{type: Ready, status: 'True'}]"
        )
        .ready
    );
    assert!(pod("deletionTimestamp: '2026-01-01T00:00:00Z'", "", "").terminating);
    let host = pod("", "hostNetwork: true", "");
    assert!(host.host_network && host.addresses.is_empty());
}

#[test]
fn pod_addresses_are_required_without_a_control_plane() {
    let text = "{apiVersion: v1, kind: Pod, metadata: {name: a}}";
    assert!(rejections(&standalone(text))[0].contains("status.podIPs: is required"));
    assert!(rejections(&in_cluster(text)).is_empty());
    for (ips, expected) in [
        (
            "[{ip: 10.0.0.1}, {ip: 10.0.0.2}]",
            "second address of the same IP family",
        ),
        ("[{ip: 127.0.0.1}]", "not valid as a pod address"),
        ("[{ip: x}]", "invalid IP address"),
    ] {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, status: {{podIPs: {ips}}}}}"
        );
        let outcome = standalone(&text);
        assert!(rejections(&outcome)[0].contains(expected), "{ips}");
        assert!(outcome.cluster.pods.is_empty());
    }
}

#[test]
fn netns_annotation_is_used_only_without_a_control_plane() {
    let text = pod_object("annotations: {mesh.rs/netns: /run/netns/a}", "", "");
    let path = |cluster: &ClusterSnapshot| cluster.pods["u1"].netns_path.clone();
    assert_eq!(
        path(&standalone(&text).cluster).as_deref(),
        Some("/run/netns/a")
    );
    assert_eq!(path(&in_cluster(&text).cluster), None);
}

#[test]
fn mirror_pod_has_the_uid_of_its_static_pod() {
    let mirror = "annotations: {kubernetes.io/config.mirror: 0f4c9f5e2b1d4c1e9a573d2f1c0b9a88}";
    let uid = |text: &str| in_cluster(text).cluster.pods["u1"].static_uid.clone();
    let found = uid(&pod_object(mirror, "", ""));
    assert_eq!(found.as_deref(), Some("0f4c9f5e2b1d4c1e9a573d2f1c0b9a88"));
    // Any user can set this annotation.
    let hash = "annotations: {kubernetes.io/config.hash: 0f4c9f5e2b1d4c1e9a573d2f1c0b9a88}";
    assert_eq!(uid(&pod_object(hash, "", "")), None);
}

#[test]
fn second_pod_with_the_same_uid_is_rejected() {
    let one = pod_object("", "", "");
    let two = one.replace("web-1", "web-2");
    let outcome = standalone(&format!("{one}\n---\n{two}"));
    assert_eq!(outcome.cluster.pods["u1"].name.name, "web-1");
    assert_eq!(
        rejections(&outcome),
        [
            "Pod shop/web-2: metadata.uid: duplicate UID: pod shop/web-1 has the same; the pod is ignored"
        ]
    );
}

#[test]
fn node_has_addresses_and_pod_cidrs() {
    let outcome = clean(
        "{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {a: b}}, spec: {podCIDR: 10.0.0.0/24, podCIDRs: [10.0.0.0/24, 'fd00::/64']}, status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: Hostname, address: n1}]}}",
    );
    let node = &outcome.cluster.nodes["n1"];
    assert_eq!(node.addresses, [ip("192.0.2.1")].into());
    assert_eq!(node.pod_cidrs.len(), 2);
    assert_eq!(node.labels["a"], "b");
}

fn endpoints(outcome: &super::Outcome, name: &str) -> Vec<String> {
    let describe = |e: &ServiceEndpoint| {
        let mut text = format!("{} {}:{}", e.port_name, e.address, e.port);
        for (flag, name) in [
            (e.ready, "ready"),
            (e.serving, "serving"),
            (e.terminating, "terminating"),
        ] {
            if flag {
                text += " ";
                text += name;
            }
        }
        text
    };
    service(outcome, name)
        .endpoints
        .iter()
        .map(describe)
        .collect()
}

const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIPs: [10.96.0.1, 'fd00:96::1'], ports: [{name: http, port: 80, targetPort: http, nodePort: 30080}, {name: dns, port: 53, protocol: UDP}], selector: {app: web}, externalIPs: [192.0.2.9], internalTrafficPolicy: Local, externalTrafficPolicy: Cluster}, status: {loadBalancer: {ingress: [{ip: 192.0.2.10}, {ip: 192.0.2.11, ipMode: Proxy}, {hostname: x}]}}}";

#[test]
fn service_has_addresses_ports_and_traffic_policies() {
    let outcome = clean(SERVICE);
    let made = service(&outcome, "shop/web");
    assert_eq!(made.cluster_ips, [ip("10.96.0.1"), ip("fd00:96::1")].into());
    assert_eq!(
        made.external_ips,
        [ip("192.0.2.9"), ip("192.0.2.10")].into()
    );
    assert!(made.internal_local && !made.external_local && !made.headless);
    let ports: Vec<_> = made
        .ports
        .iter()
        .map(|p| (p.name.as_str(), p.transport, p.port, p.node_port))
        .collect();
    assert_eq!(
        ports,
        [
            ("dns", Transport::Udp, 53, None),
            ("http", Transport::Tcp, 80, Some(30080))
        ]
    );
    let headless = clean(
        "{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {clusterIP: None, ports: [{port: 5432}]}}\n---\n{apiVersion: v1, kind: Service, metadata: {name: ext}, spec: {type: ExternalName, externalName: a.b}}",
    );
    let made = service(&headless, "default/db");
    assert!(made.headless && made.cluster_ips.is_empty());
    assert_eq!(headless.cluster.services.len(), 1);
}

#[test]
fn service_without_slices_selects_endpoints() {
    let pod = |name: &str, ip: &str, more: &str, labels: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{{labels}}} {more}}}, spec: {{containers: [{{name: a, ports: [{{name: http, containerPort: 8080}}]}}]}}, status: {{podIPs: [{{ip: {ip}}}]}}}}\n"
        )
    };
    let text = format!(
        "{SERVICE}\n{}{}{}",
        pod("a", "10.0.0.1", "", "app: web"),
        pod(
            "b",
            "10.0.0.2",
            ", deletionTimestamp: '2026-01-01T00:00:00Z'",
            "app: web"
        ),
        pod("c", "10.0.0.3", "", "app: other"),
    );
    assert_eq!(
        endpoints(&clean(&text), "shop/web"),
        [
            "dns 10.0.0.1:53 ready serving",
            "dns 10.0.0.2:53 serving terminating",
            "http 10.0.0.1:8080 ready serving",
            "http 10.0.0.2:8080 serving terminating",
        ]
    );
    assert!(endpoints(&in_cluster(&text), "shop/web").is_empty());
    let published = text.replace(
        "internalTrafficPolicy: Local",
        "publishNotReadyAddresses: true",
    );
    assert_eq!(
        endpoints(&clean(&published), "shop/web")[1],
        "dns 10.0.0.2:53 ready serving terminating"
    );
}

#[test]
fn endpoint_slices_replace_selected_endpoints() {
    let slice = |name: &str, endpoints: &str| {
        format!(
            "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}, addressType: IPv4, ports: [{{name: http, port: 8080}}], endpoints: [{endpoints}]}}\n"
        )
    };
    let text = format!(
        "{SERVICE}\n{}\n{}\n{}",
        slice(
            "a",
            "{addresses: [10.0.0.1], nodeName: n1}, {addresses: [10.0.0.2], conditions: {ready: false}}"
        ),
        slice(
            "b",
            "{addresses: [10.0.0.3], conditions: {ready: false, serving: true, terminating: true}}"
        ),
        pod_object("labels: {app: web}", "", ""),
    );
    let outcome = clean(&text.replace("---\n\n{", "---\n{").replace(
        "\n{apiVersion: v1, kind: Pod",
        "\n---\n{apiVersion: v1, kind: Pod",
    ));
    assert_eq!(
        endpoints(&outcome, "shop/web"),
        [
            "http 10.0.0.1:8080 ready serving",
            "http 10.0.0.2:8080",
            "http 10.0.0.3:8080 serving terminating",
        ]
    );
    assert_eq!(
        service(&outcome, "shop/web").endpoints[0].node.as_deref(),
        Some("n1")
    );
}

#[test]
fn invalid_service_fields_are_rejected_by_field() {
    let rows = [
        ("{ports: [{port: 0}]}", "spec.ports[0].port"),
        ("{ports: [{port: 80}, {port: 81}]}", "spec.ports[0].name"),
        (
            "{ports: [{name: a, port: 80}, {name: a, port: 81}]}",
            "spec.ports[1].name",
        ),
        (
            "{ports: [{name: a, port: 80}, {name: b, port: 80}]}",
            "spec.ports: duplicate port 80",
        ),
        ("{clusterIP: x, ports: []}", "spec.clusterIPs[0]"),
        ("{type: Odd}", "spec.type"),
        (
            "{internalTrafficPolicy: Near}",
            "spec.internalTrafficPolicy",
        ),
        (
            "{ports: [{port: 80, targetPort: HTTP}]}",
            "spec.ports[0].targetPort",
        ),
    ];
    for (spec, expected) in rows {
        let outcome = standalone(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: x}}, spec: {spec}}}"
        ));
        assert!(
            rejections(&outcome)[0].contains(expected),
            "{spec}: {:?}",
            rejections(&outcome)
        );
        assert!(outcome.cluster.services.is_empty());
    }
}

#[test]
fn api_server_addresses_come_from_the_kubernetes_service() {
    let outcome = clean(
        "{apiVersion: v1, kind: Service, metadata: {name: kubernetes, namespace: default}, spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443}]}}\n---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: kubernetes, namespace: default, labels: {kubernetes.io/service-name: kubernetes}}, addressType: IPv4, ports: [{name: https, port: 6443}], endpoints: [{addresses: [192.0.2.1]}]}",
    );
    assert_eq!(outcome.cluster.api_servers, [ip("192.0.2.1")].into());
}

#[test]
fn pod_is_ready_for_tunnels_if_its_own_node_reports_it() {
    let node = |name: &str, status: &str| {
        format!(
            "---\n{{apiVersion: mesh.rs/v1alpha1, kind: MeshNode, metadata: {{name: {name}}}, status: {status}}}\n"
        )
    };
    let text = format!(
        "{}\n---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, uid: nsuid}}}}\n{}{}",
        pod_object("", "", ""),
        node("n1", "{version: '1'}"),
        node("n2", "{enrolledNamespaces: [nsuid]}"),
    );
    assert_eq!(
        in_cluster(&text).cluster.ready,
        Some(BTreeSet::new().into())
    );
    let ready = text.replace("{version: '1'}", "{enrolledNamespaces: [nsuid]}");
    assert_eq!(
        in_cluster(&ready).cluster.ready,
        Some(BTreeSet::from(["u1".into()]).into())
    );
    let ready = text.replace("{version: '1'}", "{enrolledPods: [u1]}");
    assert_eq!(
        in_cluster(&ready).cluster.ready,
        Some(BTreeSet::from(["u1".into()]).into())
    );
    assert_eq!(standalone(&ready).cluster.ready, None);
}
