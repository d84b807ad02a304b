// SPDX-License-Identifier: Apache-2.0
//! Compiles answers by port into the fewest longest-prefix entries.
//!
//! Every port of every protocol is covered, because a missing answer denies.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::policy::Answer;

use super::work::Work;

/// The answer for the ports after the previous span, up to `last`. Spans are ascending, up to
/// 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    pub(crate) last: u16,
    pub(crate) answer: Answer,
}

/// One entry; the first `bits` bits of `port` are significant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortPrefix {
    pub(crate) port: u16,
    pub(crate) bits: u32,
    pub(crate) answer: Answer,
}

/// Joins two answers, as `decide` does: in the ranked tiers the earlier rule decides, in the
/// namespaced tier Deny beats Allow.
pub(crate) fn join(a: Answer, b: Answer) -> Answer {
    let mut joined = a;
    if b.admin_rank < a.admin_rank {
        joined.admin_rank = b.admin_rank;
        joined.admin = b.admin;
        joined.admin_rule = b.admin_rule;
    }
    if b.baseline_rank < a.baseline_rank {
        joined.baseline_rank = b.baseline_rank;
        joined.baseline = b.baseline;
        joined.baseline_rule = b.baseline_rule;
    }
    // NONE < ALLOW < DENY
    if b.namespaced > a.namespaced {
        joined.namespaced = b.namespaced;
        joined.namespaced_rule = b.namespaced_rule;
    }
    joined
}

/// The answers of rules with ranges, as spans; adjacent spans differ. Incomplete if the work limit
/// is reached.
pub(crate) fn spans(rules: &[(u16, u16, Answer)], work: &Work) -> Vec<Span> {
    // The ports at which rules begin or end: the first port of each range, and the port after its
    // last.
    let mut borders: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    borders.extend([0, u32::from(u16::MAX) + 1].map(|end| (end, Vec::new())));
    for (index, (first, last, _)) in rules.iter().enumerate() {
        borders.entry((*first).into()).or_default().push(index);
        let behind = u32::from(*last) + 1;
        borders.entry(behind).or_default().push(index);
    }
    let mut matching: BTreeSet<usize> = BTreeSet::new();
    let mut spans: Vec<Span> = Vec::with_capacity(borders.len());
    for (changes, next) in borders.values().zip(borders.keys().skip(1)) {
        for rule in changes {
            if !matching.remove(rule) {
                matching.insert(*rule);
            }
        }
        let Ok(last) = u16::try_from(next - 1) else {
            break;
        };
        if !work.take(matching.len()) {
            break;
        }
        let answers = matching.iter().filter_map(|index| rules.get(*index));
        let answer = answers.fold(Answer::SILENT, |all, (_, _, answer)| join(all, *answer));
        match spans.last_mut() {
            Some(previous) if previous.answer == answer => previous.last = last,
            _ => spans.push(Span { last, answer }),
        }
    }
    spans
}

/// The fewest prefixes that give every port its span's answer (the ORTC construction: Draves,
/// King, Venkatachary and Zill, "Constructing Optimal IP Routing Tables", 1999).
pub(crate) fn prefixes(spans: &[Span]) -> Vec<PortPrefix> {
    let mut out = Vec::new();
    if let Some(root) = node(spans, 0, 0) {
        emit(&root, 0, 0, None, &mut out);
    }
    out
}

/// A node of the binary trie: the answers, ascending, with which its subtree needs the fewest
/// entries if it inherits one of them.
struct Node {
    candidates: Vec<Answer>,
    children: Option<Box<[Self; 2]>>,
}

