// SPDX-License-Identifier: Apache-2.0
//! One pass from facts to the kernel, in an order in which no moment is less protected than the
//! one before it:
//!
//! 1. pods that are gone are removed, so that their addresses are free;
//! 2. new pods are adopted, closed where they have policy; listeners of newly enrolled pods open;
//! 3. content that nothing refers to yet is written;
//! 4. plan, pods and identities are published: the proxy accepts before anything is captured;
//! 5. pods and services switch, and what nothing refers to any more goes;
//! 6. open connections are decided again;
//! 7. what was made in pods that left the mesh is removed.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::pod::{PodIndex, PodState, PodView};
use mesh_common::policy::PolicySetId;
use mesh_common::{Endpoint, Reason};
use mesh_plan::plan::{Deny, Entry, Key, LocalPod, MapOp};
use mesh_plan::{Index, Plan, diff};

use super::adopted::{Adopted, Enrolment, Retry, before_the_first_plan, in_force};
use super::connections::Ask;
use super::{Control, Error, Kernel, connections, describe, sockets};
use crate::record::Ended;
use mesh_datapath::datapath::PodAttachment;
use mesh_datapath::pods::find::Find;
use mesh_datapath::pods::{self, Home, PodHandle, watch};
use mesh_sys::route::{Link, Routing};

/// How long the open connections of a pod that leaves the mesh may go on as they are.
const LEAVING: Duration = Duration::from_secs(30);

impl<K: Kernel, F: Find> Control<K, F> {
    /// Brings the kernel and the pods to the desired plan; whether anything had to change. Doing it
    /// again is harmless.
    pub(super) fn pass(&mut self) -> Result<bool, Error> {
        let mut plan = self.desired.clone();
        let mut base = match self.base.take() {
            Some(base) => Plan::clone(base.plan()),
            None => self.kernel.dump()?,
        };
        self.remove_gone(&plan, &mut base)?;
        let added = self.adopt_new(&plan, &mut base)?;
        self.enrol_wanted(&plan);
        self.write_what_is(&mut plan);
        let fresh = self.newly_enrolled(&plan, &base);

        let ops = diff(&base, &plan);
        let switch = ops
            .iter()
            .position(|op| matches!(op, MapOp::Put(Entry::Pod(..))))
            .unwrap_or(ops.len());
        let (content, rest) = ops.split_at(switch);
        let plan = Arc::new(Index::after(plan, &self.outputs.plan.borrow()));
        let applied = self.kernel.apply(content).and_then(|()| {
            self.keep_old_connections(&plan, &fresh);
            self.publish(&plan);
            self.kernel.apply(rest)
        });
        if let Err(error) = applied {
            self.cut_off(&added);
            // Some of it may be in force, and the next pass will not see it as a change.
            self.undecided.want();
            return Err(error.into());
        }
        self.kernel.note(&plan);
        self.decide_open_connections((&base, &plan), &ops, &fresh);
        self.withdraw_unwanted(&plan);
        self.remove_inherited()?;
        self.publish_pods();
        self.base = Some(plan);
        Ok(!ops.is_empty())
    }

