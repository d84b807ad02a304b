// SPDX-License-Identifier: Apache-2.0
//! One pass from the desired plan to the kernel, in an order in which no moment is less protected than the
//! one before it:
//!
//! 1. removed pods are detached, so that their addresses are free;
//! 2. new pods are attached, isolated if they have policy; listeners of newly enrolled pods open;
//! 3. content that nothing refers to yet is written;
//! 4. the plan and the pods are published: the proxy accepts before anything is captured;
//! 5. pods switch, and content that nothing refers to any more is removed;
//! 6. services switch;
//! 7. open connections are checked against the plan;
//! 8. the network configuration of unenrolled pods is removed.
//!
//! Services that cannot be written, and pods that cannot be detached, do not hold up the rest: the pass fails at
//! its end, and is retried.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use mesh_common::pod::{PodIndex, PodState, PodView};
use mesh_common::policy::PolicySetId;
use mesh_plan::plan::{Deny, Entry, LocalPod, MapOp};
use mesh_plan::{Index, Plan, diff};

use super::enrollment::{attach, remove_configuration};
use super::managed::{ManagedPod, Retry, enforceable};
use super::{Control, Error, Kernel, describe};
use mesh_datapath::pods::find::Find;
use mesh_sys::route::Routing;

impl<K: Kernel, F: Find> Control<K, F> {
    /// Brings the kernel and the pods to the desired plan. A repeated pass changes nothing.
    pub(super) fn reconcile(&mut self) -> Result<(), Error> {
        let mut plan = self.desired.plan.clone();
        let mut base = match self.kernel.plan.take() {
            Some(base) => Plan::clone(base.plan()),
            None => self.kernel.api.dump()?,
        };
        let mut failed = self.detach_gone(&plan, &mut base).err();
        let added = self.attach_new(&plan, &mut base)?;
        self.enroll_wanted(&plan);
        self.restrict_to_enforceable(&mut plan);
        let fresh = newly_enrolled(&plan, &base);

        let all_ops = diff(&base, &plan);
        let (services, ops): (Vec<MapOp>, Vec<MapOp>) =
            all_ops.into_iter().partition(MapOp::is_of_services);
        let switch = ops
            .iter()
            .position(|op| matches!(op, MapOp::Put(Entry::Pod(..))))
            .unwrap_or(ops.len());
        let (content, rest) = ops.split_at(switch);
        let before = Arc::clone(&self.progress.publisher.current().plan);
        let plan = Arc::new(Index::after(plan, &before));
        let applied = self.kernel.api.apply(content).and_then(|()| {
            self.keep_old_connections(&plan, &fresh);
            self.publish_plan(&plan);
            self.kernel.api.apply(rest)
        });
        if let Err(error) = applied {
            self.isolate(&added);
            // Parts of the plan may be in force, and the next pass does not see them as a change.
            self.pods.recheck.request();
            return Err(error.into());
        }
        if let Err(error) = self.kernel.api.apply(&services) {
            failed.get_or_insert(Error::Services(error));
        }
        self.kernel.api.note(&plan);
        self.check_open_connections((&base, &plan), &ops, &fresh);
        self.unenroll_unwanted(&plan);
        if let Err(error) = self.remove_inherited() {
            failed.get_or_insert(error);
        }
        self.kernel.plan = Some(plan);
        failed.map_or(Ok(()), Err)
    }

    fn publish_plan(&self, plan: &Arc<Index>) {
        let pods = self.pods.table();
        self.progress.publisher.update(|next| {
            next.plan = Arc::clone(plan);
            next.pods = pods;
        });
    }

