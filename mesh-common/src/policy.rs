// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The policy decision: [`decide`], a pure function over a look-up trait.
//!
//! Policy is compiled in user space. A decision only looks it up, at a cost that does not depend on
//! the number of policies: the set's head, the peer's list (by identity, and by address where the
//! set has address rules), and one longest-prefix match of the port in each list. The two answers
//! are joined tier by tier. Everything but the pod's reference to its set is immutable under its
//! key, so one write switches a pod from one revision of policy to the next.

use crate::addr::{Addr, Port, Protocol};
use crate::identity::{Evidence, IdentityId};
use crate::verdict::{Reason, Verdict};

abi_id! {
    /// The compiled policy of a pod, in both directions: a hash of the policies that select it.
    /// [`PolicySetId::NONE`] = no policy selects it, everything is allowed.
    pub struct PolicySetId(pub u64);

    /// A list of answers by protocol and port: a hash of its content. [`ListId::NONE`] = no rule.
    pub struct ListId(pub u64);

    /// A rule of a policy; its name is in the plan. [`RuleId::NONE`] = no rule decided.
    pub struct RuleId(pub u64);
}

impl PolicySetId {
    /// No policy selects the pod.
    pub const NONE: Self = Self(0);
    /// The set of an isolated pod, whose policy is unknown or does not fit: it never has a head, and
    /// a set without a head denies.
    pub const ISOLATED: Self = Self(1);
}

impl ListId {
    /// A list without rules.
    pub const NONE: Self = Self(0);
}

impl RuleId {
    /// No rule.
    pub const NONE: Self = Self(0);
    /// The node's own traffic to its own pods is allowed (NetworkPolicy API: "traffic from the
    /// node where a Pod is running to the Pod is always allowed").
    pub const NODE_LOCAL: Self = Self(1);
}

/// The direction of traffic, seen from the pod whose policy is evaluated.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the pod.
    Ingress = 0,
    /// From the pod.
    Egress = 1,
}

impl Direction {
    /// The label in metrics and records.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// The result of a tier; the numbers of [`Answer`]'s fields.
pub mod action {
    /// No rule of the tier matches.
    pub const NONE: u8 = 0;
    /// Allow (or Accept).
    pub const ALLOW: u8 = 1;
    /// Deny.
    pub const DENY: u8 = 2;
    /// Continue with the next tier.
    pub const PASS: u8 = 3;
}

/// The rank of a tier in which no rule matches.
pub const NO_RANK: u32 = u32::MAX;

abi! {
    /// Value of the map `POLICY_SETS`, keyed by [`PolicySetId`].
    pub struct SetHead {
        /// The rule that a denial by ingress isolation names: the isolating policy.
        pub ingress_rule: RuleId,
        /// The rule that a denial by egress isolation names.
        pub egress_rule: RuleId,
        /// The ingress list of identities without an entry of their own.
        pub ingress_any: ListId,
        /// The egress list of identities without an entry of their own.
        pub egress_any: ListId,
        /// The set with the pod's audit policies enforced; `NONE` = no audit policy selects the pod.
        pub shadow: PolicySetId,
        /// `SetHead::ISOLATED_INGRESS` and so on.
        pub flags: u32,
        /// Always 0.
        pub pad: u32,
    }

    /// Key of the map `POLICY_SELECT`.
    pub struct SelectKey {
        /// The set.
        pub set: PolicySetId,
        /// The peer.
        pub peer: IdentityId,
        /// A [`Direction`] as its number.
        pub direction: u64,
    }

    /// Value of the map `POLICY_SELECT`.
    pub struct Lists {
        /// The list for a proven identity.
        pub proven: ListId,
        /// The list for an identity known by address only: without the Allows that name service
        /// accounts.
        pub by_address: ListId,
    }

    /// Data of the longest-prefix key of the map `POLICY_CIDRS`; direction and set match in full.
    /// The value is a [`ListId`]. Consists of 4-byte words, because a prefix length precedes it.
    pub struct CidrKey {
        set: [u32; 2],
        direction: u32,
        /// The address; prefix lengths of IPv4 are raised by 96.
        pub addr: Addr,
    }

    /// Data of the longest-prefix key of the map `POLICY_PORTS`; list and protocol match in full.
    /// The value is an [`Answer`]. Consists of 4-byte words, because a prefix length precedes it.
    pub struct PortKey {
        list: [u32; 2],
        protocol: u32,
        pad: u16,
        /// The port; a range is several prefixes.
        pub port: Port,
    }

    /// The result of a list's rules for a port, tier by tier.
    pub struct Answer {
        /// The rule of the admin tier that matches.
        pub admin_rule: RuleId,
        /// The rule of the namespaced tier that matches.
        pub namespaced_rule: RuleId,
        /// The rule of the baseline tier that matches.
        pub baseline_rule: RuleId,
        /// Position of the admin rule in the set's evaluation order, lowest first; or `NO_RANK`.
        pub admin_rank: u32,
        /// Position of the baseline rule in the set's evaluation order; or `NO_RANK`.
        pub baseline_rank: u32,
        /// An [`action`].
        pub admin: u8,
        /// An [`action`]: `NONE`, `ALLOW` or `DENY`.
        pub namespaced: u8,
        /// An [`action`].
        pub baseline: u8,
        /// Always 0.
        pub pad: [u8; 5],
    }
}

impl SetHead {
    /// Some policy of the namespaced tier isolates ingress.
    pub const ISOLATED_INGRESS: u32 = 1 << 0;
    /// Some policy of the namespaced tier isolates egress.
    pub const ISOLATED_EGRESS: u32 = 1 << 1;
    /// Ingress rules name addresses: `POLICY_CIDRS` must be looked up.
    pub const CIDRS_INGRESS: u32 = 1 << 2;
    /// Egress rules name addresses: `POLICY_CIDRS` must be looked up.
    pub const CIDRS_EGRESS: u32 = 1 << 3;

