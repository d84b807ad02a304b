// SPDX-License-Identifier: Apache-2.0
//! The control plane of the other tests is real, refuses what it must, survives restarts, and leaves
//! nothing behind.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use mesh_test::kube::Bound;
use mesh_test::{Kube, LabId, eventually, sweep, sweep::remains};

const SOON: Duration = Duration::from_secs(30);

fn claims(token: &str) -> serde_json::Value {
    // Base64url without padding, as JOSE has it.
    let body = token.split('.').nth(1).expect("a JWT has three parts");
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'-' => 62,
        _ => 63,
    };
    let bits = body.bytes().map(digit).collect::<Vec<_>>();
    let bytes: Vec<u8> = bits
        .chunks(4)
        .flat_map(|four| {
            let value = four.iter().enumerate().fold(0_u32, |sum, (at, bits)| {
                sum | u32::from(*bits) << (18 - 6 * at)
            });
            value.to_be_bytes()[1..four.len()].to_vec()
        })
        .collect();
    serde_json::from_slice(&bytes).expect("claims are JSON")
}

fn objects_with_status(kube: &Kube) -> serde_json::Value {
    // Objects, status, service accounts.
    kube.namespace("shop", &[("mesh.rs/dataplane", "enabled")])
        .expect("namespace");
    let node = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"spec":{"podCIDR":"10.1.0.0/24"}}"#;
    kube.apply_text(node).expect("node");
    let pod = r"
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c, image: none}]}
";
    kube.apply_text(pod).expect("pod");
    let status = r"
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
status: {phase: Running, podIP: 10.1.0.7, podIPs: [{ip: 10.1.0.7}]}
";
    kube.apply_status(status).expect("status");
    let stored = kube.get(["pod", "web", "-n", "shop"]).expect("get");
    assert_eq!(
        stored["status"]["podIP"], "10.1.0.7",
        "the status is stored: {stored}"
    );
    stored
}

fn tokens_say_for_whom_and_where(kube: &Kube) {
    // Tokens: audience, and the node of the pod that they are bound to.
    let token = kube
        .token(("shop", "default"), Some("mesh"), Some(Bound::Pod("web")))
        .expect("token");
    let claims = claims(&token);
    assert_eq!(claims["aud"][0], "mesh", "{claims}");
    assert_eq!(claims["kubernetes.io"]["node"]["name"], "n1", "{claims}");
}

fn access_is_refused_without_a_role(kube: &Kube) {
    // RBAC refuses who has no role, and lets who has one.
    let token = kube.token(("shop", "default"), None, None).expect("token");
    let config = kube
        .token_kubeconfig("default", &token)
        .expect("kubeconfig");
    let as_account = |args: [&str; 4]| {
        let cmd = kube.kubectl_as(&config, args).expect("kubectl");
        kube.host().run(cmd, SOON).expect("it ends")
    };
    let refused = as_account(["get", "pods", "-n", "shop"]);
    assert!(
        !refused.status.success() && refused.to_string().contains("forbidden"),
        "{refused}"
    );
    let account = "system:serviceaccount:shop:default";
    assert!(
        !kube
            .can_i(account, ["list", "pods", "-n", "shop"])
            .expect("can-i")
    );
    // Roles that are sums of others, `view` for example, are empty without a controller manager.
    let role = [
        "create",
        "role",
        "reader",
        "--verb=get,list",
        "--resource=pods",
    ];
    kube.kubectl(role.into_iter().chain(["-n", "shop"]))
        .expect("role");
    let bind = [
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        "-n",
        "shop",
    ];
    kube.kubectl(bind.into_iter().chain(["--serviceaccount=shop:default"]))
        .expect("bind");
    eventually("the role to count", SOON, || {
        as_account(["get", "pods", "-n", "shop"])
            .status
            .success()
            .then_some(())
    })
    .expect("allowed");

    // A node may write its own objects only.
    let node = kube
        .user("system:node:n2", Some("system:nodes"))
        .expect("node's kubeconfig");
    let steal = ["label", "node", "n1", "a=b"];
    let refused = kube
        .host()
        .run(kube.kubectl_as(&node, steal).expect("kubectl"), SOON)
        .expect("it ends");
    assert!(refused.to_string().contains("forbidden"), "{refused}");
}

#[test]
fn control_plane_survives_api_server_restart() {
    let mut kube = Kube::builder().start().expect("servers");
    let id: LabId = kube.id();
    let stored = objects_with_status(&kube);
    tokens_say_for_whom_and_where(&kube);
    access_is_refused_without_a_role(&kube);

    // Killed, compacted and started again it knows everything, on the same port.
    let url = kube.url().expect("url");
    kube.kill_api_server().expect("kill");
    assert!(
        kube.kubectl(["get", "pods", "-A"]).is_err(),
        "nobody answers"
    );
    assert!(kube.compact_etcd().expect("compaction") > 1);
    kube.start_api_server().expect("start again");
    assert_eq!(kube.url().expect("url"), url);
    let found = kube.get(["pod", "web", "-n", "shop"]).expect("get");
    assert_eq!(found["metadata"]["uid"], stored["metadata"]["uid"]);

    drop(kube);
    let left: Vec<PathBuf> = remains(id).expect("looked");
    assert!(left.is_empty(), "left: {left:?}");
}

#[test]
fn controller_manager_creates_slices_and_deletes_namespaces() {
    let kube = Kube::builder().controllers().start().expect("servers");
    kube.kubectl(["create", "namespace", "shop"])
        .expect("namespace");
    let account = ["serviceaccount", "default", "-n", "shop"];
    kube.until(SOON, &account, |_| true)
        .expect("the default account");
    // The endpoints of a pod whose node is not there are left out.
    let objects = r"
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c, image: none}]}
";
    kube.apply_text(objects).expect("objects");
    let status = r"
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
status:
  phase: Running
  podIP: 10.1.0.7
  podIPs: [{ip: 10.1.0.7}]
  conditions: [{type: Ready, status: 'True'}]
";
    kube.apply_status(status).expect("status");
    kube.until(SOON, &["endpointslices", "-n", "shop"], |slices| {
        let endpoint = &slices["items"][0]["endpoints"][0];
        endpoint["addresses"][0] == "10.1.0.7" && endpoint["conditions"]["ready"] == true
    })
    .expect("a slice with the pod");
    // Pods on a node without a kubelet end when they are told to with no grace.
    kube.kubectl([
        "delete",
        "pod",
        "web",
        "-n",
        "shop",
        "--grace-period=0",
        "--force",
    ])
    .expect("delete");
    kube.kubectl([
        "delete",
        "namespace",
        "shop",
        "--wait=true",
        "--timeout=30s",
    ])
    .expect("the namespace ends");
}

/// Runs in a child that is killed, and says what it made.
#[test]
#[ignore = "started by the test below"]
fn killed_child() {
    let kube = Kube::builder().start().expect("servers");
    println!("made {}", kube.id());
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn killed_test_leaves_no_servers() {
    let this = std::env::current_exe().expect("this program");
    let mut child = Command::new(this)
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("servers::killed_child")
        .stdout(Stdio::piped())
        .spawn()
        .expect("child");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let id: LabId = lines
        .map_while(Result::ok)
        .find_map(|line| line.split("made ").nth(1).map(str::to_owned))
        .expect("it says what it made")
        .parse()
        .expect("an id");
    child.kill().expect("kill -9");
    child.wait().expect("reaped");
    assert!(!remains(id).expect("looked").is_empty(), "it had servers");
    sweep().expect("sweep");
    let left = remains(id).expect("looked");
    assert!(left.is_empty(), "left: {left:?}");
}
