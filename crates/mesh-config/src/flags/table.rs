// SPDX-License-Identifier: Apache-2.0
//! The one table of settings: a row for each, from which command line, documentation and the keys of
//! the file are made.

use super::{Applies, Flag, flag};

/// Every setting, in the order of the documentation.
pub const FLAGS: &[Flag] = &[
    flag("node", "NAME", "The name of this machine's Node object."),
    flag(
        "source",
        "dir:PATH|kubernetes",
        "Where the state of the cluster comes from: manifests in a directory, or the Kubernetes API.",
    ),
    flag(
        "kubeconfig",
        "PATH",
        "How the Kubernetes API is reached, with --source kubernetes.",
    )
    .or_computed("KUBECONFIG, else as a pod of the cluster")
    .applies(Applies::Both),
    flag(
        "proc",
        "PATH",
        "The proc file system that shows the processes of the machine: where the namespaces of \
         pods are found, with --source kubernetes.",
    )
    .or("/proc"),
    flag(
        "cri-socket",
        "PATH",
        "The container runtime's socket, which is asked for a pod that no process below the kubelet's \
         cgroups shows, with --source kubernetes.",
    )
    .or_computed("the runtime is not asked"),
    flag(
        "ca",
        "grpc:URL|files:DIR|self:DIR",
        "Who signs certificates: a server of the Istio certificate service, files that somebody else \
         renews, or a CA key on this machine (demos and tests only).",
    ),
    flag(
        "ca-token",
        "FILE",
        "The token that a grpc: CA is shown; read again each time.",
    )
    .or("/var/run/secrets/tokens/mesh"),
    flag(
        "ca-bundle",
        "FILE",
        "Roots (PEM) of which one must have signed the certificate of a grpc: CA; a change has every \
         certificate renewed, so that new roots are known before they are used.",
    )
    .or("/var/run/secrets/mesh/ca.crt"),
    flag(
        "ca-cluster",
        "NAME",
        "What a grpc: CA calls this cluster.",
    )
    .or("Kubernetes"),
    flag(
        "trust-domain",
        "DOMAIN",
        "The trust domain of SPIFFE identities.",
    )
    .or("cluster.local")
    .applies(Applies::Both),
    flag(
        "trust-domain-alias",
        "DOMAIN",
        "Another trust domain whose identities count as the same ones of this, for moving from one \
         name to the other. May be repeated.",
    )
    .or_computed("none")
    .many(),
    flag(
        "crl",
        "FILE",
        "Certificate revocation lists, PEM or DER, read again when they change. Tunnels of a revoked \
         certificate are closed. May be repeated.",
    )
    .or_computed("none")
    .many(),
    flag(
        "cgroup",
        "PATH",
        "The cgroup2 directory below which sockets are the mesh's.",
    )
    .or_computed("where cgroup2 is mounted")
    .everywhere(),
    flag(
        "bpffs",
        "PATH",
        "The BPF file system that keeps the kernel programs.",
    )
    .or("/sys/fs/bpf")
    .everywhere(),
    flag(
        "state-dir",
        "DIR",
        "What must survive a restart of the machine.",
    )
    .or("/var/lib/mesh")
    .everywhere(),
    flag(
        "cni-conf",
        "DIR",
        "Where the network plug-in (CNI) is configured; read only to say what it means for the mesh.",
    )
    .or("/etc/cni/net.d")
    .everywhere(),
    flag(
        "admin",
        "PATH|IP:PORT",
        "Where the admin interface listens: a Unix socket (mode 0600), or a loopback address that \
         every local user may ask. May be repeated.",
    )
    .or("/run/mesh/agent.sock")
    .many(),
    flag(
        "metrics",
        "IP:PORT",
        "Where /metrics, /livez and /readyz are served.",
    )
    .or("[::]:15020")
    .applies(Applies::Both),
    flag(
        "flow-log",
        "stdout|file:PATH|off",
        "Where records of connections go: one JSON line for each end of a connection.",
    )
    .or("stdout"),
    flag(
        "drain",
        "DURATION",
        "How long open connections may go on after SIGTERM.",
    )
    .or("10s"),
    flag(
        "pod-cidr",
        "CIDR",
        "A network of pods beside those that Node objects name. May be repeated.",
    )
    .or_computed("those of Node objects")
    .many(),
    flag("workers", "NUMBER", "Threads that carry connections.").or_computed("one per CPU"),
    flag(
        "tunnel-port",
        "15008|real",
        "The port on which the agents of other nodes are reached: 15008, or real, the application's own, \
         so that packet filters between nodes see what is really reached. A tunnel is then told by a \
         TCP option, and a peer is reached on 15008 where the network takes that away. Agents accept \
         both, whatever they are told here.",
    )
    .or("15008"),
    flag(
        "deny",
        "reject|drop",
        "What a refusal by policy looks like, to a client that connects to a pod of this node and to \
         the pod's own connect(): refused at once, or silence until a time-out. The label \
         `mesh.rs/deny` of a namespace says otherwise for its pods.",
    )
    .or("reject"),
    flag(
        "log",
        "text|json",
        "The form of log lines on standard error.",
    )
    .or("text")
    .everywhere()
    .applies(Applies::Both),
    flag(
        "log-level",
        "LEVEL",
        "error, warn, info, debug or trace, or directives such as info,mesh_agent::proxy=debug. \
         Can be changed at run time through the admin interface.",
    )
    .or("info")
    .everywhere()
    .applies(Applies::Both),
    flag(
        "trace-datapath",
        "on|off",
        "Whether each decision of the kernel programs is logged, at level info. Only a build with the \
         feature `trace` can: it costs every connection, and is for tests and for finding faults.",
    )
    .or("off"),
    flag(
        "listen",
        "IP:PORT",
        "Where the controller serves certificates.",
    )
    .or("[::]:15012")
    .applies(Applies::Controller),
    flag(
        "namespace",
        "NAME",
        "The controller's namespace: its lease, the CA's Secret and ConfigMap, the agents' service \
         account.",
    )
    .or("mesh-system")
    .applies(Applies::Controller),
    flag(
        "replica",
        "NAME",
        "What this replica of the controller is called in the lease.",
    )
    .or_computed("HOSTNAME")
    .applies(Applies::Controller),
    flag(
        "lease",
        "DURATION",
        "How long the leading controller may be silent until another leads.",
    )
    .or("15s")
    .applies(Applies::Controller),
    flag(
        "agent-account",
        "NAME",
        "The service account of the agents, in the controller's namespace: nobody else gets \
         certificates.",
    )
    .or("mesh-agent")
    .applies(Applies::Controller),
    flag(
        "ca-audience",
        "NAME",
        "The audience of the tokens that agents show to the controller.",
    )
    .or("mesh-ca")
    .applies(Applies::Controller),
    flag(
        "serving-name",
        "NAME|IP",
        "A name or address under which the controller is reached, beside mesh-controller.NAMESPACE.svc. \
         May be repeated.",
    )
    .or_computed("none")
    .many()
    .applies(Applies::Controller),
    flag(
        "certificate-life",
        "DURATION",
        "The longest life of what the controller signs, from 1m to 24h.",
    )
    .or("24h")
    .applies(Applies::Controller),
    flag(
        "root-overlap",
        "DURATION",
        "How long a new root is published before anything is signed with it: longer than ConfigMaps \
         take to reach the nodes.",
    )
    .or("15m")
    .applies(Applies::Controller),
];
