// SPDX-License-Identifier: Apache-2.0
//! The mesh's CRDs as a user of kubectl sees them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::shop::{INTRUDER, WEB};
use super::{Installed, Line};

/// Checks that kubectl works with the mesh's kinds.
pub const KINDS: Line = Line {
    title: "kubectl apply, get, describe and explain, on the mesh's own kinds",
    check: kinds,
};

const POLICY: &str = r"
apiVersion: mesh.rs/v1alpha1
kind: MeshPolicy
metadata: {name: intruders, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  action: Deny
  ingress:
    - from: [{serviceAccounts: [clients/intruder]}]
";

/// Deadline for agents and controller to report status.
const REPORTED: Duration = Duration::from_secs(30);

fn kinds(on: &Installed) -> Result<Vec<String>> {
    let kube = on.cluster().kube();
    let mut shown = vec!["$ kubectl apply -f intruders.yaml".to_owned()];
    shown.extend(lines(&kube.apply_text(POLICY)?, 1));
    let wrong = POLICY.replace("clients/intruder", "clients/in truder/x");
    let refused = kube
        .apply_text(&wrong)
        .err()
        .context("an invalid name was accepted")?;
    shown.push("$ kubectl apply -f mistyped.yaml".to_owned());
    shown.extend(lines(&format!("{refused:#}"), 2));
    let in_force = |policy: &serde_json::Value| {
        let conditions = policy["status"]["conditions"].as_array();
        conditions.is_some_and(|all| {
            all.iter()
                .any(|one| one["type"] == "InForce" && one["status"] == "True")
        })
    };
    kube.until(
        REPORTED,
        &["meshpolicy", "intruders", "-n", "shop"],
        in_force,
    )?;
    for (line, most) in [
        ("get mesh -A", 12),
        ("get meshpolicies -n shop", 4),
        ("get meshnodes", 4),
        ("describe meshpolicy intruders -n shop", 40),
        ("explain meshpolicy.spec.action", 12),
    ] {
        let said = kube.kubectl(line.split(' '))?;
        shown.push(format!("$ kubectl {line}"));
        shown.extend(lines(&said, most));
    }
    let denied = on.curl(INTRUDER, &format!("{WEB}/front"))?;
    ensure!(
        !denied.status.success(),
        "the intruder was allowed: {denied}"
    );
    kube.kubectl(["delete", "meshpolicy", "intruders", "-n", "shop"])?;
    Ok(shown)
}

fn lines(text: &str, most: usize) -> Vec<String> {
    text.lines().take(most).map(str::to_owned).collect()
}
