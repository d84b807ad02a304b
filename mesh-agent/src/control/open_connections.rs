// SPDX-License-Identifier: Apache-2.0
//! Applies policy to connections that are already open. Errors are text for the operator.

use std::collections::BTreeSet;
use std::time::Instant;

use mesh_common::{Endpoint, Reason};
use mesh_plan::plan::{Entry, Key, MapOp};
use mesh_plan::{Index, Plan};
use mesh_telemetry::record::CloseReporter;

use super::connections::Ask;
use super::managed::ManagedPod;
use super::{Control, Kernel, connections, describe, sockets};
use mesh_datapath::pods::find::Find;
use mesh_log::log_limited;

impl<K: Kernel, F: Find> Control<K, F> {
    /// Tells the gate the connections that are older than the enrollment of pods, before the enrollment
    /// takes effect. The gate drops older connections that it does not know.
    pub(super) fn keep_old_connections(&mut self, plan: &Index, fresh: &BTreeSet<String>) {
        let kernel = &mut self.kernel.api;
        for uid in fresh {
            let (Some(pod), Some(local)) = (self.pods.managed.get_mut(uid), plan.pods.get(uid))
            else {
                continue;
            };
            let kept = sockets::list(&pod.home.netns, kernel.decided())
                .map_err(|error| describe(&error))
                .map(|list| {
                    let ask = Ask {
                        is_tunnel: &|socket| kernel.is_tunnel(socket),
                        is_node_peer: &sockets::is_node_peer,
                    };
                    connections::judge(plan, &local.view, &list, (true, true), ask).old
                })
                .and_then(|old| keep(kernel, pod, old));
            if let Err(why) = kept {
                log_limited!(warn, local.name, pod = %local.name, why, "cannot keep connections older than the enrollment");
            }
        }
    }

    /// Closes connections that the plan in force denies. Pods whose policy or mode changed, or that were
    /// just enrolled, are checked at once; so are all pods if peers were enrolled or became ready: the
    /// gate drops older connections that it does not know. All pods are checked a moment later if other
    /// peers came or went, which is most of what happens in a cluster: a check is not cheap.
    pub(super) fn check_open_connections(
        &mut self,
        (base, plan): (&Plan, &Index),
        ops: &[MapOp],
        fresh: &BTreeSet<String>,
    ) {
        let mut now = fresh.clone();
        let mut all = false;
        for op in ops {
            match op {
                MapOp::Put(Entry::Pod(uid, _)) => drop(now.insert(uid.clone())),
                MapOp::Put(Entry::Peer(address, peer)) => {
                    let before = base.peers.get(address);
                    all |= before.is_some_and(|before| before.flags != peer.flags);
                    self.pods.recheck.request();
                }
                MapOp::Put(Entry::PodCidr(_)) | MapOp::Remove(Key::Peer(_) | Key::PodCidr(_)) => {
                    self.pods.recheck.request();
                }
                // The content of policy is immutable; it takes effect through a pod or a peer.
                MapOp::Put(_) | MapOp::Remove(_) => {}
            }
        }
        if all {
            now.extend(self.pods.managed.keys().cloned());
        }
        for uid in &now {
            self.check_pod(uid, plan, fresh.contains(uid));
        }
    }

    /// Closes connections of a pod that the plan in force denies. A failure is reported and changes
    /// nothing else.
    fn check_pod(&mut self, uid: &str, plan: &Index, is_fresh: bool) {
        let Some(pod) = self.pods.managed.get_mut(uid) else {
            return;
        };
        pod.is_fresh |= is_fresh;
        let to = (&mut self.kernel.api, &self.progress.settings.close_reporter);
        match recheck(to, (uid, &mut *pod), plan, is_fresh) {
            Ok(closed) => self.progress.closed += closed,
            Err(_) if !pod.home.is_there() => {}
            Err(why) => {
                log_limited!(warn, pod.local.name, pod = %pod.local.name, why, "cannot close connections that policy denies");
                pod.trouble = Some(why);
            }
        }
    }

    /// Checks the next pod of the recheck queue, if it is time.
    pub(super) fn recheck_one(&mut self) {
        let Some(plan) = self.kernel.plan.clone() else {
            return;
        };
        let start = Instant::now();
        let pods = &mut self.pods;
        let Some(uid) = pods.recheck.next(start, pods.managed.keys()) else {
            return;
        };
        self.check_pod(&uid, &plan, false);
        self.pods.recheck.took(start.elapsed());
    }

    /// Checks pods again that were just enrolled: a connection that a hook passed as plaintext right
    /// before may not have had a socket yet.
    pub(super) fn recheck_fresh(&mut self) {
        let Some(plan) = self.kernel.plan.clone() else {
            return;
        };
        for (uid, pod) in &mut self.pods.managed {
            if !std::mem::take(&mut pod.is_fresh) {
                continue;
            }
            let to = (&mut self.kernel.api, &self.progress.settings.close_reporter);
            match recheck(to, (uid.as_str(), &mut *pod), &plan, true) {
                Ok(closed) => self.progress.closed += closed,
                Err(_) if !pod.home.is_there() => {}
                Err(why) => {
                    log_limited!(warn, pod.local.name, pod = %pod.local.name, why, "cannot keep connections older than the enrollment");
                }
            }
        }
    }
}

/// Tells the gate a pod's old connections, if they changed. A connection that was told before keeps its
/// reason.
fn keep(
    kernel: &mut impl Kernel,
    pod: &mut ManagedPod,
    mut old: Vec<(Endpoint, Endpoint, Reason)>,
) -> Result<(), String> {
    for (local, remote, reason) in &mut old {
        let mut known = pod.old.iter().flatten();
        if let Some((.., before)) = known.find(|(l, r, _)| l == local && r == remote) {
            *reason = *before;
        }
    }
    if pod.old.as_ref() == Some(&old) {
        return Ok(());
    }
    kernel
        .set_old_connections(pod.index, &old)
        .map_err(|error| describe(&error))?;
    pod.old = Some(old);
    Ok(())
}

/// Checks a pod's open connections against the plan; returns how many were closed.
fn recheck(
    (kernel, closing): (&mut impl Kernel, &CloseReporter),
    (uid, pod): (&str, &mut ManagedPod),
    plan: &Index,
    fresh: bool,
) -> Result<u64, String> {
    let Some(local) = plan.pods.get(uid) else {
        return Ok(0);
    };
    let list = sockets::list(&pod.home.netns, kernel.decided()).map_err(|e| describe(&e))?;
    let carried = pod.enrollment.is_some();
    let ask = Ask {
        is_tunnel: &|socket| kernel.is_tunnel(socket),
        is_node_peer: &sockets::is_node_peer,
    };
    let judgement = connections::judge(plan, &local.view, &list, (fresh, carried), ask);
    keep(kernel, pod, judgement.old)?;
    if judgement.denied.is_empty() {
        return Ok(0);
    }
    let now = Instant::now();
    for (socket, verdict) in &judgement.denied {
        closing.closing(socket.local, socket.remote, *verdict, now);
    }
    let denied = judgement.denied.iter().map(|(socket, _)| socket);
    let closed = sockets::close(&pod.home.netns, denied).map_err(|e| describe(&e))?;
    log_limited!(info, local.name, pod = %local.name, closed, "closed open connections: policy or mode changed");
    Ok(closed)
}
