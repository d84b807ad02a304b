// SPDX-License-Identifier: Apache-2.0
//! Foreign programs at the socket hooks are reported by the check before installing, in the agent's
//! status and in its log.

use std::time::Duration;

use mesh_test::mesh::ENROLLED;
use mesh_test::{AgentConfig, Cmd, Host, Lab, Mesh, Topology, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);

/// Attaches a program that lets everything pass to a cgroup's connect4, beside others, until it ends.
const FOREIGN: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(321, command, buffer, len(attributes))
    if result < 0: raise OSError(ctypes.get_errno(), 'bpf')
    return result
PROG_LOAD, PROG_ATTACH, SOCK_ADDR, CONNECT4, MULTI = 5, 8, 18, 10, 2
code = struct.pack('<BBhi', 0xb7, 0, 0, 1) + struct.pack('<BBhi', 0x95, 0, 0, 0)
code, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b'GPL')
program = bpf(PROG_LOAD, struct.pack('<IIQQIIQII16sII', SOCK_ADDR, 2, ctypes.addressof(code),
    ctypes.addressof(licence), 0, 0, 0, 0, 0, b'balancer4', 0, CONNECT4))
cgroup = os.open(sys.argv[1], os.O_RDONLY)
bpf(PROG_ATTACH, struct.pack('<IIII', cgroup, program, CONNECT4, MULTI))
print('attached'); sys.stdin.read()
"#;

fn balancers(status: &Value) -> Value {
    status["network"]["balancers"].clone()
}

/// Returns the lines of `mesh-agent check` about other programs on the agent's cgroup.
fn checked(node: &Host, cgroup: &str) -> String {
    let agent = mesh_test::programs::agent().expect("agent");
    let cmd = Cmd::new(agent).args(["check", "--cgroup", cgroup]);
    let text = node.run(cmd, SOON).expect("check").text();
    let line = text.lines().find(|line| line.contains("socket hooks"));
    line.unwrap_or(&text).to_owned()
}

#[test]
fn foreign_socket_programs_are_reported() {
    let lab = Lab::builder(Topology::Routed)
        .namespace("default", &[ENROLLED])
        .pods([("a", 1), ("b", 2)])
        .build()
        .expect("lab");
    let node = lab.node(1);
    let cgroup = node.root_cgroup().display().to_string();
    assert!(checked(node, &cgroup).starts_with("ok"));
    let foreign = Cmd::new("python3").args(["-uc", FOREIGN, &cgroup]);
    let foreign = node.spawn_lines(foreign).expect("python3");
    assert_eq!(foreign.next_line(SOON).expect("a line"), "attached");
    let said = checked(node, &cgroup);
    assert!(said.starts_with("absent"), "{said}");
    assert!(said.contains("connect4: balancer4"), "{said}");
    let config = AgentConfig::new(&Mesh::own_ca(&lab));
    let mesh = Mesh::start_with(lab, &config).expect("mesh");
    // Its own programs are none of others', and the other node has nobody's.
    for (node, expected) in [(1, json!(["connect4: balancer4"])), (2, json!([]))] {
        let agent = mesh.agent(node);
        let named = || {
            let status = agent.ask("/status").ok()?;
            (balancers(&status) == expected).then_some(())
        };
        eventually("the status to say so", SOON, named)
            .unwrap_or_else(|e| panic!("{e:#}: {:?}", agent.ask("/status")));
        let warned = agent.log_tail().contains("balancer4");
        assert_eq!(warned, node == 1, "{}", agent.log_tail());
    }
}
