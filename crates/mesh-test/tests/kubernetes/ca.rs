// SPDX-License-Identifier: Apache-2.0
//! The controller as CA by Istio's API, asked by openssl, curl and agents, and the requests that it
//! refuses.

mod expiry;
mod fixture;
mod refusals;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use mesh_test::kube::Bound;
use mesh_test::kube::controller::{Controller, NAMESPACE};
use mesh_test::mesh::{ENROLLED, sum};
use mesh_test::reports::{Storm, Tcp};
use mesh_test::{Agent, AgentConfig, Cmd, Host, Kube, Lab, Topology, eventually};

use fixture::{AUDIENCE, SOON, pod};

/// A pod that the API server knows, where the lab has it.
fn known(kube: &Kube, lab: &Lab) {
    for node in lab.nodes() {
        let name = node.name();
        kube.apply_text(&format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"
        ))
        .expect("node");
        pod(
            kube,
            (NAMESPACE, &format!("agent-{name}")),
            name,
            "mesh-agent",
        );
    }
    for one in lab.pods() {
        kube.service_account("default", one.name())
            .expect("account");
        pod(kube, ("default", one.name()), one.node().name(), one.name());
    }
}

fn tokens(kube: &Kube, dir: &Path, lab: &Lab) {
    for node in lab.nodes() {
        let agent = format!("agent-{}", node.name());
        let token = kube
            .token(
                (NAMESPACE, "mesh-agent"),
                AUDIENCE,
                Some(Bound::Pod(&agent)),
            )
            .expect("token");
        fs::write(dir.join(node.name()), token).expect("write");
    }
}

/// Pods `a` and `b` on nodes of their own, whose agents have a controller as CA.
struct Fixture {
    agents: Vec<Agent>,
    controller: Controller,
    kube: Kube,
    lab: Lab,
}

impl Fixture {
    /// Leaves live 60 s, as short as they may.
    fn start() -> Self {
        let lab = Lab::builder(Topology::Routed)
            .namespace("default", &[ENROLLED])
            .pods([("a", 1), ("b", 2)])
            .build()
            .expect("lab");
        let kube = Kube::builder().start_in(&lab).expect("servers");
        kube.prepare_controller().expect("CRDs and roles");
        kube.namespace("default", &[]).expect("namespace");
        known(&kube, &lab);
        let flags = [
            "--lease",
            "3s",
            "--certificate-life",
            "60s",
            "--root-overlap",
            "15s",
        ];
        let controller = kube
            .controller("a", IpAddr::V4(Lab::gateway()), &flags)
            .expect("controller");
        let files = kube.host().dir().to_owned();
        tokens(&kube, &files, &lab);
        let bundle = kube.ca_bundle().expect("roots");
        // What the kubelet does for an agent: its own token, and the roots as a file that changes.
        let agents = lab
            .nodes()
            .iter()
            .map(|node| {
                let config = AgentConfig::new(&format!("grpc:{}", controller.url()))
                    .flag("--ca-token", files.join(node.name()))
                    .flag("--ca-bundle", bundle.as_os_str());
                node.start_agent(config).expect("agent")
            })
            .collect();
        Self {
            agents,
            controller,
            kube,
            lab,
        }
    }

    /// One connection from `a` to `b`.
    fn talk(&self) -> bool {
        let to = SocketAddr::new(self.lab.pod("b").addresses()[0], 7000);
        let line = format!("tcp --to {to} --timeout-ms 3000");
        let output = self.lab.pod("a").probe(&line).expect("run");
        let seen: Tcp = output.json().expect("report");
        seen.ok && seen.ends_agree()
    }

    fn until_they_talk(&self, within: Duration) {
        let talk = || self.talk().then_some(());
        eventually(
            "a connection under the controller's certificates",
            within,
            talk,
        )
        .with_context(|| self.agents[0].log_tail())
        .expect("talk");
    }
}

/// Seconds since 1970.
fn clock() -> f64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "certificates end by the wall clock"
    )]
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_secs_f64()
}

#[test]
fn ca_outage_is_reported_and_affects_only_expired_certificates() {
    let mut fixture = Fixture::start();
    let server = fixture
        .lab
        .pod("b")
        .serve("--tcp [::]:7000")
        .expect("server");
    fixture.until_they_talk(SOON);
    let stopped = fixture.controller.process().signal(libc::SIGSTOP);
    stopped.expect("stopped");
    let ends = |agent: &Agent| {
        let name = "mesh_certificate_expiry_timestamp_seconds";
        sum(
            &agent.metrics().expect("metrics"),
            name,
            &[("namespace", "default")],
        )
    };
    // Whichever of the two is renewed no more first.
    let end = fixture.agents.iter().map(ends).fold(f64::MAX, f64::min);
    let left = end - clock();
    assert!((30.0..61.0).contains(&left), "{left} s of life are left");
    let capture = fixture.lab.capture_wire().expect("capture");

    // Half of the life is over, and more: nothing is missed, but somebody is told.
    let mut count = 0;
    while clock() < end - 2.0 {
        assert!(
            fixture.talk(),
            "{} s before the end: {}",
            end - clock(),
            fixture.agents[0].log_tail()
        );
        count += 1;
    }
    for agent in &fixture.agents {
        let log = agent.log_tail();
        assert!(log.contains("cannot obtain a certificate"), "{log}");
    }
    // The end: nothing goes through, and nothing goes in clear instead.
    eventually("nobody to talk any more", SOON, || {
        (!fixture.talk()).then_some(())
    })
    .expect("closed");
    assert!(clock() >= end, "{} s before the end", end - clock());
    assert!(!fixture.talk());
    let seen = capture.stop().expect("stop");
    assert!(!seen.tcp_service_ports().contains(&7000));
    // It comes back, and so do they, by themselves.
    let goes_on = fixture.controller.process().signal(libc::SIGCONT);
    goes_on.expect("goes on");
    let begun = Instant::now();
    fixture.until_they_talk(6 * SOON);
    println!(
        "{count} connections without a CA; they talked again {:.1?} after it was back",
        begun.elapsed()
    );
    drop(server);
}

