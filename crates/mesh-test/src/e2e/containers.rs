// SPDX-License-Identifier: Apache-2.0
//! A pod with an init container and a native sidecar: all its containers have the pod's identity.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Installed;
use super::shop::{CLIENT, WEB};
use crate::cluster::BASE;

/// The pod's main container.
const STAGED: (&str, &str) = ("clients", "staged");

/// Returns a container's curl command for an order of `item`. Once the pod is enrolled, `item` must
/// not appear in any packet between the nodes.
fn order(item: &str) -> String {
    format!("curl -sS --fail --max-time 2 -o /dev/null '{WEB}/order?item={item}'")
}

/// Returns a script that retries the order until it is answered and prints the attempt's number.
fn insist(item: &str) -> String {
    format!(
        "n=1; until {}; do n=$((n+1)); [ $n -le 100 ] || exit 1; sleep 0.1; done; echo answered $n",
        order(item)
    )
}

/// Returns a Deployment whose pod starts a sidecar, then an init container, then the main one.
fn deployment([init, side, main]: &[String; 3]) -> Value {
    let mount = json!([{ "name": "usr", "mountPath": "/usr", "readOnly": true }]);
    let container = |name: &str, script: &str| {
        json!({
            "name": name, "image": BASE, "command": ["/bin/sh", "-ec", script],
            "volumeMounts": mount,
        })
    };
    let server = format!(
        "({}) >/tmp/said 2>&1 & exec python3 -m http.server 9000 --directory /tmp",
        insist(side)
    );
    let mut sidecar = container("sidecar", &server);
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] = json!({ "tcpSocket": { "port": 9000 }, "periodSeconds": 1 });
    let labels = json!({ "app": "client", "deployment": "staged" });
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "namespace": "clients", "name": "staged" },
        "spec": {
            "replicas": 1, "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "serviceAccountName": "client",
                    "nodeSelector": { "kubernetes.io/hostname": "node1" },
                    "terminationGracePeriodSeconds": 2,
                    "initContainers": [sidecar, container("first", &insist(init))],
                    "containers": [container("main", &format!("{}; exec sleep infinity", insist(main)))],
                    "volumes": [{ "name": "usr", "hostPath": { "path": "/usr" } }],
                },
            },
        },
    })
}

pub(super) fn check(on: &Installed) -> Result<Vec<String>> {
    let kube = on.cluster().kube();
    let words = ["samovarinit", "samovarside", "samovarmain"]
        .map(|word| format!("{word}{}", std::process::id()));
    let [init, _, main] = &words;
    let staged = deployment(&words);
    kube.apply_text(&staged.to_string())?;
    on.cluster().rolled_out("clients", "deployment/staged")?;
    let attempts = |container: &str| {
        let logs = ["logs", "-n", "clients", "deploy/staged", "-c", container];
        crate::wait::eventually("an answer", super::lines::IN_FORCE, || {
            let said = kube.kubectl(logs).ok()?;
            let line = said.lines().find(|line| line.starts_with("answered"))?;
            Some(line.to_owned())
        })
    };
    let first = attempts("first")?;
    let later = attempts("main")?;
    // Another pod calls the sidecar, as it would any server.
    let pods = kube.get(["pods", "-n", "clients", "-l", "deployment=staged"])?;
    let ip = pods["items"][0]["status"]["podIP"]
        .as_str()
        .unwrap_or_default();
    let beside = super::lines::answered(on, CLIENT, &format!("http://{ip}:9000/said"))?;
    ensure!(beside.contains("answered"), "the sidecar: {beside}");
    let clear = |word: &str| -> Result<bool> {
        Ok(!on.capture.so_far()?.find(word.as_bytes())?.is_empty())
    };
    // A pod's traffic may be plaintext, and is counted, until the agent has attached the pod.
    let early = |word: &str| -> Result<&str> {
        Ok(if clear(word)? {
            "plaintext, before the agent attached the pod"
        } else {
            "ciphertext"
        })
    };
    let (init_was, main_was) = (early(init)?, early(main)?);
    let mut tries = 0;
    crate::wait::eventually("ciphertext", super::lines::IN_FORCE, || {
        tries += 1;
        let word = format!("samovarlate{tries}x{}", std::process::id());
        let asked = on.curl(STAGED, &format!("{WEB}/order?item={word}"));
        (asked.ok()?.status.success() && !clear(&word).ok()?).then_some(())
    })?;
    for number in 0..5 {
        let word = format!("samovarkept{number}x{}", std::process::id());
        super::lines::answered(on, STAGED, &format!("{WEB}/order?item={word}"))?;
        ensure!(!clear(&word)?, "{word} was sent between nodes in plaintext");
    }
    let ordered = super::lines::answered(on, CLIENT, &format!("{WEB}/"))?;
    for word in &words {
        ensure!(
            ordered.contains(word),
            "the order {word} is missing: {ordered}"
        );
    }
    kube.kubectl([
        "delete",
        "-n",
        "clients",
        "deployment/staged",
        "--wait=true",
    ])?;
    Ok(vec![
        format!("the init container was {first}, {init_was}; the main one was {later}, {main_was}"),
        format!("after the rollout, ciphertext from request {tries} on"),
        format!(
            "the sidecar, its startup probed by the kubelet, served another pod: {}",
            beside.trim()
        ),
    ])
}
