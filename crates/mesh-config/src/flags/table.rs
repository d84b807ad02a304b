// SPDX-License-Identifier: Apache-2.0
//! The table of all settings, from which the command line, the documentation and the keys of the configuration
//! file are generated.

use super::{Applies, Flag, flag};

/// Every setting, in the order of the documentation.
pub const FLAGS: &[Flag] = &[
    flag("node", "NAME", "The name of this machine's Node object."),
    flag(
        "source",
        "dir:PATH|kubernetes",
        "The source of cluster objects: manifests in a directory, or the Kubernetes API.",
    ),
    flag(
        "kubeconfig",
        "PATH",
        "The kubeconfig file for the Kubernetes API, with --source kubernetes.",
    )
    .or_computed("KUBECONFIG, else the pod's service account")
    .applies(Applies::Both),
    flag(
        "proc",
        "PATH",
        "The proc file system with the host's processes, in which the network namespaces of pods are \
         found, with --source kubernetes.",
    )
    .or("/proc"),
    flag(
        "cri-socket",
        "PATH",
        "The CRI socket of the container runtime, used to find pods that have no process below the \
         kubelet's cgroups, with --source kubernetes.",
    )
    .or_computed("not used"),
    flag(
        "ca",
        "grpc:URL|files:DIR|self:DIR",
        "The CA that issues certificates: a server of the Istio certificate service, certificate files that \
         another program renews, or a CA key on this machine (demos and tests only).",
    ),
    flag(
        "ca-token",
        "FILE",
        "The token for a grpc: CA, read again for each request.",
    )
    .or("/var/run/secrets/tokens/mesh"),
    flag(
        "ca-bundle",
        "FILE",
        "The root certificates (PEM) that a grpc: CA's serving certificate is verified with. A change of the \
         file renews all certificates, so that new roots are trusted before they are used.",
    )
    .or("/var/run/secrets/mesh/ca.crt"),
    flag(
        "ca-cluster",
        "NAME",
        "The name of this cluster at a grpc: CA.",
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
        "Another trust domain whose identities are treated as identities of this trust domain, for migration \
         from one name to another. Can be repeated.",
    )
    .or_computed("none")
    .many(),
    flag(
        "crl",
        "FILE",
        "A certificate revocation list, PEM or DER, reloaded when it changes. Tunnels with a revoked \
         certificate are closed. Can be repeated.",
    )
    .or_computed("none")
    .many(),
    flag(
        "cgroup",
        "PATH",
        "The cgroup2 directory that contains the cgroups of all pods.",
    )
    .or_computed("the cgroup2 mount point")
    .everywhere(),
    flag(
        "bpffs",
        "PATH",
        "The mount point of the BPF file system, to which eBPF programs and maps are pinned.",
    )
    .or("/sys/fs/bpf")
    .everywhere(),
    flag(
        "state-dir",
        "DIR",
        "The directory for state that must survive a reboot.",
    )
    .or("/var/lib/mesh")
    .everywhere(),
    flag(
        "cni-conf",
        "DIR",
        "The configuration directory of CNI plugins, read only to detect conflicts with the mesh.",
    )
    .or("/etc/cni/net.d")
    .everywhere(),
    flag(
        "admin",
        "PATH|IP:PORT",
        "The listening address of the admin interface: a Unix socket (mode 0600), or a loopback address, which \
         all local users can access. Can be repeated.",
    )
    .or("/run/mesh/agent.sock")
    .many(),
    flag(
        "metrics",
        "IP:PORT",
        "The listening address of /metrics, /livez and /readyz.",
    )
    .or("[::]:15020")
    .applies(Applies::Both),
    flag(
        "probes",
        "IP:PORT",
        "The listening address of /livez and /readyz for the kubelet, which pods must not be able to reach.",
    )
    .or("127.0.0.1:15021"),
    flag(
        "flow-log",
        "stdout|file:PATH|off",
        "The destination of flow records: one line of JSON for each endpoint of a connection.",
    )
    .or("stdout"),
    flag(
        "drain",
        "DURATION",
        "How long open connections can continue after SIGTERM.",
    )
    .or("10s"),
    flag(
        "pod-cidr",
        "CIDR",
        "A pod CIDR in addition to those in Node objects. Can be repeated.",
    )
    .or_computed("those in Node objects")
    .many(),
    flag("workers", "NUMBER", "The number of proxy threads.").or_computed("one per CPU"),
    flag(
        "tunnel-port",
        "15008|real",
        "The destination port of tunnels to other nodes: 15008, or real, the application's own port, so that \
         packet filters between nodes see it. With real, a TCP option marks a tunnel, and port 15008 is used \
         if the network removes the option. Agents accept tunnels of both kinds with either value.",
    )
    .or("15008"),
    flag(
        "deny",
        "reject|drop",
        "What happens to a connection that policy denies, from or to a pod of this node: rejected at once, or \
         dropped silently so that the client times out. The label `mesh.rs/deny` of a namespace overrides \
         this for its pods.",
    )
    .or("reject"),
    flag(
        "log",
        "text|json",
        "The format of log lines on standard error.",
    )
    .or("text")
    .everywhere()
    .applies(Applies::Both),
    flag(
        "log-level",
        "LEVEL",
        "The log level: error, warn, info, debug or trace, or directives such as info,mesh_agent::proxy=debug. \
         Can be changed at run time through the admin interface.",
    )
    .or("info")
    .everywhere()
    .applies(Applies::Both),
    flag(
        "trace-datapath",
        "on|off",
        "Whether each decision of the eBPF programs is logged, at level info. Requires a build with the feature \
         `trace`. It slows down every connection, and is for tests and debugging.",
    )
    .or("off"),
    flag(
        "listen",
        "IP:PORT",
        "The listening address of the controller's certificate service.",
    )
    .or("[::]:15012")
    .applies(Applies::Controller),
    flag(
        "namespace",
        "NAME",
        "The controller's namespace, which has its Lease, the Secret and ConfigMap of the CA, and the agents' \
         service account.",
    )
    .or("mesh-system")
    .applies(Applies::Controller),
    flag(
        "replica",
        "NAME",
        "The holder identity of this controller replica in the Lease.",
    )
    .or_computed("HOSTNAME")
    .applies(Applies::Controller),
    flag(
        "lease",
        "DURATION",
        "The duration of the leader election Lease: after that time without renewal, another replica becomes \
        leader.",
    )
    .or("15s")
    .applies(Applies::Controller),
    flag(
        "agent-account",
        "NAME",
        "The agents' service account in the controller's namespace. Only its tokens are accepted for \
         certificate requests.",
    )
    .or("mesh-agent")
    .applies(Applies::Controller),
    flag(
        "ca-audience",
        "NAME",
        "The audience of the agents' tokens for the controller.",
    )
    .or("mesh-ca")
    .applies(Applies::Controller),
    flag(
        "serving-name",
        "NAME|IP",
        "A DNS name or IP address of the controller for its serving certificate, in addition to \
         mesh-controller.NAMESPACE.svc. Can be repeated.",
    )
    .or_computed("none")
    .many()
    .applies(Applies::Controller),
    flag(
        "certificate-life",
        "DURATION",
        "The longest lifetime of certificates that the controller signs, from 1m to 24h.",
    )
    .or("24h")
    .applies(Applies::Controller),
    flag(
        "root-overlap",
        "DURATION",
        "How long a new root certificate is published before it signs certificates. It must be longer than \
         the propagation of ConfigMaps to the nodes.",
    )
    .or("15m")
    .applies(Applies::Controller),
];