    /// Removes pods that the facts do not have any more, that changed beyond recognition, or whose
    /// namespace is gone.
    fn remove_gone(&mut self, plan: &Plan, base: &mut Plan) -> Result<(), Error> {
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(|(uid, pod)| {
                let still = plan.pods.get(*uid).is_some_and(|local| {
                    local.addresses == pod.handle.local.addresses
                        && local.netns_path == pod.handle.local.netns_path
                        && local.static_uid == pod.handle.local.static_uid
                });
                !still || !pod.home.is_there()
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in &gone {
            if let Some(pod) = self.pods.get(uid) {
                self.kernel.remove_pod(pod.index)?;
            }
            base.pods.remove(uid);
            if let Some(pod) = self.pods.remove(uid) {
                tracing::info!(pod = %pod.handle.local.name, uid, "pod let go");
                leave(&pod);
                self.leaving.push(pod.into());
            }
        }
        if !gone.is_empty() {
            self.publish_pods();
        }
        self.waiting.retain(|uid, _| plan.pods.contains_key(uid));
        Ok(())
    }

    /// Adopts pods whose namespace is there. Returns those that no earlier agent had.
    fn adopt_new(&mut self, plan: &Plan, base: &mut Plan) -> Result<Vec<PodIndex>, Error> {
        let now = Instant::now();
        let news: Vec<(&String, &LocalPod)> = plan
            .pods
            .iter()
            .filter(|(uid, _)| !self.pods.contains_key(*uid))
            .collect();
        let inherited = match self.inherited.take() {
            Some(inherited) => inherited,
            None => self.kernel.pods()?.into_iter().map(|(i, _)| i).collect(),
        };
        let inherited = self.inherited.insert(inherited);
        if news.is_empty() {
            return Ok(Vec::new());
        }
        let links = Routing::open()
            .and_then(|mut routing| routing.links())
            .map_err(Error::Links)?;
        let mut added = Vec::new();
        for (uid, local) in news {
            match adopt(&mut self.kernel, &self.finder, (uid, local), &links) {
                Ok((pod, taken_over)) => {
                    inherited.remove(&pod.index);
                    self.waiting.remove(uid);
                    if !taken_over {
                        added.push(pod.index);
                    }
                    tracing::info!(pod = %local.name, uid, taken_over, "pod adopted");
                    self.pods.insert(uid.clone(), pod);
                }
                Err(why) => {
                    let retry = Retry::after(self.waiting.get(uid), why, now);
                    if self.waiting.get(uid).is_none_or(|old| old.why != retry.why) {
                        tracing::warn!(pod = %local.name, uid, why = retry.why, "pod not adopted");
                    }
                    self.waiting.insert(uid.clone(), retry);
                }
            }
        }
        // What the kernel holds of them: an earlier agent's view, or the closed one.
        for (index, state) in self.kernel.pods()? {
            if let Some((uid, pod)) = self.pods.iter().find(|(_, pod)| pod.index == index) {
                let local = LocalPod {
                    view: state.view,
                    ..pod.handle.local.clone()
                };
                base.pods.insert(uid.clone(), local);
            }
        }
        Ok(added)
    }

    /// Prepares the pods that are to be enrolled and are not yet.
    fn enrol_wanted(&mut self, plan: &Plan) {
        let now = Instant::now();
        for (uid, pod) in &mut self.pods {
            let Some(local) = plan.pods.get(uid) else {
                continue;
            };
            if !local.view.has(PodState::ENROLLED) {
                pod.refused = None;
                continue;
            }
            pod.leaving = None;
            let wait = pod.refused.as_ref().is_some_and(|r| !r.is_due(now));
            if pod.enrolment.is_some() || wait {
                continue;
            }
            match enrol(&mut self.kernel, pod, uid, &self.changed) {
                Ok(enrolment) => {
                    pod.refused = None;
                    pod.enrolment = Some(enrolment);
                    tracing::info!(pod = %local.name, uid, "pod enrolled");
                }
                Err(why) => {
                    let retry = Retry::after(pod.refused.as_ref(), why, now);
                    if pod.refused.as_ref().is_none_or(|old| old.why != retry.why) {
                        tracing::error!(pod = %local.name, uid, why = retry.why, "pod not enrolled");
                    }
                    pod.refused = Some(retry);
                }
            }
        }
    }

    /// Turns the wish into what can be in force, and the handles with it.
    fn write_what_is(&mut self, plan: &mut Plan) {
        let pods = &mut self.pods;
        let setting = self.settings.silent;
        plan.pods.retain(|uid, local| {
            let Some(pod) = pods.get_mut(uid) else {
                return false;
            };
            let gated = pod.ungated.is_none();
            let silent = local.deny.map_or(setting, |deny| deny == Deny::Drop);
            local.view = in_force(local.view, gated, pod.enrolment.is_some(), silent);
            pod.refresh(local);
            true
        });
    }

    fn newly_enrolled(&self, plan: &Plan, base: &Plan) -> BTreeSet<String> {
        let enrolled = |pod: &LocalPod| pod.view.has(PodState::ENROLLED);
        plan.pods
            .iter()
            .filter(|(uid, pod)| enrolled(pod) && !base.pods.get(*uid).is_some_and(enrolled))
            .map(|(uid, _)| uid.clone())
            .collect()
    }

    fn publish(&self, plan: &Arc<Index>) {
        self.outputs.plan.send_if_modified(|old| {
            let changed = **old != **plan;
            *old = Arc::clone(plan);
            changed
        });
        self.publish_pods();
        self.publish_wanted();
    }

    /// Tells the gate which connections are older than the enrolment, before it counts. The gate
    /// drops what it is not told of.
    fn keep_old_connections(&mut self, plan: &Index, fresh: &BTreeSet<String>) {
        for uid in fresh {
            let (Some(pod), Some(local)) = (self.pods.get_mut(uid), plan.pods.get(uid)) else {
                continue;
            };
            let kept = sockets::list(&pod.home.netns, self.kernel.decided())
                .map_err(|error| describe(&error))
                .map(|list| {
                    let ask = Ask {
                        is_tunnel: &|socket| self.kernel.is_tunnel(socket),
                        is_the_node_s: &sockets::is_the_node_s,
                    };
                    connections::judge(plan, &local.view, &list, (true, true), ask).old
                })
                .and_then(|old| keep(&mut self.kernel, pod, old));
            if let Err(why) = kept {
                tracing::warn!(pod = %local.name, why, "connections older than the enrolment end");
            }
        }
    }

    /// Ends what the plan in force denies, of pods whose policy or mode changed, or that were just
    /// enrolled, at once; and of all, if peers are enrolled or ready otherwise than before: the gate
    /// drops what it is not told of. Of others that are reached by what came or went elsewhere, a
    /// moment later: that is most of what happens in a cluster, and looking is not cheap.
    fn decide_open_connections(
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
                    self.undecided.want();
                }
                MapOp::Put(Entry::PodCidr(_)) | MapOp::Remove(Key::Peer(_) | Key::PodCidr(_)) => {
                    self.undecided.want();
                }
                // What they hold is immutable, and of pods or peers that switch.
                MapOp::Put(_) | MapOp::Remove(_) => {}
            }
        }
        if all {
            now.extend(self.pods.keys().cloned());
        }
        for uid in &now {
            self.decide(uid, plan, fresh.contains(uid));
        }
    }

    /// Ends what the plan in force denies of a pod. Not being able to is reported, and stops nothing.
    fn decide(&mut self, uid: &str, plan: &Index, is_fresh: bool) {
        let (Some(pod), Some(local)) = (self.pods.get_mut(uid), plan.pods.get(uid)) else {
            return;
        };
        pod.fresh |= is_fresh;
        let to = (&mut self.kernel, &self.settings.ended);
        match again(to, pod, plan, &local.view, is_fresh) {
            Ok(ended) => self.ended += ended,
            Err(_) if !pod.home.is_there() => {}
            Err(why) => {
                tracing::warn!(pod = %local.name, why, "open connections may go on that policy denies");
                pod.trouble = Some(why);
            }
        }
    }

    /// Looks at the open connections of one of the pods that are still to be looked at, if it is time.
    pub(super) fn decide_one(&mut self) {
        let Some(plan) = self.base.clone() else {
            return;
        };
        let start = Instant::now();
        let Some(uid) = self.undecided.next(start, self.pods.keys()) else {
            return;
        };
        self.decide(&uid, &plan, false);
        self.undecided.took(start.elapsed());
    }

    /// Takes pods that left the mesh back to what they were: after the switch, so that nothing is
    /// captured any more.
    fn withdraw_unwanted(&mut self, plan: &Plan) {
        let now = Instant::now();
        for (uid, pod) in &mut self.pods {
            let enrolled = |local: &LocalPod| local.view.has(PodState::ENROLLED);
            if pod.enrolment.is_some() && plan.pods.get(uid).is_some_and(|pod| !enrolled(pod)) {
                pod.leaving.get_or_insert(now);
            }
        }
        self.withdraw_drained();
        self.publish_wanted();
    }

    /// Takes those of them back whose connections with the agent have ended, or had their time.
    pub(super) fn withdraw_drained(&mut self) {
        let mut any = false;
        for (uid, pod) in &mut self.pods {
            let Some(since) = pod.leaving else {
                continue;
            };
            if since.elapsed() < LEAVING && carries(pod) {
                continue;
            }
            leave(pod);
            pod.leaving = None;
            pod.enrolment = None;
            pod.trouble = None;
            let local = pod.handle.local.clone();
            pod.refresh(&local);
            tracing::info!(pod = %local.name, uid, "pod un-enrolled");
            any = true;
        }
        if any {
            self.publish_pods();
            self.publish_wanted();
        }
    }

    /// Looks again at pods that were just enrolled: a connection that a hook let go in clear right
    /// before may not have been there yet.
    pub(super) fn look_at_fresh(&mut self) {
        let Some(plan) = self.base.clone() else {
            return;
        };
        for (uid, pod) in self.pods.iter_mut().filter(|(_, pod)| pod.fresh) {
            pod.fresh = false;
            let Some(local) = plan.pods.get(uid) else {
                continue;
            };
            let to = (&mut self.kernel, &self.settings.ended);
            match again(to, pod, &plan, &local.view, true) {
                Ok(ended) => self.ended += ended,
                Err(_) if !pod.home.is_there() => {}
                Err(why) => {
                    tracing::warn!(pod = %local.name, why, "connections older than the enrolment end");
                }
            }
        }
    }

    /// Removes pods of an earlier agent that the facts do not have. One whose address a waiting
    /// pod has may be that pod: it stays as it is.
    fn remove_inherited(&mut self) -> Result<(), Error> {
        let Some(inherited) = self.inherited.as_mut().filter(|i| !i.is_empty()) else {
            return Ok(());
        };
        for (index, state) in self.kernel.pods()? {
            let waits = self.waiting.keys().any(|uid| {
                let local = self.desired.pods.get(uid);
                local.is_some_and(|l| l.addresses.iter().any(|a| state.view.owns(&(*a).into())))
            });
            if inherited.contains(&index) && !waits {
                tracing::info!(slot = index.0, "pod of an earlier agent removed");
                self.kernel.remove_pod(index)?;
                inherited.remove(&index);
            }
        }
        Ok(())
    }

    /// After a plan that could not be applied: pods that have no older policy in force are closed.
    fn cut_off(&mut self, added: &[PodIndex]) {
        for pod in self.pods.values().filter(|pod| added.contains(&pod.index)) {
            let view = PodView {
                set: PolicySetId::ISOLATED,
                ..pod.handle.local.view
            };
            if let Err(error) = self.kernel.set_pod(pod.index, &view) {
                tracing::error!(pod = %pod.handle.local.name, error = describe(&error), "cannot cut the pod off");
            }
        }
    }
}

