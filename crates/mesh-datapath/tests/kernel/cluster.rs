// SPDX-License-Identifier: Apache-2.0
//! Tests a real cluster, as installation and demo use it: pods of two nodes communicate over Services, all finders
//! return the same network namespaces, and nothing is left behind.

use std::path::PathBuf;
use std::time::Duration;

use mesh_datapath::pods::find::{ByCgroup, ByCri, Find};
use mesh_datapath::pods::{self, PodNetns};
use mesh_plan::plan::LocalPod;
use mesh_test::cluster::{BASE, SOON};
use mesh_test::{Cluster, eventually, sweep::remains};
use serde_json::Value;

#[test]
fn cluster_pods_communicate_and_leave_nothing_behind() {
    let cluster = Cluster::start(2, |_| {}).expect("cluster");
    let kube = cluster.kube();
    let id = kube.id();
    let pods = format!(
        r"
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: web, namespace: default}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      containers:
        - name: web
          image: {BASE}
          command: [/usr/bin/python3, -m, http.server, '8080', --directory, /etc, --bind, '::']
          readinessProbe: {{httpGet: {{path: /, port: 8080}}}}
          volumeMounts: [{{name: usr, mountPath: /usr, readOnly: true}}]
      volumes: [{{name: usr, hostPath: {{path: /usr}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}
"
    );
    kube.apply_text(&pods).expect("apply");
    cluster
        .rolled_out("default", "daemonset/web")
        .expect("rollout");
    let found = kube.get(["pods", "-l", "app=web"]).expect("pods");
    let pods: Vec<(&str, &str)> = found["items"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|pod| {
            let text = |path| pod.pointer(path).and_then(|v| v.as_str()).expect("text");
            (text("/metadata/name"), text("/status/podIP"))
        })
        .collect();
    assert_eq!(pods.len(), 2, "one on each node: {found}");
    let addresses = &found["items"][0]["status"]["podIPs"];
    assert_eq!(addresses.as_array().map(Vec::len), Some(2), "dual stack");
    let service = kube.get(["service", "web"]).expect("service");
    let service = service["spec"]["clusterIP"].as_str().expect("an address");
    for address in [pods[1].1, service] {
        let host = if address == service {
            address.to_owned()
        } else {
            format!("{address}:8080")
        };
        let url = format!("http://{host}/passwd");
        let curl = ["curl", "--silent", "--max-time", "2", &url];
        eventually("an answer", SOON, || {
            let output = cluster.exec(("default", pods[0].0), curl).ok()?;
            output.text().contains("nobody").then_some(())
        })
        .unwrap_or_else(|e| panic!("{e:#} from {url}"));
    }
    for pod in found["items"].as_array().expect("a list") {
        found_both_ways(&cluster, pod);
    }
    found_both_ways(&cluster, &static_pod(&cluster));
    drop(cluster);
    eventually("everything to be removed", Duration::from_secs(10), || {
        let left: Vec<PathBuf> = remains(id).expect("looked");
        left.is_empty().then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}", remains(id)));
}

/// Creates a static pod on a node, and returns its object in the API server.
fn static_pod(cluster: &Cluster) -> Value {
    let manifest = format!(
        r"
apiVersion: v1
kind: Pod
metadata: {{name: fixed, namespace: default}}
spec:
  containers:
    - name: sleep
      image: {BASE}
      command: [/usr/bin/sleep, infinity]
      volumeMounts: [{{name: usr, mountPath: /usr, readOnly: true}}]
  volumes: [{{name: usr, hostPath: {{path: /usr}}}}]
"
    );
    let node = cluster.node(1);
    std::fs::write(node.static_pods().join("fixed.yaml"), manifest).expect("a manifest");
    let name = format!("fixed-{}", node.name());
    let runs = |pod: &Value| pod["status"]["phase"] == "Running";
    let pod = cluster.kube().until(SOON, &["pod", &name], runs);
    pod.expect("a static pod that runs")
}

/// Checks that the kubelet's cgroups and the container runtime lead to the same network namespace, with the pod's
/// addresses.
fn found_both_ways(cluster: &Cluster, pod: &Value) {
    let text = |path| pod.pointer(path).and_then(Value::as_str);
    let uid = text("/metadata/uid").expect("a UID");
    let node = text("/spec/nodeName").expect("a node");
    let node = cluster.node_named(node).expect("a node");
    let mirrored = text("/metadata/annotations/kubernetes.io~1config.mirror");
    assert_eq!(
        mirrored.is_some(),
        text("/metadata/name").is_some_and(|name| name.starts_with("fixed"))
    );
    let addresses = pod["status"]["podIPs"].as_array().expect("addresses");
    let addresses = addresses.iter().filter_map(|ip| ip["ip"].as_str());
    let local = LocalPod {
        addresses: addresses.map(|ip| ip.parse().expect("an IP")).collect(),
        static_uid: mirrored.map(str::to_owned),
        ..LocalPod::default()
    };
    let socket = node.path("/run/containerd/containerd.sock");
    let runtime = ByCri::new("/proc", socket).expect("a thread");
    let cgroups = found(uid, &local, &ByCgroup::new("/proc"));
    assert_eq!(cgroups.cookie, found(uid, &local, &runtime).cookie);
    // Neither finder finds a pod that does not exist.
    let other = "00000000-0000-4000-8000-000000000000";
    let missing = LocalPod {
        static_uid: None,
        ..local
    };
    let none = |find: &dyn Fn() -> Result<PodNetns, pods::Error>, why: &str| {
        let said = || find().err().map(|error| error.to_string());
        eventually(why, SOON, || said()?.contains(why).then_some(()))
            .map_err(|error| error.context(format!("{:?}", said())))
            .expect("nothing is found");
    };
    none(&|| pods::find(other, &missing, &runtime), "no sandbox");
    let cgroups = ByCgroup::new("/proc");
    none(&|| pods::find(other, &missing, &cgroups), "no process");
}

fn found(uid: &str, local: &LocalPod, find: &impl Find) -> PodNetns {
    let mut last = None;
    let netns = eventually("the pod's namespace", SOON, || {
        pods::find(uid, local, find)
            .map_err(|error| last = Some(error.to_string()))
            .ok()
    });
    netns
        .map_err(|error| error.context(format!("{last:?}")))
        .expect("it is found")
}
