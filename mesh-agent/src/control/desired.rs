// SPDX-License-Identifier: Apache-2.0
//! The desired state: the newest snapshot of the cluster, compiled.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_log::log_limited;
use mesh_plan::cluster::{ClusterSnapshot, Rejection};
use mesh_plan::{Compiler, Plan};

use super::own_addresses::{self, OwnAddresses};

/// Fill level of a map, in percent of its capacity, from which on it is logged.
const NEARLY_FULL: usize = 80;

/// The newest snapshot and its plan.
pub(super) struct Desired {
    compiler: Compiler,
    own_addresses: OwnAddresses,
    /// The snapshot that the plan was compiled from.
    pub(super) snapshot: Arc<ClusterSnapshot>,
    /// The plan as the cluster requests it.
    pub(super) plan: Plan,
    /// Fields that the compiler rejected.
    pub(super) rejections: Vec<Rejection>,
    /// Maps that the plan nearly fills.
    nearly_full: BTreeSet<&'static str>,
}

impl Desired {
    pub(super) fn new(node: &str, own_addresses: own_addresses::Read) -> Self {
        let mut own_addresses = OwnAddresses::new(own_addresses);
        own_addresses.refresh();
        Self {
            compiler: Compiler::new(node),
            own_addresses,
            snapshot: Arc::default(),
            plan: Plan::default(),
            rejections: Vec::new(),
            nearly_full: BTreeSet::new(),
        }
    }

    /// Compiles a snapshot.
    pub(super) fn compile(&mut self, snapshot: &Arc<ClusterSnapshot>) {
        let (mut plan, rejections) = self.compiler.compile(snapshot, self.own_addresses.get());
        plan.unite(&self.plan);
        let known: BTreeSet<&Rejection> = self.rejections.iter().collect();
        for rejection in rejections.iter().filter(|it| !known.contains(it)) {
            log_limited!(error, rejection.object, object = %rejection.object, field = rejection.field,
                why = rejection.why, consequence = rejection.consequence, "policy only partly enforced");
        }
        (self.plan, self.rejections) = (plan, rejections);
        self.check_capacity();
        self.snapshot = Arc::clone(snapshot);
    }

    /// Reads the node's own addresses again, and compiles the snapshot again if they changed. Tells
    /// whether they did.
    pub(super) fn refresh_own_addresses(&mut self) -> bool {
        let changed = self.own_addresses.refresh();
        if changed {
            let snapshot = Arc::clone(&self.snapshot);
            self.compile(&snapshot);
        }
        changed
    }

    /// Logs maps that are nearly full: pods whose policy does not fit are isolated.
    fn check_capacity(&mut self) {
        let near: BTreeSet<&'static str> = self
            .plan
            .fill()
            .into_iter()
            .filter(|(map, used, capacity)| {
                let is_near = used * 100 >= capacity * NEARLY_FULL;
                if is_near && !self.nearly_full.contains(map) {
                    tracing::warn!(map, entries = used, capacity, "map is nearly full");
                }
                is_near
            })
            .map(|(map, ..)| map)
            .collect();
        self.nearly_full = near;
    }
}
