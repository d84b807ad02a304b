// SPDX-License-Identifier: Apache-2.0
//! Installation on a real API server: every object is accepted by both ways to install, and the service
//! accounts have exactly the permissions that the programs use.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_test::kube::helm;
use mesh_test::{Cmd, Kube, eventually};

const SOON: Duration = Duration::from_secs(60);

fn deploy() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("workspace");
    root.join("deploy")
}

/// A cluster with what docs/install.md applies.
fn installed() -> Kube {
    let kube = Kube::builder().start().expect("servers");
    kube.kubectl(["create", "-k", &base("policy-api")])
        .expect("the shared kind");
    install(&kube);
    kube
}

fn base(part: &str) -> String {
    deploy().join("kustomize").join(part).display().to_string()
}

/// The kustomize base, applied with its CRDs first: the server needs a moment for new kinds.
fn install(kube: &Kube) {
    let path = base("");
    kube.kubectl([
        "apply",
        "--server-side",
        "-f",
        &format!("{path}/crds"),
        "-f",
        &format!("{path}/namespace.yaml"),
    ])
    .expect("CRDs and namespace");
    kube.crds_established().expect("established");
    kube.kubectl(["apply", "--server-side", "-k", &path])
        .expect("kustomize base");
    kube.kubectl([
        "apply",
        "--server-side",
        "--dry-run=server",
        "-k",
        &format!("{path}/uninstall"),
    ])
    .expect("what uninstalls");
}

/// The kind ClusterNetworkPolicy as somebody else installs it, and an object of it.
const FOREIGN: [&str; 2] = [
    "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: clusternetworkpolicies.policy.networking.k8s.io
  labels: {whose: another}
  annotations: {api-approved.kubernetes.io: unapproved}
spec:
  group: policy.networking.k8s.io
  names: {kind: ClusterNetworkPolicy, plural: clusternetworkpolicies}
  scope: Cluster
  versions:
    - name: v1alpha2
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
",
    "{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: theirs}}",
];

#[test]
fn foreign_crd_survives_install_and_uninstall() {
    let kube = Kube::builder().start().expect("servers");
    for text in FOREIGN {
        kube.apply_text(text).expect("another's");
        kube.crds_established().expect("established");
    }
    let crd = "clusternetworkpolicies.policy.networking.k8s.io";
    let theirs = || {
        let found = kube.get(["crd", crd])?;
        kube.get([crd, "theirs"])?;
        Ok::<_, anyhow::Error>(found["metadata"]["labels"]["whose"] == "another")
    };
    let refused = kube.kubectl(["create", "-k", &base("policy-api")]);
    let refused = format!("{:#}", refused.expect_err("it is there"));
    assert!(refused.contains("AlreadyExists"), "{refused}");
    install(&kube);
    assert!(theirs().expect("theirs"), "the kind was replaced");
    let ours = ["crd", "meshpolicies.mesh.rs"];
    kube.get(ours).expect("ours");
    // No controller runs that would end the namespace.
    let delete = ["delete", "--ignore-not-found", "--wait=false", "-k"];
    let base = base("");
    kube.kubectl(delete.into_iter().chain([&*base]))
        .expect("delete");
    let gone = || kube.get(ours).is_err().then_some(());
    eventually("our kinds to go", SOON, gone).expect("gone");
    assert!(theirs().expect("theirs"), "the kind was replaced");
}

