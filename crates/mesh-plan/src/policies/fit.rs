// SPDX-License-Identifier: Apache-2.0
//! Chooses the sets that fit into the maps, the smallest first. A set that does not fit is left out
//! as a whole, its pods are isolated, and a rejection reports the numbers.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::policy::{ListId, PolicySetId};

use super::Table;
use super::sets::{Set, SetCompiler};
use crate::cluster::{ObjectRef, Rejection};
use crate::compile::Limits;

/// The number of used entries.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    sets: usize,
    selects: usize,
    cidrs: usize,
    ports: usize,
}

impl Usage {
    /// The first exceeded limit: its name, the required entries, and the limit.
    fn over(&self, limits: &Limits) -> Option<(&'static str, usize, usize)> {
        [
            ("sets", self.sets, limits.sets),
            ("set and peer pairs", self.selects, limits.selects),
            ("address blocks", self.cidrs, limits.cidrs),
            ("port prefixes", self.ports, limits.ports),
        ]
        .into_iter()
        .find(|(_, used, limit)| used > limit)
    }

    fn with(&self, set: &Set, new_ports: usize) -> Self {
        Self {
            sets: self.sets + 1,
            selects: self.selects + set.selects.len(),
            cidrs: self.cidrs + set.cidrs.len(),
            ports: self.ports + new_ports,
        }
    }
}

/// The sets of a compiler that fit into the maps.
#[derive(Debug, Default)]
pub(crate) struct Fitting {
    pub(crate) sets: BTreeSet<PolicySetId>,
    pub(crate) lists: BTreeSet<ListId>,
}

/// Chooses among the usable sets. `pods` are the pods of each set, for the rejections.
pub(crate) fn fit(
    compiler: &SetCompiler<'_, '_, '_>,
    unusable: &BTreeSet<PolicySetId>,
    pods: &BTreeMap<PolicySetId, Vec<String>>,
    limits: &Limits,
    rejections: &mut Vec<Rejection>,
    table: &Table<'_>,
) -> Fitting {
    let usable = |id: &PolicySetId| compiler.sets.get(id).filter(|_| !unusable.contains(id));
    let mut order: Vec<(usize, PolicySetId)> = compiler
        .sets
        .keys()
        .filter_map(|id| usable(id).map(|set| (set.selects.len() + set.cidrs.len(), *id)))
        .collect();
    order.sort_unstable();
    let mut fitting = Fitting::default();
    let mut usage = Usage::default();
    for (_, id) in order {
        let Some(set) = usable(&id) else { continue };
        let new_lists = set.lists.difference(&fitting.lists);
        let new_ports = new_lists
            .map(|list| compiler.lists.entries(*list).len())
            .sum();
        let with = usage.with(set, new_ports);
        let Some((what, used, limit)) = with.over(limits) else {
            usage = with;
            fitting.lists.extend(&set.lists);
            fitting.sets.insert(id);
            continue;
        };
        let policies: Vec<&ObjectRef> = set
            .policies
            .iter()
            .filter_map(|index| table.entries.get(*index).map(|entry| entry.object))
            .collect();
        let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
        rejections.push(Rejection {
            object: policies
                .first()
                .map(|first| (*first).clone())
                .unwrap_or_default(),
            field: "spec".to_owned(),
            why: format!(
                "policies too large for this node: {} need {used} {what}, half of the map holds at \
                 most {limit} (the other half is reserved for the next revision)",
                names.join(", ")
            ),
            consequence: format!(
                "isolates {}",
                pods.get(&id)
                    .map_or_else(|| "no pod".to_owned(), |names| names.join(", "))
            ),
        });
    }
    fitting
}
