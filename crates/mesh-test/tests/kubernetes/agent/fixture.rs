// SPDX-License-Identifier: Apache-2.0
//! A lab whose pods are objects of a real API server, created as by a kubelet.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_test::mesh::ENROLLED;
use mesh_test::reports::{Storm, Tcp};
use mesh_test::{AgentConfig, Kube, Lab, Mesh, Pod, PodSpec, Proc, Topology, eventually};
use serde_json::{Value, json};

pub(crate) const SOON: Duration = Duration::from_secs(20);
pub(crate) const PORT: u16 = 7000;

/// A lab whose pods are in a real API server, as a kubelet would put them there.
pub(crate) struct Fixture {
    /// Processes that keep the pods' cgroups alive, as sandboxes do.
    pub(crate) sandboxes: Vec<Proc>,
    pub(crate) mesh: Mesh,
    pub(crate) kube: Kube,
}

pub(crate) fn crds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds")
}

pub(crate) fn install_crds(kube: &Kube) {
    let dir = crds();
    let dir = dir.to_str().expect("a path");
    kube.kubectl(["apply", "--server-side", "-f", dir])
        .expect("CRDs");
    kube.crds_established().expect("established");
}

/// Applies a JSON patch to a CRD.
pub(crate) fn patch_crd(kube: &Kube, crd: &str, patch: &Value) {
    let patch = patch.to_string();
    kube.kubectl(["patch", "crd", crd, "--type=json", "-p", &patch])
        .expect("patch");
}

/// Returns the schema of a CRD that accepts any object.
pub(crate) fn any_schema() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

pub(crate) fn nodes(kube: &Kube, lab: &Lab) {
    for node in lab.nodes() {
        let cidrs = node.pod_cidrs();
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        });
        kube.apply_text(&object.to_string()).expect("node");
        let addresses = json!([{"type": "InternalIP", "address": node.v4()}]);
        let status = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "status": {"addresses": addresses},
        });
        kube.apply_status(&status.to_string())
            .expect("node's status");
    }
}

/// Makes the object, then the pod, its sandbox, and says where it is.
fn add_pod(
    kube: &Kube,
    lab: &mut Lab,
    namespace: &str,
    name: &str,
    node: u8,
) -> Result<(Arc<Pod>, Proc)> {
    let node_name = lab.node(node).name().to_owned();
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {
            "nodeName": node_name,
            "serviceAccountName": "default",
            "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "localhost/none:1"}],
        },
    });
    kube.apply_text(&object.to_string())?;
    let stored = kube.get(["pod", name, "--namespace", namespace])?;
    let uid = stored["metadata"]["uid"].as_str().context("a UID")?;
    let pod = lab.add_pod(PodSpec::new(name, node).namespace(namespace).uid(uid))?;
    let sandbox = pod.serve("--tcp [::1]:9")?;
    tell_status(kube, &pod, "Running")?;
    Ok((pod, sandbox))
}

pub(crate) fn tell_status(kube: &Kube, pod: &Pod, phase: &str) -> Result<()> {
    let ips: Vec<Value> = pod.addresses().iter().map(|ip| json!({"ip": ip})).collect();
    let status = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod.name(), "namespace": pod.namespace()},
        "status": {"phase": phase, "podIP": pod.addresses()[0], "podIPs": ips},
    });
    kube.apply_status(&status.to_string()).map(drop)
}

pub(crate) fn config(lab: &Lab, kubeconfig: &Path) -> AgentConfig {
    AgentConfig::new(&Mesh::own_ca(lab))
        .source("kubernetes")
        .flag("--kubeconfig", kubeconfig)
}

impl Fixture {
    /// Pods `a` and `near` on node 1, `b` on node 2, in the mesh.
    pub(crate) fn open() -> Self {
        let lab = Lab::builder(Topology::Routed).build().expect("lab");
        let kube = Kube::builder().start_in(&lab).expect("API server");
        install_crds(&kube);
        let kubeconfig = kube.kubeconfig().to_owned();
        Self::with(kube, lab, &kubeconfig)
    }

