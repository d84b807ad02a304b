// SPDX-License-Identifier: Apache-2.0
//! One managed pod: its namespace, the network configuration in it, and the policy in force for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::pod::{PodIndex, PodState, PodView};
use mesh_common::policy::PolicySetId;
use mesh_common::{Endpoint, Reason};
use mesh_plan::plan::LocalPod;

use mesh_datapath::pods::netns_config::NetnsItem;
use mesh_datapath::pods::watch::Watch;
use mesh_datapath::pods::{Listeners, PodHandle, PodNetns};

/// The next attempt at an operation that failed: after a quarter of a second, doubling up to 4 s.
#[derive(Clone, Debug)]
pub(super) struct Retry {
    /// Error of the last attempt.
    pub(super) why: String,
    at: Instant,
    delay: Duration,
}

impl Retry {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(4);

    /// Schedules the attempt after a failure; `before` is the previous failure, if there was one.
    pub(super) fn after(before: Option<&Self>, why: String, now: Instant) -> Self {
        let delay = before.map_or(Self::FIRST, |b| (b.delay * 2).min(Self::LONGEST));
        Self {
            why,
            at: now + delay,
            delay,
        }
    }

    /// Tells whether it is time.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.at
    }
}

/// The network configuration of an enrolled pod.
#[derive(Debug)]
pub(super) struct Enrollment {
    /// The agent's listeners.
    pub(super) listeners: Arc<Listeners>,
    /// Rules, routes and sysctls in the pod's namespace.
    pub(super) list: Vec<NetnsItem>,
    /// Reports changes in the namespace until it is dropped.
    pub(super) _watch: Option<Watch>,
}

/// A pod that the datapath has.
#[derive(Debug)]
pub(super) struct ManagedPod {
    /// Namespace and interface of the pod.
    pub(super) home: PodNetns,
    /// Slot of the pod in the kernel's maps.
    pub(super) index: PodIndex,
    /// The pod as the plan in force has it; the requested one before its first plan.
    pub(super) local: LocalPod,
    /// Reason why the pod has no tc gate.
    pub(super) ungated: Option<String>,
    /// Network configuration, while the pod is enrolled, and until its connections with the agent have
    /// closed.
    pub(super) enrollment: Option<Enrollment>,
    /// Time at which the pod was unenrolled, while such connections are open.
    pub(super) unenrolling: Option<Instant>,
    /// The pod was enrolled in the last pass: a connection that was being opened then shows a moment
    /// later.
    pub(super) is_fresh: bool,
    /// Error of the last attempt to enroll the pod.
    pub(super) refused: Option<Retry>,
    /// Problem with the pod's network configuration.
    pub(super) trouble: Option<String>,
    /// Connections older than the enrollment, as the kernel was told; `None` = unknown.
    pub(super) old: Option<Vec<(Endpoint, Endpoint, Reason)>>,
    /// The pod as other modules see it.
    pub(super) handle: Arc<PodHandle>,
}

impl ManagedPod {
    /// Takes the pod's listeners into its handle, if they changed.
    pub(super) fn refresh_handle(&mut self) {
        let listeners = self.enrollment.as_ref().map(|e| Arc::clone(&e.listeners));
        let same = match (&self.handle.listeners, &listeners) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if same {
            return;
        }
        self.handle = Arc::new(PodHandle {
            uid: self.handle.uid.clone(),
            index: self.index,
            netns: Arc::clone(&self.home.netns),
            netns_cookie: self.home.cookie,
            listeners,
            link: self.home.interface.host_index,
            mac: self.home.interface.mac,
        });
    }

    /// Describes the pod's problem, if it has one.
    pub(super) fn trouble(&self) -> Option<String> {
        let refused = self.refused.as_ref().map(|retry| retry.why.clone());
        let ungated = || Some(format!("not protected: {}", self.ungated.as_ref()?));
        refused.or_else(ungated).or_else(|| self.trouble.clone())
    }
}

