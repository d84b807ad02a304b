// SPDX-License-Identifier: Apache-2.0
//! One adopted pod: what was found, what was made for it, and what is in force for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::pod::{PodIndex, PodState, PodView};
use mesh_common::policy::PolicySetId;
use mesh_common::{Endpoint, Reason};
use mesh_plan::plan::LocalPod;

use mesh_datapath::pods::made::Made;
use mesh_datapath::pods::watch::Watch;
use mesh_datapath::pods::{Home, Listeners, PodHandle};

/// When something that failed is tried again: a quarter of a second, doubling up to 4 s.
#[derive(Clone, Debug)]
pub(super) struct Retry {
    /// What failed.
    pub(super) why: String,
    at: Instant,
    delay: Duration,
}

impl Retry {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(4);

    /// After a failure; `before` is the one before it, if there was one.
    pub(super) fn after(before: Option<&Self>, why: String, now: Instant) -> Self {
        let delay = before.map_or(Self::FIRST, |b| (b.delay * 2).min(Self::LONGEST));
        Self {
            why,
            at: now + delay,
            delay,
        }
    }

    /// Whether it is time.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.at
    }
}

/// What was made for an enrolled pod.
#[derive(Debug)]
pub(super) struct Enrolment {
    /// The agent's listeners.
    pub(super) listeners: Arc<Listeners>,
    /// What is in its namespace.
    pub(super) list: Vec<Made>,
    /// Tells of changes; ends with this value.
    pub(super) _watch: Option<Watch>,
}

/// A pod that the kernel programs know.
#[derive(Debug)]
pub(super) struct Adopted {
    /// Its namespace and interface.
    pub(super) home: Home,
    /// Its slot.
    pub(super) index: PodIndex,
    /// Why it has no gate.
    pub(super) ungated: Option<String>,
    /// What was made for it, while it is enrolled, and while its connections with the agent go on.
    pub(super) enrolment: Option<Enrolment>,
    /// Since when it is not enrolled any more, while they go on.
    pub(super) leaving: Option<Instant>,
    /// It was enrolled at the last pass: what was connecting then shows a moment later.
    pub(super) fresh: bool,
    /// Why it could not be enrolled.
    pub(super) refused: Option<Retry>,
    /// What is wrong with what was made for it.
    pub(super) trouble: Option<String>,
    /// Its connections that are older than the mesh, as the kernel was told; `None` = not known.
    pub(super) old: Option<Vec<(Endpoint, Endpoint, Reason)>>,
    /// What other rooms see of it.
    pub(super) handle: Arc<PodHandle>,
}

impl Adopted {
    /// Builds the handle anew if the pod or its listeners changed.
    pub(super) fn refresh(&mut self, local: &LocalPod) {
        let listeners = self.enrolment.as_ref().map(|e| Arc::clone(&e.listeners));
        let same = match (&self.handle.listeners, &listeners) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if same && self.handle.local == *local {
            return;
        }
        self.handle = Arc::new(PodHandle {
            uid: self.handle.uid.clone(),
            local: local.clone(),
            index: self.index,
            netns: Arc::clone(&self.home.netns),
            netns_cookie: self.home.cookie,
            listeners,
            link: self.home.interface.host_index,
            mac: self.home.interface.mac,
        });
    }

    /// What is wrong, for people.
    pub(super) fn complaint(&self) -> Option<String> {
        self.refused
            .as_ref()
            .map(|retry| retry.why.clone())
            .or_else(|| {
                self.ungated
                    .clone()
                    .map(|why| format!("not protected: {why}"))
            })
            .or_else(|| self.trouble.clone())
    }
}

/// A pod that was let go. The proxy closes its sockets by itself; what it could not close in an
/// orderly way, because the other end is gone too, would keep the namespace for minutes.
#[derive(Debug)]
pub(super) struct Leaving {
    /// Its namespace.
    pub(super) home: Home,
    /// Which addresses were its own.
    pub(super) view: PodView,
    /// How often it is still looked at.
    pub(super) rounds: u8,
}

impl From<Adopted> for Leaving {
    fn from(pod: Adopted) -> Self {
        Self {
            home: pod.home,
            view: pod.handle.local.view,
            rounds: 2,
        }
    }
}

/// What can be in force of a view, given the facts: `gated`, and whether the pod could be enrolled.
/// What cannot be guaranteed is not promised: a pod that wants more is cut off.
pub(super) fn in_force(wanted: PodView, gated: bool, enrolled: bool, silent: bool) -> PodView {
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

/// What a pod is under between its adoption and its first plan: never enrolled, because its
/// listeners are not in place, and never with less policy than it should have.
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
    fn a_promise_that_cannot_be_kept_cuts_the_pod_off() {
        let enrolled = PodState::ENROLLED;
        for promise in [PodState::STRICT, PodState::REQUIRED] {
            for (gated, can) in [(false, true), (true, false), (false, false)] {
                let view = in_force(view(enrolled | promise, 7), gated, can, false);
                assert_eq!(view.set, PolicySetId::ISOLATED, "{gated} {can}");
            }
            let kept = in_force(view(enrolled | promise, 7), true, true, false);
            assert_eq!(kept.set, PolicySetId(7));
            assert!(kept.has(PodState::ENROLLED) && kept.has(PodState::GATED));
        }
        let permissive = in_force(view(enrolled, 7), true, false, false);
        assert_eq!(permissive.set, PolicySetId(7));
        assert!(!permissive.has(PodState::ENROLLED), "not half captured");
        let outside = in_force(view(PodState::STRICT, 7), false, false, false);
        assert_eq!(
            outside.set,
            PolicySetId(7),
            "a pod outside the mesh has no promise"
        );
    }

    #[test]
    fn before_its_first_plan_a_pod_with_policy_is_closed() {
        let wanted = view(PodState::ENROLLED | PodState::STRICT, 7);
        let before = before_the_first_plan(wanted);
        assert_eq!(before.set, PolicySetId::ISOLATED);
        assert!(!before.has(PodState::ENROLLED));
        assert_eq!(before_the_first_plan(view(0, 0)).set, PolicySetId::NONE);
    }

    #[test]
    fn retries_slow_down_to_a_bound() {
        let now = Instant::now();
        let mut retry = Retry::after(None, String::new(), now);
        assert!(!retry.is_due(now) && retry.is_due(now + Duration::from_millis(250)));
        for _ in 0..10 {
            retry = Retry::after(Some(&retry), String::new(), now);
        }
        assert!(retry.is_due(now + Duration::from_secs(4)));
    }
}