    /// The isolating rule of a direction.
    #[inline(always)]
    fn isolation(&self, direction: Direction) -> Option<RuleId> {
        let (flag, rule) = match direction {
            Direction::Ingress => (Self::ISOLATED_INGRESS, self.ingress_rule),
            Direction::Egress => (Self::ISOLATED_EGRESS, self.egress_rule),
        };
        if self.flags & flag != 0 {
            Some(rule)
        } else {
            None
        }
    }

    #[inline(always)]
    fn has_cidrs(&self, direction: Direction) -> bool {
        let flag = match direction {
            Direction::Ingress => Self::CIDRS_INGRESS,
            Direction::Egress => Self::CIDRS_EGRESS,
        };
        self.flags & flag != 0
    }

    #[inline(always)]
    fn any(&self, direction: Direction) -> ListId {
        match direction {
            Direction::Ingress => self.ingress_any,
            Direction::Egress => self.egress_any,
        }
    }
}

impl SelectKey {
    /// The key of a peer in a set.
    #[inline(always)]
    #[must_use]
    pub const fn new(set: PolicySetId, peer: IdentityId, direction: Direction) -> Self {
        Self {
            set,
            peer,
            direction: direction as u64,
        }
    }
}

impl CidrKey {
    /// Bits before the address: set and direction.
    pub const FIXED_BITS: u32 = 96;

    /// The key of an address.
    #[inline(always)]
    #[must_use]
    pub const fn new(set: PolicySetId, direction: Direction, addr: Addr) -> Self {
        Self {
            set: halves(set.0),
            direction: direction as u32,
            addr,
        }
    }

    /// The set.
    #[must_use]
    pub const fn set(&self) -> PolicySetId {
        PolicySetId(whole(self.set))
    }

    /// The [`Direction`] as its number.
    #[must_use]
    pub const fn direction(&self) -> u32 {
        self.direction
    }
}

impl PortKey {
    /// Bits before the port: list, protocol and padding.
    pub const FIXED_BITS: u32 = 112;

    /// The key of a port.
    #[inline(always)]
    #[must_use]
    pub const fn new(list: ListId, protocol: Protocol, port: Port) -> Self {
        Self {
            list: halves(list.0),
            protocol: protocol.0 as u32,
            pad: 0,
            port,
        }
    }

    /// The list.
    #[must_use]
    pub const fn list(&self) -> ListId {
        ListId(whole(self.list))
    }

    /// The protocol.
    #[must_use]
    pub const fn protocol(&self) -> Protocol {
        Protocol(self.protocol.to_ne_bytes()[0])
    }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "each half is meant")]
const fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

const fn whole(halves: [u32; 2]) -> u64 {
    halves[0] as u64 | (halves[1] as u64) << 32
}

impl Answer {
    /// No rule says anything.
    pub const SILENT: Self = Self {
        admin_rule: RuleId::NONE,
        namespaced_rule: RuleId::NONE,
        baseline_rule: RuleId::NONE,
        admin_rank: NO_RANK,
        baseline_rank: NO_RANK,
        admin: action::NONE,
        namespaced: action::NONE,
        baseline: action::NONE,
        pad: [0; 5],
    };
}

/// Looks up compiled policy.
pub trait Policies {
    /// The head of a set.
    fn head(&self, set: PolicySetId) -> Option<SetHead>;
    /// The lists of a set for one identity.
    fn select(&self, key: &SelectKey) -> Option<Lists>;
    /// The list of the longest prefix that holds the address.
    fn cidr(&self, key: &CidrKey) -> Option<ListId>;
    /// The answer of the longest prefix that holds the port.
    fn answer(&self, key: &PortKey) -> Option<&Answer>;
    /// Decides a question. The kernel programs put a function boundary here, so that the verifier
    /// checks the decision once.
    #[inline(always)]
    fn decide(&self, q: &Question) -> Verdict
    where
        Self: Sized,
    {
        decide(self, q)
    }
}