    /// Detaches pods that the plan no longer has, that were replaced, or whose namespace is
    /// gone. A pod that cannot be detached stays, and is tried again with the next pass.
    fn detach_gone(&mut self, plan: &Plan, base: &mut Plan) -> Result<(), Error> {
        let gone: Vec<String> = self
            .pods
            .managed
            .iter()
            .filter(|(uid, pod)| {
                let still = plan.pods.get(*uid).is_some_and(|local| {
                    local.addresses == pod.local.addresses
                        && local.netns_path == pod.local.netns_path
                        && local.static_uid == pod.local.static_uid
                });
                !still || !pod.home.is_there()
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        let mut failed = None;
        for uid in &gone {
            if let Some(pod) = self.pods.managed.get(uid)
                && let Err(error) = self.kernel.api.remove_pod(pod.index)
            {
                failed.get_or_insert(error);
                continue;
            }
            base.pods.remove(uid);
            if let Some(pod) = self.pods.managed.remove(uid) {
                tracing::info!(pod = %pod.local.name, uid, "pod removed from the datapath");
                remove_configuration(&pod);
                self.pods.detached.push(pod.into());
            }
        }
        if !gone.is_empty() {
            self.publish_pods();
        }
        let waiting = &mut self.pods.waiting;
        waiting.retain(|uid, _| plan.pods.contains_key(uid));
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Attaches new pods whose namespace exists. Returns those that no earlier agent had attached.
    fn attach_new(&mut self, plan: &Plan, base: &mut Plan) -> Result<Vec<PodIndex>, Error> {
        let now = Instant::now();
        let new: Vec<(&String, &LocalPod)> = plan
            .pods
            .iter()
            .filter(|(uid, _)| !self.pods.managed.contains_key(*uid))
            .collect();
        let kernel = &mut self.kernel;
        let inherited = match kernel.inherited.take() {
            Some(inherited) => inherited,
            None => kernel.api.pods()?.into_iter().map(|(i, _)| i).collect(),
        };
        let inherited = kernel.inherited.insert(inherited);
        if new.is_empty() {
            return Ok(Vec::new());
        }
        let links = Routing::open()
            .and_then(|mut routing| routing.links())
            .map_err(Error::Links)?;
        let pods = &mut self.pods;
        let mut added = Vec::new();
        for (uid, local) in new {
            match attach(&mut kernel.api, &pods.finder, (uid, local), &links) {
                Ok((pod, taken_over)) => {
                    inherited.remove(&pod.index);
                    pods.waiting.remove(uid);
                    if !taken_over {
                        added.push(pod.index);
                    }
                    tracing::info!(pod = %local.name, uid, taken_over, "pod added to the datapath");
                    pods.managed.insert(uid.clone(), pod);
                }
                Err(why) => {
                    let retry = Retry::after(pods.waiting.get(uid), why, now);
                    if pods.waiting.get(uid).is_none_or(|old| old.why != retry.why) {
                        tracing::warn!(pod = %local.name, uid, why = retry.why, "cannot add the pod to the datapath; retrying");
                    }
                    pods.waiting.insert(uid.clone(), retry);
                }
            }
        }
        // The kernel holds an earlier agent's view of them, or the isolated one.
        for (index, state) in kernel.api.pods()? {
            if let Some((uid, pod)) = pods.managed.iter().find(|(_, pod)| pod.index == index) {
                let local = LocalPod {
                    view: state.view,
                    ..pod.local.clone()
                };
                base.pods.insert(uid.clone(), local);
            }
        }
        Ok(added)
    }

    /// Restricts the plan to what can be in force: managed pods only, with the protection that is
    /// possible. Takes the pods' listeners into their handles.
    fn restrict_to_enforceable(&mut self, plan: &mut Plan) {
        let pods = &mut self.pods.managed;
        let setting = self.progress.settings.silent;
        plan.pods.retain(|uid, local| {
            let Some(pod) = pods.get_mut(uid) else {
                return false;
            };
            let gated = pod.ungated.is_none();
            let silent = local.deny.map_or(setting, |deny| deny == Deny::Drop);
            local.view = enforceable(local.view, gated, pod.enrollment.is_some(), silent);
            if pod.local != *local {
                pod.local.clone_from(local);
            }
            pod.refresh_handle();
            true
        });
    }

    /// Removes pods of an earlier agent that the cluster no longer has. A pod with an address of a
    /// waiting pod may be that pod, and stays, as does one that cannot be removed yet.
    fn remove_inherited(&mut self) -> Result<(), Error> {
        let kernel = &mut self.kernel;
        let Some(inherited) = kernel.inherited.as_mut().filter(|i| !i.is_empty()) else {
            return Ok(());
        };
        let mut failed = None;
        for (index, state) in kernel.api.pods()? {
            let waits = self.pods.waiting.keys().any(|uid| {
                let local = self.desired.plan.pods.get(uid);
                local.is_some_and(|l| l.addresses.iter().any(|a| state.view.owns(&(*a).into())))
            });
            if inherited.contains(&index) && !waits {
                tracing::info!(
                    slot = index.0,
                    "pod of an earlier agent removed from the datapath"
                );
                match kernel.api.remove_pod(index) {
                    Ok(()) => drop(inherited.remove(&index)),
                    Err(error) => drop(failed.get_or_insert(error)),
                }
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Isolates newly attached pods after a plan that could not be applied: they have no older policy.
    fn isolate(&mut self, added: &[PodIndex]) {
        let is_added = |pod: &&ManagedPod| added.contains(&pod.index);
        for pod in self.pods.managed.values().filter(is_added) {
            let view = PodView {
                set: PolicySetId::ISOLATED,
                ..pod.local.view
            };
            if let Err(error) = self.kernel.api.set_pod(pod.index, &view) {
                tracing::error!(pod = %pod.local.name, error = describe(&error), "cannot isolate the pod");
            }
        }
    }
}

/// The pods that the plan enrolls and the kernel does not.
fn newly_enrolled(plan: &Plan, base: &Plan) -> BTreeSet<String> {
    let enrolled = |pod: &LocalPod| pod.view.has(PodState::ENROLLED);
    plan.pods
        .iter()
        .filter(|(uid, pod)| enrolled(pod) && !base.pods.get(*uid).is_some_and(enrolled))
        .map(|(uid, _)| uid.clone())
        .collect()
}
