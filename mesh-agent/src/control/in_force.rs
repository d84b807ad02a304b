// SPDX-License-Identifier: Apache-2.0
//! The one value that `control` publishes: the policy in force, the pods it holds for, and the status.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_plan::plan::LocalPod;
use mesh_plan::{ClusterSnapshot, Index};
use mesh_telemetry::record::Policy;
use tokio::sync::watch;

use super::Status;
use mesh_datapath::pods::{PodHandle, PodTable};
use mesh_identity::{SpiffeId, TrustDomain};
use mesh_log::warn_limited;

/// The state of the node. Each part is shared with the values before it until it changes, so that a
/// reader compares the parts it needs by `Arc::ptr_eq`.
#[derive(Clone, Debug, Default)]
pub struct InForce {
    /// Revision of the plan: 1 for the first plan of this process; 0 = no plan yet.
    pub revision: u64,
    /// Snapshot of the cluster that the newest completely applied plan was compiled from.
    pub snapshot: Arc<ClusterSnapshot>,
    /// The plan, with the protection that pods have and not the one they request.
    pub plan: Arc<Index>,
    /// The managed pods. The plan has each of them.
    pub pods: Arc<PodTable>,
    /// The result of the newest changes.
    pub status: Arc<Status>,
}

impl InForce {
    /// Returns the policy that records refer to.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            revision: self.revision,
            plan: Arc::clone(&self.plan),
        }
    }

    /// Returns a managed pod and its part of the plan.
    #[must_use]
    pub fn pod(&self, uid: &str) -> Option<(&Arc<PodHandle>, &LocalPod)> {
        Some((self.pods.get(uid)?, self.plan.pods.get(uid)?))
    }

    /// Returns the identities that this node needs certificates for: those of pods that the agent
    /// listens in, including those that are being unenrolled.
    #[must_use]
    pub fn identities(&self, trust_domain: &TrustDomain) -> BTreeSet<SpiffeId> {
        let mut identities = BTreeSet::new();
        for (uid, handle) in &*self.pods {
            let Some(pod) = self.plan.pods.get(uid) else {
                continue;
            };
            if handle.listeners.is_none() {
                continue;
            }
            match SpiffeId::new(trust_domain, &pod.name.namespace, &pod.service_account) {
                Ok(id) => drop(identities.insert(id)),
                Err(error) => {
                    warn_limited!("identity", error, pod = %pod.name, "invalid identity; the pod gets no certificate");
                }
            }
        }
        identities
    }
}

/// Publishes [`InForce`].
#[derive(Debug)]
pub struct Publisher(watch::Sender<Arc<InForce>>);

/// Creates the channel of [`InForce`], which starts empty.
#[must_use]
pub fn channel() -> (Publisher, watch::Receiver<Arc<InForce>>) {
    let (sender, receiver) = watch::channel(Arc::default());
    (Publisher(sender), receiver)
}

impl Publisher {
    /// Returns the published value.
    pub(super) fn current(&self) -> Arc<InForce> {
        Arc::clone(&self.0.borrow())
    }

    /// Publishes a change. Parts that are equal to the published ones stay the same in memory, and
    /// readers wake up only if a part changed.
    pub(super) fn update(&self, change: impl FnOnce(&mut InForce)) {
        self.0.send_if_modified(|published| {
            let mut next = InForce::clone(published);
            change(&mut next);
            let old = &**published;
            if old.revision != 0 && *next.plan == *old.plan {
                next.plan = Arc::clone(&old.plan);
            } else if !Arc::ptr_eq(&next.plan, &old.plan) {
                next.revision += 1;
            }
            if same_pods(&next.pods, &old.pods) {
                next.pods = Arc::clone(&old.pods);
            }
            if next.status == old.status {
                next.status = Arc::clone(&old.status);
            }
            let changed = !(Arc::ptr_eq(&next.plan, &old.plan)
                && Arc::ptr_eq(&next.pods, &old.pods)
                && Arc::ptr_eq(&next.status, &old.status)
                && Arc::ptr_eq(&next.snapshot, &old.snapshot));
            if changed {
                *published = Arc::new(next);
            }
            changed
        });
    }
}

fn same_pods(a: &PodTable, b: &PodTable) -> bool {
    let same = |(uid, handle)| b.get(uid).is_some_and(|other| Arc::ptr_eq(handle, other));
    a.len() == b.len() && a.iter().all(same)
}

#[cfg(test)]
mod tests {
    use mesh_plan::Plan;

    use super::*;

    fn plan(uid: &str) -> Arc<Index> {
        let mut plan = Plan::default();
        plan.pods.insert(uid.to_owned(), LocalPod::default());
        Arc::new(Index::new(plan))
    }

    #[test]
    fn revision_identifies_one_plan() {
        let (publisher, mut reader) = channel();
        // The plan of a node without pods has a revision too.
        publisher.update(|next| next.plan = Arc::new(Index::default()));
        assert_eq!(reader.borrow_and_update().revision, 1);
        publisher.update(|next| next.plan = plan("a"));
        let first = Arc::clone(&reader.borrow_and_update());
        assert_eq!(first.revision, 2);
        publisher.update(|next| next.plan = plan("a"));
        assert!(
            !reader.has_changed().unwrap(),
            "an equal plan wakes no reader"
        );
        publisher.update(|next| next.plan = plan("b"));
        assert_eq!(reader.borrow_and_update().revision, 3);
        assert!(
            first.plan.pods.contains_key("a"),
            "a reader keeps its value"
        );
    }

    #[test]
    fn unchanged_parts_are_shared_in_memory() {
        let (publisher, mut reader) = channel();
        publisher.update(|next| next.plan = plan("a"));
        let before = Arc::clone(&reader.borrow_and_update());
        publisher.update(|next| {
            next.plan = plan("a");
            next.pods = Arc::default();
            next.status = Arc::new(Status {
                restored: 1,
                ..Status::default()
            });
        });
        let after = Arc::clone(&reader.borrow_and_update());
        assert!(Arc::ptr_eq(&before.plan, &after.plan));
        assert!(Arc::ptr_eq(&before.pods, &after.pods));
        assert!(!Arc::ptr_eq(&before.status, &after.status));
        assert_eq!(before.revision, after.revision);
    }
}
