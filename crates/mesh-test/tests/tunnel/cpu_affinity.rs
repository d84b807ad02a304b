// SPDX-License-Identifier: Apache-2.0
//! CPU affinity of the agents' workers: they follow a request-response application, and no bulk sender.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::{Lab, Mesh, Topology, eventually};

const SOON: Duration = Duration::from_secs(60);
const PORT: u16 = 7000;

/// Returns the CPU list of each worker of an agent, as reported by the kernel.
fn allowed(mesh: &Mesh, node: u8) -> Vec<String> {
    let tasks = format!("/proc/{}/task", mesh.agent(node).process().id());
    let tasks = fs::read_dir(tasks).expect("threads");
    let worker = |task: fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).ok();
        read("comm").filter(|name| name.starts_with("mesh-worker-"))?;
        let status = read("status")?;
        let list = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        list.map(|list| list.trim().to_owned())
    };
    tasks
        .filter_map(|task| worker(task.expect("a thread")))
        .collect()
}

#[test]
fn worker_follows_request_response_application_cpu() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("near", 1), ("far", 2)])
        .build()
        .expect("lab");
    let mesh = Mesh::start(lab).expect("mesh");
    let (near, far) = (mesh.pod("near"), mesh.pod("far"));
    let _server = far.serve(&format!("--tcp [::]:{PORT}")).expect("server");
    let to = SocketAddr::new(far.v4().into(), PORT);
    let everywhere = allowed(&mesh, 1);
    assert!(
        everywhere.len() > 1 && everywhere.iter().all(|list| *list != "1"),
        "more than one CPU, and workers that are free: {everywhere:?}"
    );

    let line = format!("rr --to {to} --cpu 1 --seconds 600");
    let asking = near.start_probe(&line).expect("client");
    eventually("a worker to be on CPU 1", SOON, || {
        allowed(&mesh, 1)
            .iter()
            .any(|list| list == "1")
            .then_some(())
    })
    .expect("followed");
    drop(asking);
    eventually("all workers to be free", SOON, || {
        (allowed(&mesh, 1) == everywhere).then_some(())
    })
    .expect("free");

    // The control: the same two pods, as fast as they can.
    let line = format!("bulk --to {to} --cpu 1 --seconds 600");
    let _sending = near.start_probe(&line).expect("client");
    let sent = || {
        let bytes = mesh.metric("mesh_tcp_sent_bytes_total", &[("reporter", "source")]);
        bytes.expect("metric")
    };
    let before = sent();
    let looks = 200;
    let moved = (0..looks).filter(|_| {
        std::thread::sleep(Duration::from_millis(5));
        allowed(&mesh, 1) != everywhere
    });
    let moved = moved.count();
    assert!(sent() > before, "it sends");
    assert!(moved < looks / 10, "{moved} of {looks}");
}