/// A detached pod. The proxy closes its sockets; a socket that cannot be closed in an orderly way,
/// because its peer is gone too, would keep the namespace for minutes.
#[derive(Debug)]
pub(super) struct Detached {
    /// Namespace of the pod.
    pub(super) home: PodNetns,
    /// Addresses of the pod.
    pub(super) view: PodView,
    /// Remaining rounds of closing sockets.
    pub(super) rounds: u8,
}

impl From<ManagedPod> for Detached {
    fn from(pod: ManagedPod) -> Self {
        Self {
            home: pod.home,
            view: pod.local.view,
            rounds: 2,
        }
    }
}

/// Restricts a view to what can be in force: `gated` and `enrolled` tell what was possible. A pod whose
/// requested protection cannot be guaranteed is isolated.
pub(super) fn enforceable(wanted: PodView, gated: bool, enrolled: bool, silent: bool) -> PodView {
    let mut view = wanted;
    view.flags &= !PodState::GATED;
    if gated {
        view.flags |= PodState::GATED;
    }
    if silent {
        view.flags |= PodState::SILENT;
    }
    if !wanted.has(PodState::ENROLLED) {
        return view;
    }
    if !enrolled {
        view.flags &= !PodState::ENROLLED;
    }
    let promised = wanted.has(PodState::STRICT | PodState::REQUIRED) || wanted.modes != 0;
    if promised && !(enrolled && gated) {
        view.set = PolicySetId::ISOLATED;
    }
    view
}

/// The view of a pod between its attachment and its first plan: not enrolled, because its listeners are
/// not in place, and isolated if it has policy.
pub(super) fn before_the_first_plan(wanted: PodView) -> PodView {
    let mut view = wanted;
    view.flags &= !(PodState::ENROLLED | PodState::GATED);
    if view.set != PolicySetId::NONE {
        view.set = PolicySetId::ISOLATED;
    }
    view
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(flags: u32, set: u64) -> PodView {
        PodView {
            flags,
            set: PolicySetId(set),
            ..PodView::default()
        }
    }

    #[test]
    fn pod_without_guaranteed_protection_is_isolated() {
        let enrolled = PodState::ENROLLED;
        for promise in [PodState::STRICT, PodState::REQUIRED] {
            for (gated, can) in [(false, true), (true, false), (false, false)] {
                let view = enforceable(view(enrolled | promise, 7), gated, can, false);
                assert_eq!(view.set, PolicySetId::ISOLATED, "{gated} {can}");
            }
            let kept = enforceable(view(enrolled | promise, 7), true, true, false);
            assert_eq!(kept.set, PolicySetId(7));
            assert!(kept.has(PodState::ENROLLED) && kept.has(PodState::GATED));
        }
        let permissive = enforceable(view(enrolled, 7), true, false, false);
        assert_eq!(permissive.set, PolicySetId(7));
        assert!(!permissive.has(PodState::ENROLLED), "not half captured");
        let outside = enforceable(view(PodState::STRICT, 7), false, false, false);
        assert_eq!(
            outside.set,
            PolicySetId(7),
            "a pod outside the mesh has no promise"
        );
    }

    #[test]
    fn pod_with_policy_is_isolated_before_its_first_plan() {
        let wanted = view(PodState::ENROLLED | PodState::STRICT, 7);
        let before = before_the_first_plan(wanted);
        assert_eq!(before.set, PolicySetId::ISOLATED);
        assert!(!before.has(PodState::ENROLLED));
        assert_eq!(before_the_first_plan(view(0, 0)).set, PolicySetId::NONE);
    }

    #[test]
    fn retries_back_off_up_to_a_bound() {
        let now = Instant::now();
        let mut retry = Retry::after(None, String::new(), now);
        assert!(!retry.is_due(now) && retry.is_due(now + Duration::from_millis(250)));
        for _ in 0..10 {
            retry = Retry::after(Some(&retry), String::new(), now);
        }
        assert!(retry.is_due(now + Duration::from_secs(4)));
    }
}