    pub(crate) fn with(kube: Kube, mut lab: Lab, kubeconfig: &Path) -> Self {
        kube.namespace("default", &[ENROLLED]).expect("namespace");
        nodes(&kube, &lab);
        let mut sandboxes = Vec::new();
        for (name, node) in [("a", 1), ("near", 1), ("b", 2)] {
            let (_, sandbox) = add_pod(&kube, &mut lab, "default", name, node).expect("pod");
            sandboxes.push(sandbox);
        }
        let config = config(&lab, kubeconfig);
        let start = Instant::now();
        let mesh = Mesh::start_with(lab, &config).expect("mesh");
        println!(
            "from the start of the agents to in force: {:?}",
            start.elapsed()
        );
        Self {
            sandboxes,
            mesh,
            kube,
        }
    }

    pub(crate) fn add(&mut self, name: &str, node: u8) -> Arc<Pod> {
        self.add_in("default", name, node)
    }

    pub(crate) fn add_in(&mut self, namespace: &str, name: &str, node: u8) -> Arc<Pod> {
        let added = add_pod(&self.kube, &mut self.mesh, namespace, name, node);
        let (pod, sandbox) = added.expect("pod");
        self.sandboxes.push(sandbox);
        pod
    }

    pub(crate) fn remove(&mut self, name: &str) {
        let delete = ["delete", "pod", name, "--force", "--grace-period=0"];
        self.kube.kubectl(delete).expect("delete");
        self.mesh.delete_pod(name).expect("delete");
    }

    pub(crate) fn logs(&self) -> String {
        [1, 2]
            .map(|node| self.mesh.agent(node).log_tail())
            .join("\n")
    }

    /// Waits until `from` reaches `to`, or does not.
    pub(crate) fn until(&self, from: &Pod, to: &Pod, reaches: bool) {
        let what = format!("{} to reach {}: {reaches}", from.name(), to.name());
        eventually(&what, SOON, || {
            (does_reach(from, to) == reaches).then_some(())
        })
        .with_context(|| self.logs())
        .expect("reached");
    }

    pub(crate) fn mesh_node(
        &self,
        node: u8,
        what: &str,
        mut holds: impl FnMut(&Value) -> bool,
    ) -> Value {
        let name = self.mesh.node(node).name().to_owned();
        eventually(what, SOON, || {
            let now = self.kube.get(["meshnode", &name]).ok()?;
            holds(&now["status"]).then_some(now)
        })
        .with_context(|| format!("{:?}\n{}", self.kube.get(["meshnode", &name]), self.logs()))
        .expect("reported")
    }

    pub(crate) fn stale(&self, node: u8) -> Value {
        let status = self.mesh.agent(node).ask("/status").expect("status");
        status["source"]["stale"].clone()
    }

    pub(crate) fn until_stale(&self, stale: bool) {
        for node in [1, 2] {
            eventually(
                "the source to say how it is",
                Duration::from_secs(60),
                || (self.stale(node).is_string() == stale).then_some(()),
            )
            .with_context(|| self.logs())
            .expect("says so");
        }
    }
}

pub(crate) fn does_reach(from: &Pod, to: &Pod) -> bool {
    let line = format!("tcp --to {}:{PORT} --timeout-ms 1500", to.v4());
    let report: Option<Tcp> = from.probe(&line).ok().and_then(|out| out.json().ok());
    report.is_some_and(|report| report.ok && report.ends_agree())
}

pub(crate) fn serve(pod: &Pod) -> Proc {
    pod.serve(&format!("--tcp [::]:{PORT}")).expect("server")
}

/// Starts connections that go on until [`unharmed`] ends them.
pub(crate) fn storm(from: &Pod, to: &Pod) -> Proc {
    let line = format!(
        "storm --to {}:{PORT} --seconds 600 --pause-us 2000",
        to.v4()
    );
    from.start_probe(&line).expect("storm")
}

/// Ends a storm, of which no connection may have failed.
pub(crate) fn unharmed(storm: &Proc) {
    let report = Storm::stop(storm).expect("report");
    println!("storm: {report:?}");
    assert!(report.ok > 0, "{report:?}");
    assert_eq!(report.failed, 0, "{report:?}");
}
