// SPDX-License-Identifier: Apache-2.0
//! `meshctl policy diff` against running agents: it reports exactly the connections that the new
//! manifests then close or refuse.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::{Lab, Mesh, Pod, PodSpec, Topology, eventually, programs};

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 7000;

const NEW: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: default}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: near}}}]}]
";

fn meshctl(arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(programs::meshctl().expect("meshctl"));
    let output = command.args(arguments).output().expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    let code = output.status.code().expect("it was not killed");
    (code, String::from_utf8(said).expect("text"))
}

fn once(from: &Pod, to: SocketAddr) {
    let output = from.probe(&format!("tcp --to {to}")).expect("run");
    let report: mesh_test::reports::Tcp = output.json().expect("report");
    assert!(report.ok, "{report:?}");
}

#[test]
fn policy_diff_reports_affected_connections() {
    let pods = [("client", 1), ("near", 2), ("server", 2), ("other", 1)];
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods(pods.map(|(name, node)| PodSpec::new(name, node).label("app", name)))
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let server = mesh.pod("server");
    let _server = server.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let to = SocketAddr::from((server.v4(), PORT));
    once(&mesh.pod("other"), to);
    let _open: Vec<_> = ["client", "near"]
        .map(|name| {
            let line = format!("hold --count 2 --to {to}");
            mesh.pod(name).start_probe(&line).expect("holder")
        })
        .into();
    let new = mesh.dir().join("new.yaml");
    fs::write(&new, NEW).expect("write");
    let new = new.to_str().expect("text");
    let socket = mesh.agent(2).admin();
    let socket = socket.to_str().expect("text");
    let diff = || meshctl(&["policy", "diff", "-f", new, "--socket", socket]);
    let open = format!(
        "default/client -> default/server:{PORT} TCP: allow -> deny by NetworkPolicy default/server \
         (default_deny); open 2, seen 0"
    );
    let lately = format!(
        "default/other -> default/server:{PORT} TCP: allow -> deny by NetworkPolicy default/server \
         (default_deny); open 0, seen 1"
    );
    eventually("all to be seen", SOON, || {
        let (_, said) = diff();
        (said.contains(&open) && said.contains(&lately)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", diff().1));
    let (code, said) = diff();
    assert_eq!(code, 1);
    assert!(
        said.ends_with("2 of 3 kinds of connections would change\n"),
        "{said}"
    );

    // Offline, the log says the same of what has ended.
    let log = mesh.agent(2).flow_log();
    let manifests = mesh.dir().join("manifests");
    let [log, manifests] = [&log, &manifests].map(|path| path.to_str().expect("text"));
    let offline = [
        "policy", "diff", "-f", new, "--flows", log, "--old", manifests,
    ];
    let (code, said) = meshctl(&offline);
    assert_eq!((code, said.contains(&lately)), (1, true), "{said}");

    // In force, nothing is left to change but what was seen before.
    mesh.apply_text("new", NEW).expect("apply");
    eventually("the open ones to end", SOON, || {
        let (code, said) = diff();
        (code == 0 && !said.contains("->")).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", diff().1));
    // And back: what would be allowed again.
    let (code, said) = {
        fs::write(new, NEW.replace("{app: near}", "{app: other}")).expect("write");
        diff()
    };
    assert_eq!(code, 1, "{said}");
    let allowed = "default/other -> default/server:7000 TCP: deny -> allow by NetworkPolicy \
                   default/server ingress[0] (policy)";
    assert!(said.contains(allowed), "{said}");
}
