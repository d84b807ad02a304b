// SPDX-License-Identifier: Apache-2.0
//! The real cluster that installation and demo stand on: pods of two nodes talk over services, and
//! nothing of it is left.

use std::path::PathBuf;
use std::time::Duration;

use mesh_test::cluster::{BASE, SOON};
use mesh_test::{Cluster, eventually, sweep::remains};

#[test]
fn real_pods_talk_and_nothing_is_left() {
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
    drop(cluster);
    eventually("everything to be removed", Duration::from_secs(10), || {
        let left: Vec<PathBuf> = remains(id).expect("looked");
        left.is_empty().then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}", remains(id)));
}
