// SPDX-License-Identifier: Apache-2.0
//! Compiles address blocks into longest-prefix entries: each prefix has the complete answer for the
//! addresses of which it is the longest prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_common::Addr;
use mesh_common::policy::ListId;

use super::work::Work;
use crate::plan::{Prefix, masked};

/// The bits of the prefix of IPv4-mapped addresses.
const V4_BITS: u32 = 96;

/// A block as a longest-prefix key.
pub(crate) fn prefix(net: &IpNet) -> Prefix<Addr> {
    let bits = match net {
        IpNet::V4(v4) => u32::from(v4.prefix_len()) + V4_BITS,
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    };
    Prefix {
        bits,
        data: masked(Addr::from(net.network()), bits),
    }
}

fn is_v4(prefix: &Prefix<Addr>) -> bool {
    prefix.bits >= V4_BITS && prefix.data.is_v4()
}

/// Whether one block is inside another of the same family (`::/0` contains no IPv4 address).
fn inside(inner: &Prefix<Addr>, outer: &Prefix<Addr>) -> bool {
    is_v4(inner) == is_v4(outer)
        && outer.bits <= inner.bits
        && masked(inner.data, outer.bits) == outer.data
}

/// The prefixes of the given lengths that contain a prefix, including itself, ascending. Looking
/// them up takes the same time for any number of blocks.
fn enclosing(
    prefix: &Prefix<Addr>,
    lengths: &BTreeSet<u32>,
) -> impl DoubleEndedIterator<Item = Prefix<Addr>> + Clone {
    let shorter = |bits: &u32| Prefix {
        bits: *bits,
        data: masked(prefix.data, *bits),
    };
    lengths.range(..=prefix.bits).map(shorter)
}

/// A block without its exceptions, and the number of its rule in `entries`.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) rule: usize,
    cidr: Prefix<Addr>,
    except: BTreeSet<Prefix<Addr>>,
    /// Lengths of the exceptions.
    lengths: BTreeSet<u32>,
}

impl Block {
    /// Creates the block of a rule.
    pub(crate) fn new(rule: usize, cidr: &IpNet, except: &BTreeSet<IpNet>) -> Self {
        let except: BTreeSet<Prefix<Addr>> = except.iter().map(prefix).collect();
        Self {
            rule,
            cidr: prefix(cidr),
            lengths: except.iter().map(|prefix| prefix.bits).collect(),
            except,
        }
    }

    fn holds(&self, prefix: &Prefix<Addr>) -> bool {
        inside(prefix, &self.cidr) && !self.excepts(prefix)
    }

    fn excepts(&self, prefix: &Prefix<Addr>) -> bool {
        let known = |outer| self.except.get(&outer).is_some_and(|e| inside(prefix, e));
        enclosing(prefix, &self.lengths).any(known)
    }
}

/// Compiles the entries of blocks; `list` creates the list of some rules (indices, ascending).
/// Entries equal to their next shorter one are left out. Incomplete if the work limit is reached.
pub(crate) fn entries(
    blocks: &[Block],
    work: &Work,
    mut list: impl FnMut(&[usize]) -> ListId,
) -> Vec<(Prefix<Addr>, ListId)> {
    let mut points: BTreeSet<Prefix<Addr>> = BTreeSet::new();
    for block in blocks {
        points.insert(block.cidr);
        points.extend(block.except.iter().copied());
    }
    let v4 = prefix(&IpNet::from(IpAddr::from([0, 0, 0, 0])));
    let all_v4 = Prefix {
        bits: V4_BITS,
        data: masked(v4.data, V4_BITS),
    };
    let covers_v4 = |p: &Prefix<Addr>| p.bits < V4_BITS && masked(all_v4.data, p.bits) == p.data;
    if points.iter().any(covers_v4) {
        points.insert(all_v4);
    }
    let mut by_cidr: BTreeMap<Prefix<Addr>, Vec<&Block>> = BTreeMap::new();
    for block in blocks {
        by_cidr.entry(block.cidr).or_default().push(block);
    }
    let lengths: BTreeSet<u32> = points.iter().map(|point| point.bits).collect();
    // Ascending by length, so that enclosing prefixes come first.
    let mut kept: BTreeMap<Prefix<Addr>, ListId> = BTreeMap::new();
    for point in points {
        let around = enclosing(&point, &lengths).filter_map(|outer| by_cidr.get(&outer));
        if !work.take(around.clone().map(Vec::len).sum()) {
            break;
        }
        let mut rules: Vec<usize> = around
            .flatten()
            .filter(|block| block.holds(&point))
            .map(|block| block.rule)
            .collect();
        rules.sort_unstable();
        rules.dedup();
        let list = list(&rules);
        // The point itself is not kept yet.
        let next = enclosing(&point, &lengths)
            .rev()
            .find_map(|outer| kept.get(&outer));
        if next.copied().unwrap_or(ListId::NONE) != list {
            kept.insert(point, list);
        }
    }
    kept.into_iter().collect()
}
