// SPDX-License-Identifier: Apache-2.0
//! A node of a real cluster: its namespaces and cgroups, and the node programs in them.
//!
//! It requires a host with cgroup v1 hierarchies (hybrid), which runc and the kubelet then use.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::cgroup;
use crate::kube::{Kube, Programs};
use crate::names::LabId;
use crate::netns::Netns;
use crate::process::{Cmd, Host, Output, Proc, tail};
use crate::topology::{self, Topology};
use crate::wait::eventually;
use mesh_sys::testbed;

/// Deadline for containerd to answer.
const START: Duration = Duration::from_secs(60);

/// Directory in which all cgroup hierarchies are mounted.
const HIERARCHIES: &str = "/sys/fs/cgroup";

/// Inputs that all nodes share.
pub(super) struct Given<'a> {
    pub(super) kube: &'a Kube,
    /// The kubeconfig of kube-proxy, the same for all nodes.
    pub(super) proxy: &'a Path,
    /// The archive of the base image.
    pub(super) base: &'a Path,
}

/// A node of the cluster.
#[derive(Debug)]
pub struct Machine {
    kubelet: Proc,
    proxy: Proc,
    containerd: Proc,
    /// The process that keeps the namespaces; its cgroup contains the whole node, so it is dropped
    /// last.
    holder: Proc,
    host: Host,
    name: String,
    address: IpAddr,
    /// The node's cgroup in the cgroup2 hierarchy.
    cgroup: PathBuf,
    /// The node's cgroup path relative to each hierarchy.
    group: String,
}

impl Machine {
    pub(super) fn start(
        id: LabId,
        (number, count): (u8, u8),
        wire: &Host,
        given: &Given<'_>,
    ) -> Result<Self> {
        let name = format!("node{number}");
        let address = IpAddr::V4(topology::node_v4(number));
        let netns = Arc::new(Netns::create(&id.netns(&name))?);
        topology::lay_node(Topology::Routed, &netns, number)?;
        topology::join_wire(wire, &netns, &name, number, count)?;
        let group = format!("{}/{name}", id.cgroup());
        make_groups(&group)?;
        let cgroup = cgroup::mount_point()?.join(&group);
        let dir = id.dir().join(&name);
        let host = Host::new(&name, netns, cgroup.join("host"), dir)?;
        register(given.kube, &name, number)?;
        let holder = hold(&host, &group, &cgroup, &name)?;
        let prefix = Prefix {
            holder: holder.id(),
            group: &group,
        };
        let config = write_config(&host, number)?;
        let containerd = Cmd::new("containerd").args([
            "--config".to_owned(),
            config.join("containerd.toml").display().to_string(),
        ]);
        let containerd = host.spawn(prefix.spawned(containerd))?;
        let programs = Programs::find()?;
        let kubelet = kubelet(&programs, given.kube, (&name, address), &config)?;
        let proxy = programs.all().display().to_string();
        let proxy = Cmd::new(proxy).args([
            "kube-proxy".to_owned(),
            format!("--kubeconfig={}", given.proxy.display()),
            format!("--hostname-override={name}"),
            "--proxy-mode=iptables".to_owned(),
            // Only the initial network namespace may change conntrack limits.
            "--conntrack-max-per-core=0".to_owned(),
            "--conntrack-tcp-timeout-established=0".to_owned(),
            "--conntrack-tcp-timeout-close-wait=0".to_owned(),
        ]);
        let proxy = host.spawn(prefix.spawned(proxy))?;
        let answers = |containerd: &Proc| {
            let what = format!("containerd of {}", host.label());
            eventually(&what, START, || {
                std::thread::sleep(Duration::from_millis(100));
                let output = host.run(prefix.joined(Cmd::line("ctr version")), START);
                output.is_ok_and(|said| said.status.success()).then_some(())
            })
            .with_context(|| containerd.log_tail())
        };
        answers(&containerd)?;
        let import = prefix.joined(ctr_import(given.base));
        host.run(import, START)?.ok()?;
        let kubelet = host.spawn(prefix.spawned(kubelet))?;
        Ok(Self {
            kubelet,
            proxy,
            containerd,
            holder,
            host,
            name,
            address,
            cgroup,
            group,
        })
    }

    /// Returns the node's name, as in `spec.nodeName`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the node's InternalIP.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Returns the node's network namespace; only [`Machine::run`] also has its mounts.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Returns the root of the node's cgroups as a path on the machine.
    #[must_use]
    pub fn root_cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Returns the pid of the process that keeps the namespaces; `/proc/PID/root` is the node's
    /// root.
    #[must_use]
    pub fn holder(&self) -> u32 {
        self.holder.id()
    }

