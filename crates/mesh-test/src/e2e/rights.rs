// SPDX-License-Identifier: Apache-2.0
//! Compares the mesh's RBAC roles with the API server's audit log: granted and used permissions.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::lines::{IN_FORCE, items, lossless};
use super::shop::{CLIENT, WEB};
use super::{Installed, SYSTEM};
use crate::wait::eventually;

/// A permission: API group, resource with subresource, verb.
type Right = (String, String, String);

/// Permissions that are needed although the audit log does not show them, each with the reason.
const UNSEEN: &[(&str, &str, &str, &str)] = &[
    ("mesh.rs", "meshnodes", "create", APPLIED),
    ("", "configmaps", "create", APPLIED),
];
const APPLIED: &str = "server-side apply that makes an object is written down as patch";

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> impl Iterator<Item = String> {
    value.as_array().into_iter().flatten().map(text)
}

/// Returns the permissions that roles grant to a service account.
fn given(on: &Installed, account: &str) -> Result<BTreeSet<Right>> {
    let kube = on.cluster().kube();
    let mut all = BTreeSet::new();
    for (bindings, roles) in [
        ("clusterrolebindings", "clusterrole"),
        ("rolebindings", "role"),
    ] {
        let list = kube.get([bindings, "-n", SYSTEM])?;
        for binding in items(&list) {
            let is_it = |subject: &Value| {
                subject["kind"] == "ServiceAccount"
                    && subject["name"] == account
                    && subject["namespace"] == SYSTEM
            };
            if !binding["subjects"]
                .as_array()
                .into_iter()
                .flatten()
                .any(is_it)
            {
                continue;
            }
            let name = text(&binding["roleRef"]["name"]);
            let role = kube.get([roles, &name, "-n", SYSTEM])?;
            for rule in role["rules"].as_array().into_iter().flatten() {
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        for verb in texts(&rule["verbs"]) {
                            all.insert((group.clone(), resource.clone(), verb));
                        }
                    }
                }
            }
        }
    }
    Ok(all)
}

/// Returns the permissions that a service account has used, and the requests that were denied.
fn used(on: &Installed, account: &str) -> Result<(BTreeSet<Right>, BTreeSet<String>)> {
    let user = format!("system:serviceaccount:{SYSTEM}:{account}");
    let (mut all, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for line in fs::read_to_string(on.cluster().audit_log())?.lines() {
        // The last line may be incomplete.
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if event["user"]["username"] != user {
            continue;
        }
        let object = &event["objectRef"];
        let mut resource = text(&object["resource"]);
        if let Some(sub) = object["subresource"].as_str() {
            resource = format!("{resource}/{sub}");
        }
        if event["responseStatus"]["code"] == 403 {
            refused.insert(format!("{} {resource}", text(&event["verb"])));
        }
        all.insert((text(&object["apiGroup"]), resource, text(&event["verb"])));
    }
    Ok((all, refused))
}

/// Creates and deletes a node, whose `MeshNode` must then be removed.
fn a_node_goes(on: &Installed) -> Result<()> {
    let kube = on.cluster().kube();
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "gone"}});
    let report = json!({
        "apiVersion": "mesh.rs/v1alpha1", "kind": "MeshNode",
        "metadata": {"name": "gone"}, "spec": {},
    });
    for object in [&node, &report] {
        kube.apply_text(&object.to_string())?;
    }
    kube.kubectl(["delete", "node", "gone"])?;
    eventually("the report of a node that is gone to go", IN_FORCE, || {
        kube.get(["meshnode", "gone"]).is_err().then_some(())
    })
}

/// Manifests of objects that affect nobody.
const OTHERS: &str = "
apiVersion: mesh.rs/v1alpha1
kind: ClusterMeshPolicy
metadata: {name: nobody}
spec: {tier: Admin, priority: 9, namespaceSelector: {matchLabels: {absent: nobody}}, action: Deny, ingress: [{}]}
---
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: nobody, namespace: outside}
spec: {podSelector: {matchLabels: {absent: nobody}}, ingress: [{}]}
---
apiVersion: mesh.rs/v1alpha1
kind: MeshTrafficPolicy
metadata: {name: nobody, namespace: outside}
spec: {targetRef: {name: nobody}}
";

/// Waits until each of the objects has a status.
fn others_have_a_status(on: &Installed) -> Result<()> {
    let kube = on.cluster().kube();
    kube.apply_text(OTHERS)?;
    for kind in ["clustermeshpolicy", "meshpolicy", "meshtrafficpolicy"] {
        let object = [kind, "nobody", "-n", "outside"];
        let told = |object: &Value| !object["status"]["conditions"][0].is_null();
        kube.until(IN_FORCE, &object, told)?;
    }
    Ok(())
}

/// Rotates the CA's root with the documented command; agents trust both roots afterwards.
fn the_root_is_replaced(on: &Installed) -> Result<()> {
    let kube = on.cluster().kube();
    let exec = ["exec", "-n", SYSTEM, "deploy/mesh-controller", "--"];
    let rotate = ["/mesh-controller", "rotate-root"];
    kube.kubectl(exec.into_iter().chain(rotate))?;
    let both = |map: &Value| {
        let mut texts = map["data"].as_object().into_iter().flatten();
        texts.any(|(_, text)| {
            text.as_str()
                .is_some_and(|t| t.matches("BEGIN").count() == 2)
        })
    };
    let map = ["configmap", "mesh-ca-root", "-n", SYSTEM];
    kube.until(IN_FORCE, &map, both).map(drop)
}

pub(super) fn check(on: &Installed) -> Result<Vec<String>> {
    let load = on.load(CLIENT, &format!("{WEB}/front"))?;
    a_node_goes(on)?;
    others_have_a_status(on)?;
    the_root_is_replaced(on)?;
    let mut said = vec![lossless(load, on, "a new root for the CA")?];
    for account in ["mesh-agent", "mesh-controller"] {
        let given = given(on, account)?;
        let (used, refused) = used(on, account)?;
        ensure!(
            !given.is_empty() && !used.is_empty(),
            "{account}: nothing is known"
        );
        ensure!(refused.is_empty(), "{account} was refused {refused:?}");
        let mut seen = used;
        for (group, resource, verb, why) in UNSEEN {
            let right = [group, resource, verb].map(|part| (*part).to_owned());
            let [group, resource, verb] = right;
            if given.contains(&(group.clone(), resource.clone(), verb.clone())) {
                said.push(format!("{account}: {verb} {resource}: {why}"));
                seen.insert((group, resource, verb));
            }
        }
        let unused: Vec<_> = given.difference(&seen).collect();
        ensure!(unused.is_empty(), "{account} has never used {unused:?}");
        said.push(format!(
            "{account}: {} rights, all used, none refused",
            given.len()
        ));
    }
    Ok(said)
}