/// The question that [`decide`] answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The policy to evaluate.
    pub set: PolicySetId,
    /// To or from the pod.
    pub direction: Direction,
    /// The peer's identity.
    pub peer: IdentityId,
    /// The peer's address: rules that name addresses match regardless of the identity.
    pub addr: Addr,
    /// The evidence for `peer`.
    pub evidence: Evidence,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination port; 0 where the protocol has none.
    pub port: Port,
}

/// Decides a question. A missing set, or a missing part of one, denies: it is not loaded yet or did
/// not fit.
#[inline(always)]
pub fn decide(policies: &impl Policies, q: &Question) -> Verdict {
    if q.set == PolicySetId::NONE {
        return Verdict::allow(Reason::NoPolicy, RuleId::NONE);
    }
    let Some(head) = policies.head(q.set) else {
        return Verdict::deny(Reason::PolicyMissing, RuleId::NONE);
    };
    let key = SelectKey::new(q.set, q.peer, q.direction);
    let list = match policies.select(&key) {
        Some(lists) if q.evidence.is_proof() => lists.proven,
        Some(lists) => lists.by_address,
        None => head.any(q.direction),
    };
    let Ok(by_identity) = answer(policies, list, q) else {
        return Verdict::deny(Reason::PolicyMissing, RuleId::NONE);
    };
    let mut by_address = None;
    if head.has_cidrs(q.direction)
        && let Some(list) = policies.cidr(&CidrKey::new(q.set, q.direction, q.addr))
    {
        let Ok(found) = answer(policies, list, q) else {
            return Verdict::deny(Reason::PolicyMissing, RuleId::NONE);
        };
        by_address = found;
    }
    conclude(&head, by_identity, by_address, q)
}

/// The answer of a list; `Ok(None)` = no rule matches, `Err` = the list is not loaded.
#[inline(always)]
fn answer<'a, P: Policies>(
    policies: &'a P,
    list: ListId,
    q: &Question,
) -> Result<Option<&'a Answer>, ()> {
    if list == ListId::NONE {
        return Ok(None);
    }
    match policies.answer(&PortKey::new(list, q.protocol.policy_key(), q.port)) {
        Some(found) => Ok(Some(found)),
        None => Err(()),
    }
}

/// The earlier one of two rules of a ranked tier, which decides.
#[inline(always)]
fn earlier(a: (u32, u8, RuleId), b: (u32, u8, RuleId)) -> (u8, RuleId) {
    if b.0 < a.0 { (b.1, b.2) } else { (a.1, a.2) }
}

const NO_RULE: (u32, u8, RuleId) = (NO_RANK, action::NONE, RuleId::NONE);

impl Answer {
    #[inline(always)]
    const fn admin_rule(&self) -> (u32, u8, RuleId) {
        (self.admin_rank, self.admin, self.admin_rule)
    }

    #[inline(always)]
    const fn baseline_rule(&self) -> (u32, u8, RuleId) {
        (self.baseline_rank, self.baseline, self.baseline_rule)
    }
}

/// Evaluates the tiers in their order, over the answers for the peer's identity and for its address:
/// in the ranked tiers the earlier rule decides, in the namespaced tier Deny beats Allow.
#[inline(always)]
fn conclude(head: &SetHead, a: Option<&Answer>, b: Option<&Answer>, q: &Question) -> Verdict {
    let (admin, rule) = earlier(
        a.map_or(NO_RULE, Answer::admin_rule),
        b.map_or(NO_RULE, Answer::admin_rule),
    );
    match admin {
        action::ALLOW => return Verdict::allow(Reason::Policy, rule),
        action::DENY => return Verdict::deny(Reason::Policy, rule),
        _ => {}
    }
    if q.peer.is_host() && matches!(q.direction, Direction::Ingress) {
        return Verdict::allow(Reason::NodeLocal, RuleId::NODE_LOCAL);
    }
    let namespaced = |answer: &Answer| (answer.namespaced, answer.namespaced_rule);
    let (a_says, a_rule) = a.map_or((action::NONE, RuleId::NONE), namespaced);
    let (b_says, b_rule) = b.map_or((action::NONE, RuleId::NONE), namespaced);
    // NONE < ALLOW < DENY
    let (says, rule) = if b_says > a_says {
        (b_says, b_rule)
    } else {
        (a_says, a_rule)
    };
    match says {
        action::ALLOW => return Verdict::allow(Reason::Policy, rule),
        action::DENY => return Verdict::deny(Reason::Policy, rule),
        _ => {}
    }
    if let Some(rule) = head.isolation(q.direction) {
        return Verdict::deny(Reason::DefaultDeny, rule);
    }
    let (baseline, rule) = earlier(
        a.map_or(NO_RULE, Answer::baseline_rule),
        b.map_or(NO_RULE, Answer::baseline_rule),
    );
    match baseline {
        action::ALLOW => Verdict::allow(Reason::Policy, rule),
        action::DENY => Verdict::deny(Reason::Policy, rule),
        _ => Verdict::allow(Reason::NoPolicy, RuleId::NONE),
    }
}