    /// Translates a path on the node to a path that this process can open.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.id()))
    }

    /// Returns the directory in which the kubelet looks for static pod manifests.
    #[must_use]
    pub fn static_pods(&self) -> PathBuf {
        static_pods(&config_dir(&self.host))
    }

    fn prefix(&self) -> Prefix<'_> {
        Prefix {
            holder: self.holder.id(),
            group: &self.group,
        }
    }

    /// Runs a program in all of the node's namespaces until it exits.
    ///
    /// # Errors
    /// The program cannot be started, or has not exited within `deadline`.
    pub fn run(&self, cmd: Cmd, deadline: Duration) -> Result<Output> {
        self.host.run(self.prefix().joined(cmd), deadline)
    }

    /// Imports an image into containerd.
    pub(super) fn import(&self, archive: &Path) -> Result<()> {
        // Entering a mount namespace changes the working directory.
        let archive =
            fs::canonicalize(archive).with_context(|| format!("no image {}", archive.display()))?;
        self.run(ctr_import(&archive), START)?.ok().map(drop)
    }

    /// Returns the last lines of the node programs' logs.
    #[must_use]
    pub fn log_tails(&self) -> String {
        let logs = [&self.containerd, &self.kubelet, &self.proxy];
        logs.map(|program| tail(program.log(), 25)).join("\n")
    }
}

/// Prefixes for commands that run in the node's namespaces.
#[derive(Clone, Copy, Debug)]
struct Prefix<'a> {
    holder: u32,
    group: &'a str,
}

impl Prefix<'_> {
    /// Wraps a short command: it joins the namespaces, but not the node's v1 cgroups.
    fn joined(&self, cmd: Cmd) -> Cmd {
        let enter = Cmd::new("nsenter").args([format!("--target={}", self.holder)]);
        cmd.after(enter.args(["--mount", "--uts", "--cgroup", "--"]))
    }

    /// Wraps a long-running node program: it also joins the node's v1 cgroups, because entering a
    /// cgroup namespace changes only the view of them.
    fn spawned(&self, cmd: Cmd) -> Cmd {
        let script = format!(
            "for h in {HIERARCHIES}/*/; do \
               [ -e $h/cgroup.kill ] || [ $h = {HIERARCHIES}/unified/ ] || \
               echo $$ >$h/{}/cgroup.procs; \
             done; exec \"$@\"",
            self.group
        );
        self.joined(cmd)
            .after(Cmd::new("/bin/sh").args(["-ec", &script, "node"]))
    }
}

fn ctr_import(archive: &Path) -> Cmd {
    Cmd::line("ctr --namespace k8s.io images import").args([archive])
}

/// Creates the node's subtree in every v1 hierarchy; a new cpuset needs its CPUs assigned.
fn make_groups(group: &str) -> Result<()> {
    let mut found = false;
    for hierarchy in fs::read_dir(HIERARCHIES)?.flatten() {
        let root = hierarchy.path();
        if !root.join("tasks").exists() {
            continue;
        }
        found = true;
        let mut dir = root.clone();
        for part in group.split('/') {
            let parent = dir.clone();
            dir = dir.join(part);
            cgroup::create(&dir)?;
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if dir.join(file).exists() {
                    fs::write(dir.join(file), fs::read(parent.join(file))?)?;
                }
            }
        }
    }
    ensure!(
        found,
        "no cgroup v1 hierarchy below {HIERARCHIES}: nodes require a host with hybrid cgroups"
    );
    Ok(())
}

/// Creates the Node object before the kubelet starts, so that its pod CIDRs match the routes
/// between the nodes.
fn register(kube: &Kube, name: &str, number: u8) -> Result<()> {
    let cidrs = topology::pod_cidrs(number);
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
        "spec": { "podCIDR": cidrs[0], "podCIDRs": cidrs },
    });
    kube.apply_text(&node.to_string()).map(drop)
}