/// Adopts one pod; whether an earlier agent had it. The error is for people.
fn adopt(
    kernel: &mut impl Kernel,
    finder: &impl Find,
    (uid, local): (&String, &LocalPod),
    links: &[Link],
) -> Result<(Adopted, bool), String> {
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
    let facts = kernel.add_pod(&attachment).map_err(|e| describe(&e))?;
    let handle = PodHandle {
        uid: uid.clone(),
        local: local.clone(),
        index: facts.index,
        netns: Arc::clone(&home.netns),
        netns_cookie: home.cookie,
        listeners: None,
        link: home.interface.host_index,
        mac: home.interface.mac,
    };
    let pod = Adopted {
        home,
        index: facts.index,
        ungated: facts.ungated,
        enrolment: None,
        leaving: None,
        fresh: false,
        refused: None,
        trouble: None,
        old: None,
        handle: Arc::new(handle),
    };
    Ok((pod, facts.taken_over))
}

/// Prepares a pod's namespace and gives the kernel the agent's listeners. The error is for people.
fn enrol(
    kernel: &mut impl Kernel,
    pod: &Adopted,
    uid: &str,
    changed: &tokio::sync::mpsc::Sender<String>,
) -> Result<Enrolment, String> {
    let home: &Home = &pod.home;
    let (listeners, list) =
        pods::enrol(home, &pod.handle.local).map_err(|error| describe(&error))?;
    for (slot, listener) in listeners.iter() {
        if let Err(error) = kernel.set_listener(pod.index, slot, listener.as_fd()) {
            let why = describe(&error);
            if let Err(left) = pods::withdraw(home, &list) {
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
                "changes in the pod are only looked for every second"
            );
            None
        }
    };
    Ok(Enrolment {
        listeners,
        list,
        _watch: watch,
    })
}