#[test]
fn root_rotation_loses_no_connection() {
    let fixture = Fixture::start();
    let Fixture {
        controller,
        kube,
        lab,
        ..
    } = &fixture;
    let issued = || {
        let labels = [("result", "issued")];
        let metric = controller.metric(kube, "mesh_ca_requests_total", &labels);
        metric.expect("metric")
    };
    let (a, b) = (lab.pod("a"), lab.pod("b"));
    let server = b.serve("--tcp [::]:7000").expect("server");
    let talk = || fixture.talk();
    fixture.until_they_talk(SOON);
    assert!(issued() > 1.5);

    let to = SocketAddr::new(b.addresses()[0], 7000);
    let chain = || chain_shown_to(lab.node(1), to.ip());
    let storm = format!("storm --to {to} --seconds 600 --pause-us 2000");
    let storm = a.start_probe(&storm).expect("storm");
    let intermediate = intermediate_replaced(kube, &chain);
    // The leaf of the client is renewed too, within half of its life.
    let shown = || chain_shown_to(lab.node(2), a.addresses()[0]);
    eventually(
        "the client's leaf of the new intermediate",
        2 * SOON,
        || (shown().get(1) == Some(&intermediate)).then_some(()),
    )
    .expect("renewed");
    let storm = Storm::stop(&storm).expect("a report");
    println!(
        "{} connections while the intermediate was replaced",
        storm.ok
    );
    assert_eq!((storm.wrong, storm.failed), (0, 0), "{storm:?}");

    rotated_without_a_loss(kube, controller, &talk);
    drop(server);
}

/// The certificates that an agent shows to anybody who asks a pod's tunnel port.
fn chain_shown_to(from: &Host, pod: IpAddr) -> Vec<String> {
    let ask = format!(
        "openssl s_client -connect {pod}:15008 -tls1_3 -alpn mesh/1 -showcerts </dev/null 2>/dev/null"
    );
    let output = from.run(Cmd::shell(&ask), SOON).expect("run").text();
    let ends = "-----END CERTIFICATE-----";
    let begins = |part: &str| part.find("-----BEGIN").map(|at| part[at..].to_owned());
    output.split(ends).filter_map(begins).collect()
}

/// Takes the intermediate away from the CA, which makes another, and waits until an agent shows a
/// leaf of that one; returns the new intermediate.
fn intermediate_replaced(kube: &Kube, chain: &dyn Fn() -> Vec<String>) -> String {
    let before = chain();
    assert_eq!(before.len(), 2, "leaf and intermediate: {before:?}");
    let without = r#"[{"op": "remove", "path": "/data/intermediate.crt"},
                      {"op": "remove", "path": "/data/intermediate.key"}]"#;
    let patch = ["patch", "secret", "mesh-ca", "-n", NAMESPACE, "--type=json"];
    kube.kubectl([&patch[..], &["-p", without]].concat())
        .expect("patched");
    // By the next renewal, half a leaf's life from the last one.
    let mut after = eventually("a leaf of the new intermediate", 2 * SOON, || {
        let now = chain();
        (now.len() == 2 && now[1] != before[1]).then_some(now)
    })
    .expect("renewed");
    assert_ne!(after[0], before[0], "the leaf is another one, too");
    after.remove(1)
}

/// Asks for a new root, and connects until the old one is gone.
fn rotated_without_a_loss(kube: &Kube, controller: &Controller, talk: &dyn Fn() -> bool) {
    let roots = || {
        controller
            .metric(kube, "mesh_ca_roots", &[])
            .expect("metric")
    };
    let rotate = Cmd::new(mesh_test::programs::controller().expect("controller"))
        .args(["rotate-root", "--replica", "cli", "--kubeconfig"])
        .args([kube.kubeconfig()]);
    let said = kube
        .host()
        .run(rotate, SOON)
        .expect("run")
        .ok()
        .expect("asked");
    assert!(said.to_string().contains("new root requested"), "{said}");
    let (mut most, mut failed, mut count) = (0.0_f64, 0, 0);
    let begun = Instant::now();
    // Published, switched, and the old one dropped: the overlap, then a leaf's life and the overlap again.
    while begun.elapsed() < Duration::from_secs(150) {
        failed += u32::from(!talk());
        count += 1;
        most = most.max(roots());
        // The kubelet brings a changed ConfigMap.
        kube.ca_bundle().expect("roots");
        if most > 1.5 && roots() < 1.5 {
            break;
        }
    }
    assert!(
        most > 1.5 && roots() < 1.5,
        "{most} roots, then {}",
        roots()
    );
    assert_eq!(failed, 0, "of {count} connections");
}
