// SPDX-License-Identifier: Apache-2.0
//! Attaches pods to the datapath, enrolls them, and unenrolls them. Errors are text for the operator.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::pod::PodState;
use mesh_plan::Plan;
use mesh_plan::plan::LocalPod;
use tokio::sync::mpsc;

use super::managed::{Enrollment, ManagedPod, Retry, before_the_first_plan};
use super::{Control, Kernel, connections, describe, sockets};
use mesh_datapath::PodAttachment;
use mesh_datapath::pods::find::Find;
use mesh_datapath::pods::{self, PodHandle, PodNetns, watch};
use mesh_log::log_limited;
use mesh_sys::route::Link;

/// The longest time that connections with the agent may go on after a pod was unenrolled.
const UNENROLL_TIMEOUT: Duration = Duration::from_secs(30);

impl<K: Kernel, F: Find> Control<K, F> {
    /// Enrolls the pods that the plan enrolls and that are not enrolled yet.
    pub(super) fn enroll_wanted(&mut self, plan: &Plan) {
        let now = Instant::now();
        for (uid, pod) in &mut self.pods.managed {
            let Some(local) = plan.pods.get(uid) else {
                continue;
            };
            if !local.view.has(PodState::ENROLLED) {
                pod.refused = None;
                continue;
            }
            pod.unenrolling = None;
            if pod.enrollment.is_some() || pod.refused.as_ref().is_some_and(|r| !r.is_due(now)) {
                continue;
            }
            match enroll(&mut self.kernel.api, pod, uid, &self.pods.changed) {
                Ok(enrollment) => {
                    pod.refused = None;
                    pod.enrollment = Some(enrollment);
                    log_limited!(info, uid, pod = %local.name, uid, "pod enrolled");
                }
                Err(why) => {
                    let retry = Retry::after(pod.refused.as_ref(), why, now);
                    if pod.refused.as_ref().is_none_or(|old| old.why != retry.why) {
                        log_limited!(error, uid, pod = %local.name, uid, why = retry.why, "cannot enroll the pod; retrying");
                    }
                    pod.refused = Some(retry);
                }
            }
        }
    }

    /// Starts to unenroll pods that the plan no longer enrolls. Runs after the switch, when their connections
    /// are no longer captured.
    pub(super) fn unenroll_unwanted(&mut self, plan: &Plan) {
        let now = Instant::now();
        for (uid, pod) in &mut self.pods.managed {
            let enrolled = |local: &LocalPod| local.view.has(PodState::ENROLLED);
            if pod.enrollment.is_some() && plan.pods.get(uid).is_some_and(|pod| !enrolled(pod)) {
                pod.unenrolling.get_or_insert(now);
            }
        }
        self.unenroll_drained();
    }

    /// Unenrolls pods whose connections with the agent have closed or timed out.
    pub(super) fn unenroll_drained(&mut self) {
        let mut any = false;
        for (uid, pod) in &mut self.pods.managed {
            let Some(since) = pod.unenrolling else {
                continue;
            };
            if since.elapsed() < UNENROLL_TIMEOUT && has_connections_with_agent(pod) {
                continue;
            }
            remove_configuration(pod);
            pod.unenrolling = None;
            pod.enrollment = None;
            pod.trouble = None;
            pod.refresh_handle();
            log_limited!(info, uid, pod = %pod.local.name, uid, "pod unenrolled");
            any = true;
        }
        if any {
            self.publish_pods();
        }
    }
}

/// Attaches a pod to the datapath; tells whether an earlier agent had attached it.
pub(super) fn attach(
    kernel: &mut impl Kernel,
    finder: &impl Find,
    (uid, local): (&String, &LocalPod),
    links: &[Link],
) -> Result<(ManagedPod, bool), String> {
    let home = pods::find(uid, local, finder).map_err(|e| describe(&e))?;
    let host = home.interface.host_index;
    let link = links.iter().find(|link| link.index == host && host != 0);
    let attachment = PodAttachment {
        uid,
        netns: home.netns.as_fd(),
        netns_cookie: home.cookie,
        link: link.map(|link| (link.index, link.name.clone())),
        mac: home.interface.mac,
        view: before_the_first_plan(local.view),
    };
    let attached = kernel.add_pod(&attachment).map_err(|e| describe(&e))?;
    let handle = PodHandle {
        uid: uid.clone(),
        index: attached.index,
        netns: Arc::clone(&home.netns),
        netns_cookie: home.cookie,
        listeners: None,
        link: home.interface.host_index,
        mac: home.interface.mac,
    };
    let pod = ManagedPod {
        home,
        index: attached.index,
        local: local.clone(),
        ungated: attached.ungated,
        enrollment: None,
        unenrolling: None,
        is_fresh: false,
        refused: None,
        trouble: None,
        old: None,
        handle: Arc::new(handle),
    };
    Ok((pod, attached.taken_over))
}

/// Prepares a pod's namespace and gives the kernel the agent's listeners.
fn enroll(
    kernel: &mut impl Kernel,
    pod: &ManagedPod,
    uid: &str,
    changed: &mpsc::Sender<String>,
) -> Result<Enrollment, String> {
    let home: &PodNetns = &pod.home;
    let (listeners, list) = pods::enroll(home, &pod.local).map_err(|error| describe(&error))?;
    for (slot, listener) in listeners.iter() {
        if let Err(error) = kernel.set_listener(pod.index, slot, listener.as_fd()) {
            let why = describe(&error);
            if let Err(left) = pods::unenroll(home, &list) {
                return Err(format!("{why}; and {}", describe(&left)));
            }
            return Err(why);
        }
    }
    let watch = match watch::start(&home.netns, uid.to_owned(), changed.clone()) {
        Ok(watch) => Some(watch),
        Err(error) => {
            let error = describe(&error);
            tracing::warn!(
                uid,
                error,
                "cannot watch the pod's network configuration; checking it every second"
            );
            None
        }
    };
    Ok(Enrollment {
        listeners,
        list,
        _watch: watch,
    })
}

/// Tells whether the agent carries connections of a pod; `false` if its sockets cannot be read: the
/// attempt to close them reports that.
fn has_connections_with_agent(pod: &ManagedPod) -> bool {
    let view = &pod.local.view;
    sockets::list(&pod.home.netns, None)
        .is_ok_and(|list| !connections::with_the_agent(view, &list).is_empty())
}

/// Removes the network configuration of a pod that is no longer captured. Its connections with the agent
/// are closed first: without the agent's routes their bytes would leave as plaintext.
pub(super) fn remove_configuration(pod: &ManagedPod) {
    let Some(enrollment) = &pod.enrollment else {
        return;
    };
    let view = &pod.local.view;
    let removed = sockets::list(&pod.home.netns, None)
        .and_then(|list| sockets::close(&pod.home.netns, &connections::with_the_agent(view, &list)))
        .map_err(|error| describe(&error))
        .and_then(|_| pods::unenroll(&pod.home, &enrollment.list).map_err(|e| describe(&e)));
    if let Err(why) = removed
        && pod.home.is_there()
    {
        tracing::warn!(pod = %pod.local.name, why, "cannot remove the pod's network configuration");
    }
}