/// Script that sets up the mount namespace: private, empty directories, the node's subtree of each
/// cgroup hierarchy at its usual path, and a BPF file system. The root mount must be shared for
/// volumes with mount propagation.
const HOLDER: &str = r#"
for h in /sys/fs/cgroup/*/; do
    [ "$h" = /sys/fs/cgroup/unified/ ] || echo $$ >"$h/$GROUP/cgroup.procs"
done
exec unshare --mount --propagation private --cgroup --uts /bin/sh -euc '
    hostname "$NAME"
    mount --make-rprivate /
    hierarchies=$(ls /sys/fs/cgroup)
    mount -t sysfs sysfs /sys
    mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
    for h in $hierarchies; do
        mkdir "/sys/fs/cgroup/$h"
        case $h in
            unified) mount -t cgroup2 cgroup2 "/sys/fs/cgroup/$h" ;;
            systemd) mount -t cgroup -o none,name=systemd cgroup "/sys/fs/cgroup/$h" ;;
            *) mount -t cgroup -o "$h" cgroup "/sys/fs/cgroup/$h" ;;
        esac
    done
    mount -t bpf bpf /sys/fs/bpf
    mount --make-rshared /
    for d in /run /var/lib /var/log; do mount -t tmpfs -o mode=755 tmpfs "$d"; done
    mkdir -p /run/netns /run/lock
    echo ready
    exec sleep infinity'
"#;

/// Starts the process that keeps the namespaces. Its cgroup becomes the node's root, because a
/// cgroup namespace is rooted at the cgroup of the process that creates it.
fn hold(host: &Host, group: &str, root: &Path, name: &str) -> Result<Proc> {
    let script = Cmd::new("/bin/sh").args(["-euc", HOLDER]);
    let script = script.env("GROUP", group).env("NAME", name);
    let holder = host.spawn_lines_in(script, (0, root.to_owned()))?;
    let line = holder.line(START)?;
    ensure!(
        line.as_deref() == Some("ready"),
        "the node's namespaces cannot be made: {}",
        holder.log_tail()
    );
    Ok(holder)
}

fn config_dir(host: &Host) -> PathBuf {
    host.dir().join("etc")
}

fn static_pods(config: &Path) -> PathBuf {
    config.join("static")
}

/// Writes the configuration of containerd and the kubelet and returns its directory.
fn write_config(host: &Host, number: u8) -> Result<PathBuf> {
    let dir = config_dir(host);
    let cni = dir.join("cni");
    fs::create_dir_all(&cni)?;
    fs::create_dir_all(static_pods(&dir))?;
    let [v4, v6] = topology::pod_cidrs(number);
    let network = json!({
        "cniVersion": "0.4.0", "name": "pods",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": v4 }], [{ "subnet": v6 }]],
                    "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    fs::write(cni.join("10-pods.conflist"), network.to_string())?;
    // restrict_oom_score_adj: on hosts where containerd may not lower its OOM score, every
    // sandbox would fail with EOF without this.
    fs::write(
        dir.join("containerd.toml"),
        format!(
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n\
             sandbox_image = \"{}\"\nrestrict_oom_score_adj = true\n\
             enable_unprivileged_ports = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\n\
             conf_dir = \"{}\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
             runtime_type = \"io.containerd.runc.v2\"\n",
            super::BASE,
            cni.display()
        ),
    )?;
    Ok(dir)
}

fn kubelet(
    programs: &Programs,
    kube: &Kube,
    (name, address): (&str, IpAddr),
    dir: &Path,
) -> Result<Cmd> {
    let (certificate, key) = kube.node_certificate(name, address)?;
    let user = kube.user(&format!("system:node:{name}"), Some("system:nodes"))?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs", "failCgroupV1": false,
        "cgroupsPerQOS": true, "enforceNodeAllocatable": ["pods"], "failSwapOn": false,
        "authentication": {
            "anonymous": { "enabled": false }, "webhook": { "enabled": true },
            "x509": { "clientCAFile": kube.ca()? },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": certificate, "tlsPrivateKeyFile": key,
        // There is no DNS server in the cluster.
        "clusterDNS": ["10.96.0.10"], "clusterDomain": "cluster.local", "resolvConf": "",
        "makeIPTablesUtilChains": false,
        // Nodes share the machine's disk, so its usage says nothing about a node's disk pressure.
        "evictionHard": {
            "memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%",
            "nodefs.inodesFree": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "nodeStatusReportFrequency": "10s", "nodeStatusUpdateFrequency": "2s",
        "syncFrequency": "5s", "shutdownGracePeriod": "0s",
        "staticPodPath": static_pods(dir), "fileCheckFrequency": "1s",
    });
    let file = dir.join("kubelet.json");
    fs::write(&file, config.to_string())?;
    let v6 = topology::node_v6(name.trim_start_matches("node").parse()?);
    Ok(Cmd::new(programs.all()).args([
        "kubelet".to_owned(),
        format!("--config={}", file.display()),
        format!("--kubeconfig={}", user.display()),
        format!("--hostname-override={name}"),
        format!("--node-ip={address},{v6}"),
    ]))
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::lab::complain(&format_args!("{}:\n{}", self.name, self.log_tails()));
        }
        // This kills everything in the node's cgroup, containers included.
        drop(testbed::signal(self.holder.id(), libc::SIGKILL));
    }
}