fn node(spans: &[Span], port: u16, bits: u32) -> Option<Node> {
    let last = port | u16::MAX.checked_shr(bits).unwrap_or(0);
    let at = spans.partition_point(|span| span.last < port);
    let span = spans.get(at)?;
    if last <= span.last {
        return Some(Node {
            candidates: vec![span.answer],
            children: None,
        });
    }
    let [low, high] = halves(port, bits);
    let children = [node(spans, low, bits + 1)?, node(spans, high, bits + 1)?];
    let [a, b] = [&children[0].candidates, &children[1].candidates];
    let mut candidates: Vec<Answer> = a
        .iter()
        .copied()
        .filter(|x| b.binary_search(x).is_ok())
        .collect();
    if candidates.is_empty() {
        candidates = a.iter().chain(b).copied().collect();
        candidates.sort_unstable();
    }
    Some(Node {
        candidates,
        children: Some(Box::new(children)),
    })
}

fn halves(port: u16, bits: u32) -> [u16; 2] {
    [port, port | (1 << 15u32.saturating_sub(bits))]
}

fn emit(node: &Node, port: u16, bits: u32, inherited: Option<Answer>, out: &mut Vec<PortPrefix>) {
    let mut holds = inherited;
    if inherited.is_none_or(|answer| node.candidates.binary_search(&answer).is_err()) {
        let Some(answer) = node.candidates.first().copied() else {
            return;
        };
        out.push(PortPrefix { port, bits, answer });
        holds = Some(answer);
    }
    if let Some(children) = &node.children {
        let [low, high] = halves(port, bits);
        emit(&children[0], low, bits + 1, holds, out);
        emit(&children[1], high, bits + 1, holds, out);
    }
}

#[cfg(test)]
mod tests {
    use mesh_common::policy::RuleId;

    use super::*;

    fn answer(n: u64) -> Answer {
        Answer {
            namespaced: 1,
            namespaced_rule: RuleId(n),
            ..Answer::SILENT
        }
    }

    /// Returns the value that a longest-prefix match finds.
    fn lookup(prefixes: &[PortPrefix], port: u16) -> Option<Answer> {
        let matches = |p: &&PortPrefix| p.bits == 0 || (port ^ p.port) >> (16 - p.bits) == 0;
        prefixes
            .iter()
            .filter(matches)
            .max_by_key(|p| p.bits)
            .map(|p| p.answer)
    }

    fn of(rules: &[(u16, u16, Answer)]) -> Vec<Span> {
        let work = Work::default();
        work.begin(usize::MAX);
        spans(rules, &work)
    }

    fn check(rules: &[(u16, u16, Answer)]) -> usize {
        let prefixes = prefixes(&of(rules));
        for port in 0..=u16::MAX {
            let expected = rules
                .iter()
                .filter(|(a, b, _)| (*a..=*b).contains(&port))
                .fold(Answer::SILENT, |all, (_, _, answer)| join(all, *answer));
            assert_eq!(
                lookup(&prefixes, port),
                Some(expected),
                "{port} of {rules:?}"
            );
        }
        prefixes.len()
    }

    #[test]
    fn every_port_gets_the_answer_of_its_range() {
        assert_eq!(check(&[]), 1);
        assert_eq!(check(&[(0, 65535, answer(7))]), 1);
        assert_eq!(check(&[(80, 80, answer(7))]), 2);
        assert_eq!(check(&[(0, 0, answer(7)), (65535, 65535, answer(8))]), 3);
        assert_eq!(check(&[(32768, 65535, answer(7))]), 2);
        check(&[(1, 65534, answer(7))]);
        check(&[
            (1024, 65535, answer(7)),
            (8080, 8090, answer(8)),
            (53, 53, answer(9)),
        ]);
        let mut seed = 1u64;
        let mut next = || {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            u16::try_from(seed >> 48).unwrap()
        };
        for _ in 0..20 {
            let mut rules = Vec::new();
            for rule in 0..u64::from(next() % 12) {
                let (a, b) = (next(), next());
                rules.push((a.min(b), a.max(b), answer(rule % 4)));
            }
            check(&rules);
        }
    }

    #[test]
    fn adjacent_equal_spans_are_merged() {
        let rules = [(10, 20, answer(1)), (21, 30, answer(1))];
        assert_eq!(of(&rules).len(), 3);
    }
}