/// Whether the agent carries connections of a pod. One whose sockets cannot be read has none: the
/// attempt to end them tells.
fn carries(pod: &Adopted) -> bool {
    let view = &pod.handle.local.view;
    sockets::list(&pod.home.netns, None)
        .is_ok_and(|list| !connections::with_the_agent(view, &list).is_empty())
}

/// Takes a pod that is no longer captured back to what it was. What is left of its connections with
/// the agent ends first: without our routes their bytes would leave in clear.
fn leave(pod: &Adopted) {
    let Some(enrolment) = &pod.enrolment else {
        return;
    };
    let view = &pod.handle.local.view;
    let left = sockets::list(&pod.home.netns, None)
        .and_then(|list| sockets::end(&pod.home.netns, &connections::with_the_agent(view, &list)))
        .map_err(|error| describe(&error))
        .and_then(|_| pods::withdraw(&pod.home, &enrolment.list).map_err(|error| describe(&error)));
    if let Err(why) = left
        && pod.home.is_there()
    {
        tracing::warn!(pod = %pod.handle.local.name, why, "something of ours is left in the pod");
    }
}

/// Tells the gate a pod's old connections, if they changed. One that was told keeps its reason.
fn keep(
    kernel: &mut impl Kernel,
    pod: &mut Adopted,
    mut old: Vec<(Endpoint, Endpoint, Reason)>,
) -> Result<(), String> {
    for (local, remote, reason) in &mut old {
        let known = pod.old.iter().flatten();
        if let Some((.., before)) = known.clone().find(|(l, r, _)| l == local && r == remote) {
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

/// Decides a pod's open connections again; how many were ended. The error is for people.
fn again(
    (kernel, ended): (&mut impl Kernel, &Ended),
    pod: &mut Adopted,
    plan: &Index,
    view: &PodView,
    fresh: bool,
) -> Result<u64, String> {
    let list = sockets::list(&pod.home.netns, kernel.decided()).map_err(|e| describe(&e))?;
    let carried = pod.enrolment.is_some();
    let ask = Ask {
        is_tunnel: &|socket| kernel.is_tunnel(socket),
        is_the_node_s: &sockets::is_the_node_s,
    };
    let judgement = connections::judge(plan, view, &list, (fresh, carried), ask);
    keep(kernel, pod, judgement.old)?;
    if judgement.denied.is_empty() {
        return Ok(0);
    }
    let now = Instant::now();
    for (socket, verdict) in &judgement.denied {
        ended.note(socket.local, socket.remote, *verdict, now);
    }
    let ended = sockets::end(
        &pod.home.netns,
        judgement.denied.iter().map(|(socket, _)| socket),
    )
    .map_err(|e| describe(&e))?;
    tracing::info!(pod = %pod.handle.local.name, ended, "open connections ended: policy or mode changed");
    Ok(ended)
}
