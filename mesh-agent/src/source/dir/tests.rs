// SPDX-License-Identifier: Apache-2.0

use std::fs;
use std::time::Duration;

use mesh_plan::cluster::{ObjectRef, Policy};
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use mesh_config::Source;

struct Bench {
    manifests: TempDir,
    state: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            manifests: TempDir::new().unwrap(),
            state: TempDir::new().unwrap(),
        }
    }

    async fn start(&self) -> Watched {
        let settings = Settings {
            source: Source::Dir(self.manifests.path().to_owned()),
            state_dir: self.state.path().to_owned(),
            pod_cidrs: vec!["10.9.0.0/16".parse().unwrap()],
            kubeconfig: None,
        };
        super::super::watch(settings).await.unwrap()
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.manifests.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.manifests.path().join(name)).unwrap();
    }
}

/// Waits until the snapshot or the report matches a condition.
async fn until<T: std::fmt::Debug>(
    receiver: &mut watch::Receiver<Arc<T>>,
    what: &str,
    is: impl Fn(&T) -> bool,
) {
    let found = timeout(Duration::from_secs(8), receiver.wait_for(|value| is(value)))
        .await
        .map(|_| ());
    assert!(found.is_ok(), "never {what}: {:?}", receiver.borrow());
}

fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}}}\nspec: {{nodeName: n1}}\nstatus: {{podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn policy(port: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web, namespace: shop}}\nspec: {{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
    )
}

fn web(cluster: &ClusterSnapshot) -> Option<&Policy> {
    cluster
        .policies
        .get(&ObjectRef::new("NetworkPolicy", "shop", "web"))
        .map(|policy| &**policy)
}

#[tokio::test]
async fn created_changed_and_deleted_files_are_read() {
    let bench = Bench::new();
    bench.write("a.yaml", &pod("a", "10.0.0.1"));
    let Watched { mut cluster, .. } = bench.start().await;
    assert_eq!(
        cluster.borrow().pods.len(),
        1,
        "the first snapshot is complete"
    );
    assert_eq!(cluster.borrow().pod_cidrs.len(), 1);
    bench.write(
        "below/b.json",
        "{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"x\"}}",
    );
    until(&mut cluster, "a namespace", |c| {
        c.namespaces.contains_key("x")
    })
    .await;
    bench.write("below/c.yml", &pod("c", "10.0.0.3"));
    until(&mut cluster, "two pods", |c| c.pods.len() == 2).await;
    bench.write("ignored.txt", &pod("d", "10.0.0.4"));
    bench.write(".hidden.yaml", &pod("e", "10.0.0.5"));
    bench.write("a.yaml", &pod("a", "10.0.0.2"));
    until(&mut cluster, "a new address", |c| {
        c.pods["u-a"].addresses == ["10.0.0.2".parse().unwrap()].into()
    })
    .await;
    assert_eq!(cluster.borrow().pods.len(), 2);
    for name in ["a.yaml", "below/b.json", "below/c.yml"] {
        bench.remove(name);
    }
    until(&mut cluster, "empty", |c| {
        c.pods.is_empty() && c.namespaces.is_empty()
    })
    .await;
}

#[tokio::test]
async fn invalid_file_keeps_its_objects_across_a_restart() {
    let bench = Bench::new();
    bench.write("a.yaml", &pod("a", "10.0.0.1"));
    bench.write("p.yaml", &policy("80"));
    let mut first = bench.start().await;
    bench.write("p.yaml", "kind: [");
    until(&mut first.report, "a broken file", |r| {
        r.rejections.iter().any(|r| r.object.name == "p.yaml")
    })
    .await;
    assert!(web(&first.cluster.borrow()).is_some());
    drop(first);
    let second = bench.start().await;
    assert!(web(&second.cluster.borrow()).is_some());
    let report = second.report.borrow().clone();
    assert!(
        report.rejections[0].consequence.contains("last good"),
        "{report:?}"
    );
    assert_eq!(second.cluster.borrow().pods.len(), 1);
}

#[tokio::test]
async fn unreadable_document_costs_no_other_of_its_file() {
    let bench = Bench::new();
    let broken = "kind: Pod\nkind: Pod\n";
    let file =
        |policy: &str, address: &str| format!("{policy}\n---\n{broken}---\n{}", pod("a", address));
    bench.write("all.yaml", &file(&policy("80"), "10.0.0.1"));
    let mut watched = bench.start().await;
    let good = web(&watched.cluster.borrow()).cloned();
    assert!(good.is_some() && watched.cluster.borrow().pods.contains_key("u-a"));
    let report = watched.report.borrow().clone();
    let [rejection] = report.rejections.as_slice() else {
        panic!("{report:?}");
    };
    let text = file(&policy("80"), "10.0.0.1");
    let before = text.split_once("kind: Pod\nkind").unwrap().0;
    let line = format!("line {}", before.lines().count() + 2);
    assert!(
        rejection.object.name == "all.yaml" && rejection.why.starts_with(&line),
        "{rejection}"
    );
    assert!(
        rejection
            .consequence
            .contains("other documents are in force"),
        "{rejection}"
    );
    // The policy becomes unreadable as well, and stays in force; the pod's change takes effect.
    bench.write("all.yaml", &file("kind: [", "10.0.0.2"));
    until(&mut watched.cluster, "a new address", |c| {
        c.pods["u-a"].addresses == ["10.0.0.2".parse().unwrap()].into()
    })
    .await;
    assert_eq!(web(&watched.cluster.borrow()).cloned(), good);
    // A file without the document deletes its object, once all of it can be read.
    bench.write("all.yaml", &pod("a", "10.0.0.2"));
    until(&mut watched.cluster, "no policy", |c| web(c).is_none()).await;
    assert!(watched.report.borrow().rejections.is_empty());
}

#[tokio::test]
async fn rejected_update_keeps_last_good_version_across_a_restart() {
    let bench = Bench::new();
    bench.write("p.yaml", &policy("80"));
    let mut first = bench.start().await;
    let good = web(&first.cluster.borrow()).cloned().unwrap();
    bench.write("p.yaml", &policy("0"));
    until(&mut first.report, "a rejection", |r| {
        !r.rejections.is_empty()
    })
    .await;
    assert_eq!(web(&first.cluster.borrow()), Some(&good));
    drop(first);
    let second = bench.start().await;
    assert_eq!(web(&second.cluster.borrow()), Some(&good));
    let report = second.report.borrow().clone();
    assert_eq!(report.rejections[0].field, "spec.ingress[0].ports[0].port");
    // Without the saved state the object is new, and isolates.
    let bare = Bench {
        state: TempDir::new().unwrap(),
        manifests: bench.manifests,
    };
    let third = bare.start().await;
    let isolating = web(&third.cluster.borrow()).cloned().unwrap();
    assert_eq!(isolating.ingress, Some(Vec::new()));
}

#[tokio::test]
async fn first_of_two_files_wins_and_the_warning_names_both() {
    let bench = Bench::new();
    bench.write("b.yaml", &pod("a", "10.0.0.2"));
    bench.write("a.yaml", &pod("a", "10.0.0.1"));
    let watched = bench.start().await;
    let cluster = watched.cluster.borrow().clone();
    assert_eq!(
        cluster.pods["u-a"].addresses,
        ["10.0.0.1".parse().unwrap()].into()
    );
    let warning = watched.report.borrow().warnings[0].to_string();
    assert!(
        warning.contains("a.yaml") && warning.contains("b.yaml"),
        "{warning}"
    );
}

#[tokio::test]
async fn deleted_directory_leaves_the_snapshot_in_force() {
    let bench = Bench::new();
    bench.write("d/a.yaml", &pod("a", "10.0.0.1"));
    let settings = Settings {
        source: Source::Dir(bench.manifests.path().join("d")),
        state_dir: bench.state.path().to_owned(),
        pod_cidrs: Vec::new(),
        kubeconfig: None,
    };
    let mut watched = super::super::watch(settings.clone()).await.unwrap();
    fs::rename(
        bench.manifests.path().join("d"),
        bench.manifests.path().join("e"),
    )
    .unwrap();
    until(&mut watched.report, "stale", |r| r.stale.is_some()).await;
    assert_eq!(watched.cluster.borrow().pods.len(), 1);
    let missing = super::super::watch(settings).await;
    assert!(matches!(missing, Err(Error::Read { .. })));
}
