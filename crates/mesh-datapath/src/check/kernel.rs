// SPDX-License-Identifier: Apache-2.0
//! Tests whether the kernel accepts all maps and programs of the datapath, and each kind of attachment.

use std::os::fd::AsFd as _;

use mesh_common::pod::PodView;

use super::probes::finding;
use super::scratch::Scratch;
use super::{Finding, Outcome};
use crate::Host;
use crate::datapath::{Config, Datapath, PodAttachment};
use mesh_log::Chain;
use mesh_sys::netns::NetNs;

/// `lo` is the first interface of every namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const LOOPBACK: (u32, &str) = (1, "lo");

const PROGRAMS: &str = "kernel programs";
const PROGRAMS_MEANING: &str = "The agent cannot start without its eBPF programs. Linux 6.12, 6.18 and 7.3 \
     load them, 6.1 does not. They need CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_NET_CLS_ACT.";
const STEERING: &str = "sk_lookup";
const STEERING_MEANING: &str = "Connections cannot be redirected to the agent (needs Linux 5.9).";
const GATE: &str = "gate (tcx)";
const GATE_MEANING: &str = "Traffic from raw sockets and with spoofed addresses is not filtered, and every pod \
     is reported as not protected (needs Linux 6.6).";

pub(super) fn programs(config: &Host) -> Vec<Finding> {
    let missing = |why: String| {
        let why = Outcome::Missing(why);
        vec![finding(PROGRAMS, true, why, PROGRAMS_MEANING)]
    };
    let scratch = match Scratch::new(config) {
        Ok(scratch) => scratch,
        Err(error) => {
            return missing(format!(
                "not tested: no temporary cgroup or pin directory: {error}"
            ));
        }
    };
    let netns = match NetNs::fresh() {
        Ok(netns) => netns,
        Err(error) => {
            return missing(format!(
                "not tested: cannot create a network namespace: {error}"
            ));
        }
    };
    // The gate is attached by interface name in the network namespace of the thread.
    let tried = netns.run(|| attempt(&scratch, &netns));
    match tried {
        Ok(findings) => findings,
        Err(error) => missing(format!(
            "not tested: cannot enter a network namespace: {error}"
        )),
    }
}

fn attempt(scratch: &Scratch, netns: &NetNs) -> Vec<Finding> {
    let config = Config {
        bpffs: scratch.pins.clone(),
        cgroup: scratch.cgroup.clone(),
        trace: false,
    };
    let (mut datapath, _events) = match Datapath::load(&config) {
        Ok(loaded) => loaded,
        Err(error) => {
            let why = Outcome::Missing(Chain(&error).to_string());
            return vec![finding(PROGRAMS, true, why, PROGRAMS_MEANING)];
        }
    };
    let loaded = Outcome::Present("loaded and attached to a cgroup".to_owned());
    let mut findings = vec![finding(PROGRAMS, true, loaded, PROGRAMS_MEANING)];
    let added = netns.cookie().map(|cookie| {
        datapath.add_pod(&PodAttachment {
            uid: "check",
            netns: netns.as_fd(),
            netns_cookie: cookie,
            link: Some((LOOPBACK.0, LOOPBACK.1.to_owned())),
            mac: [0; 8],
            view: PodView::default(),
        })
    });
    let attached = || Outcome::Present("attached".to_owned());
    let (steering, gate) = match added {
        Ok(Ok(facts)) => match facts.ungated {
            None => (attached(), attached()),
            Some(why) => (attached(), Outcome::Missing(why)),
        },
        Ok(Err(error)) => {
            let why = Outcome::Missing(Chain(&error).to_string());
            (why.clone(), why)
        }
        Err(error) => {
            let why = Outcome::Missing(format!("not tested: SO_NETNS_COOKIE: {error}"));
            (why.clone(), why)
        }
    };
    findings.push(finding(STEERING, true, steering, STEERING_MEANING));
    findings.push(finding(GATE, false, gate, GATE_MEANING));
    findings
}