#[test]
fn kustomize_base_is_accepted_and_roles_are_minimal() {
    let kube = installed();
    let agent = "system:serviceaccount:mesh-system:mesh-agent";
    let controller = "system:serviceaccount:mesh-system:mesh-controller";
    let may = |user: &str, what: &str| kube.can_i(user, what.split(' ')).expect("can-i");
    for kind in [
        "pods",
        "namespaces",
        "nodes",
        "services",
        "endpointslices.discovery.k8s.io",
        "networkpolicies.networking.k8s.io",
        "clusternetworkpolicies.policy.networking.k8s.io",
        "meshpolicies.mesh.rs",
        "clustermeshpolicies.mesh.rs",
        "meshauthentications.mesh.rs",
        "meshtrafficpolicies.mesh.rs",
        "meshnodes.mesh.rs",
    ] {
        for verb in ["list", "watch"] {
            assert!(may(agent, &format!("{verb} {kind} -A")), "{verb} {kind}");
        }
        assert!(!may(agent, &format!("delete {kind} -A")), "delete {kind}");
    }
    assert!(may(agent, "get nodes"));
    for verb in ["create", "patch"] {
        assert!(may(agent, &format!("{verb} meshnodes.mesh.rs")), "{verb}");
    }
    assert!(may(agent, "patch meshnodes.mesh.rs --subresource=status"));
    for denied in [
        "get secrets -A",
        "list secrets -n mesh-system",
        "create pods -A",
        "patch pods --subresource=status -A",
        "patch nodes",
        "create meshpolicies.mesh.rs -A",
        "patch meshpolicies.mesh.rs --subresource=status -A",
        "get configmaps -A",
        "create tokenreviews.authentication.k8s.io",
        "create serviceaccounts --subresource=token -A",
    ] {
        assert!(!may(agent, denied), "the agent: {denied}");
    }
    for allowed in [
        "create tokenreviews.authentication.k8s.io",
        "list pods -A",
        "update secrets/mesh-ca -n mesh-system",
        "update leases.coordination.k8s.io/mesh-controller -n mesh-system",
        "patch meshpolicies.mesh.rs --subresource=status -A",
    ] {
        assert!(may(controller, allowed), "the controller: {allowed}");
    }
    for denied in [
        "get secrets/other -n mesh-system",
        "list secrets -A",
        "create pods -A",
        "create meshpolicies.mesh.rs -A",
        "create serviceaccounts --subresource=token -A",
        "patch meshnodes.mesh.rs --subresource=status",
    ] {
        assert!(!may(controller, denied), "the controller: {denied}");
    }
}

#[test]
fn helm_chart_equals_base_and_rejects_invalid_values() {
    let kube = installed();
    let helm = helm().expect("helm");
    let chart = deploy().join("helm");
    let run = |args: &[&str]| {
        let cmd = Cmd::new(&helm).args(args).args([&chart]);
        let cmd = cmd
            .args(["--namespace", "mesh-system"])
            .env("HOME", kube.host().dir());
        kube.host().run(cmd, SOON).expect("helm ends")
    };
    let rendered = run(&["template", "mesh"]).ok().expect("rendered").text();
    assert!(
        rendered.contains("name: mesh-uninstall"),
        "the hook is there"
    );
    let apply = [
        "apply",
        "--server-side",
        "--dry-run=server",
        "--force-conflicts",
        "-f",
        "-",
    ];
    let apply = kube
        .kubectl_cmd(apply)
        .expect("kubectl")
        .input(rendered.clone());
    kube.host()
        .run(apply, SOON)
        .expect("it ends")
        .ok()
        .expect("the server accepts what the chart renders");
    // Applied over the base, nothing changes: both say the same.
    let diff = kube.kubectl_cmd(["diff", "--server-side", "--force-conflicts", "-f", "-"]);
    let without_hook: Vec<&str> = rendered
        .split("\n---\n")
        .filter(|object| !object.contains("helm.sh/hook"))
        .collect();
    let diff = diff.expect("kubectl").input(without_hook.join("\n---\n"));
    let said = kube.host().run(diff, SOON).expect("it ends");
    assert!(
        said.status.success(),
        "chart and base differ: {}",
        said.text()
    );
    let wrong = run(&["template", "mesh", "--set", "agent.logLevl=debug"]);
    assert!(
        !wrong.status.success() && wrong.to_string().contains("logLevl"),
        "{wrong}"
    );
    let monitor = run(&["template", "mesh", "--set", "podMonitor.enabled=true"]);
    assert!(monitor.text().contains("kind: PodMonitor"), "{monitor}");
}
