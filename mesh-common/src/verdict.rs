// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Verdicts and the list of their reasons: one table has the code, metric label and help text of
//! each.

use crate::policy::RuleId;

/// Generates [`Reason`] from one table. Codes are part of the pinned maps' layout: append only.
macro_rules! reasons {
    ($($code:literal $name:ident $label:literal $help:literal;)*) => {
        /// The reason why traffic is allowed, refused or sent as plaintext. The number is the code in
        /// events and counters.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $(#[doc = $help] $name = $code,)*
        }

        impl Reason {
            /// Every reason, in the order of the codes.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The number of codes: the size of arrays indexed by code. Codes are dense.
            #[allow(clippy::cast_possible_truncation, reason = "codes are bytes")]
            pub const CODES: u32 = [$(stringify!($name)),*].len() as u32;

            /// The reason of a code.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The label in metrics and records.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// The meaning, and what an operator should check.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Self::$name => $help,)* }
            }
        }
    };
}

reasons! {
    0 NoPolicy "no_policy" "No policy applies to this connection; it is allowed.";
    1 Policy "policy" "A rule of a policy matched; the record names the rule.";
    2 DefaultDeny "default_deny" "A policy isolates the pod in this direction, and no rule allows this connection.";
    3 NodeLocal "node_local" "Traffic from a node to its own pods is always allowed, as the NetworkPolicy API requires; only the admin tier can deny it.";
    4 PolicyMissing "policy_missing" "The pod's policy is not loaded, does not fit, or was rejected without an earlier version: all traffic is refused until the policy is in force.";
    5 NotAdopted "not_adopted" "The socket's network namespace does not belong to a managed pod.";
    6 Exempt "exempt" "The socket belongs to the agent itself.";
    7 OwnAddress "own_address" "The pod connects to itself.";
    8 NoEndpoints "no_endpoints" "The service has no endpoint that accepts traffic.";
    9 NoServicePort "no_service_port" "The service does not have this port.";
    10 TunnelPort "tunnel_port" "Only the agent may connect to the tunnel port of an enrolled pod.";
    11 PlaintextRefused "plaintext_refused" "The pod accepts mTLS only (Strict), and this connection is plaintext. Enroll the client, or allow plaintext with MeshAuthentication.";
    12 PeerNotReady "peer_not_ready" "The peer is enrolled, but its node has not yet reported that it accepts tunnels.";
    13 PeerNotEnrolled "peer_not_enrolled" "The peer is a pod outside the mesh, and outbound is Required. Enroll it, or set outbound to Opportunistic.";
    14 UnknownPeer "unknown_peer" "The address is in a pod CIDR, but does not belong to a known pod.";
    15 LinkLocal "link_local" "TCP and UDP to IPv6 link-local addresses are refused for enrolled pods.";
    16 UdpMode "udp_mode" "The field `udp` of MeshAuthentication does not allow UDP with this peer.";
    17 CaptureFailed "capture_failed" "The kernel could not mark the socket for capture; the connection is refused instead of sent as plaintext.";
    18 ListenerGone "listener_gone" "The agent of this node is not running; connections that need it are refused, never sent as plaintext.";
    19 Bypass "bypass" "A packet that must go through a tunnel bypassed the socket hooks (raw socket, nested network namespace) and was dropped.";
    20 Spoofed "spoofed" "A packet with a source address that is not the sender's was dropped.";
    21 Untranslated "untranslated" "A packet to a virtual address bypassed the socket hooks, which translate such addresses, and was dropped.";
    22 Fragment "fragment" "A fragment without a decision about its first fragment was dropped.";
    23 Malformed "malformed" "A packet that cannot be parsed was dropped.";
    24 NoFlow "no_flow" "A datagram does not belong to a live flow, and policy does not allow it.";
    25 UnsupportedProtocol "unsupported_protocol" "A protocol that the socket hooks do not see, to or from a pod that a policy isolates.";
    26 PreEnrolment "pre_enrolment" "The connection is older than the pod's enrollment; it stays plaintext while both endpoints are Permissive.";
    27 Reply "reply" "A reply of an allowed flow.";
    28 TableFull "table_full" "A table of fixed size is full; the connection is refused.";
    29 SameNode "same_node" "Both pods are on this node; the traffic does not leave it.";
    30 Udp "udp" "The mesh does not encrypt UDP.";
    31 NotAWorkload "not_a_workload" "The peer is not a pod.";
    32 OptedOut "opted_out" "The pod at this end is not enrolled.";
    33 PermissivePlaintext "permissive_plaintext" "The pod is Permissive and accepted a connection without mTLS.";
    34 IdentityRefused "identity_refused" "The peer's certificate does not prove the expected identity, or is revoked; mesh_tls_handshakes_total has the exact reason of failed handshakes.";
    35 TlsFailed "tls_failed" "The TLS handshake failed.";
    36 ConnectFailed "connect_failed" "The agent could not connect to the application's port.";
    37 PeerUnreachable "peer_unreachable" "The agent of the other node could not be reached on the tunnel port.";
    38 PolicyChanged "policy_changed" "An open connection was closed because policy now denies it.";
    39 AgentShutdown "agent_shutdown" "The agent stopped and the drain time ended.";
    40 PodDeleted "pod_deleted" "The pod was deleted.";
    41 NotTunnelled "not_tunnelled" "A captured connection that must not be tunneled was refused.";
    42 Protocol "protocol" "The other agent violated the tunnel protocol.";
    43 LimitReached "limit_reached" "A limit of this pod or node is reached.";
    44 Echo "echo" "ICMP echo is allowed and counted.";
    45 Control "control" "ARP, neighbor discovery and ICMP errors with a valid source address are allowed.";
    46 NoCertificate "no_certificate" "There is no valid certificate for the pod's service account.";
    47 ForeignDestination "foreign_destination" "A packet to an enrolled pod has a destination address that the cluster does not know as the pod's; no hook could decide it.";
}

impl Reason {
    /// Whether a policy as it is written decided: by a rule, or by isolating the pod. The `deny`
    /// setting and audit mode are about such refusals only.
    #[inline(always)]
    #[must_use]
    pub const fn is_policy(self) -> bool {
        matches!(self, Self::Policy | Self::DefaultDeny)
    }

    /// Whether the policy decision refused: by a policy as it is written, or because the pod's policy
    /// is missing, which is a fault of the mesh or of the policy.
    #[inline(always)]
    #[must_use]
    pub const fn is_policy_or_missing(self) -> bool {
        self.is_policy() || matches!(self, Self::PolicyMissing)
    }
}

/// A decision, its reason and its rule.
#[must_use = "a verdict must be acted on"]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Verdict {
    /// Whether traffic is allowed.
    pub allowed: bool,
    /// The reason.
    pub reason: Reason,
    /// The rule that decided, or [`RuleId::NONE`].
    pub rule: RuleId,
}

impl Verdict {
    /// Allows traffic.
    #[inline(always)]
    pub const fn allow(reason: Reason, rule: RuleId) -> Self {
        Self {
            allowed: true,
            reason,
            rule,
        }
    }

    /// Denies traffic.
    #[inline(always)]
    pub const fn deny(reason: Reason, rule: RuleId) -> Self {
        Self {
            allowed: false,
            reason,
            rule,
        }
    }

    /// Denies traffic without a policy rule.
    #[inline(always)]
    pub const fn refuse(reason: Reason) -> Self {
        Self::deny(reason, RuleId::NONE)
    }

    /// Allows traffic without a policy rule.
    #[inline(always)]
    pub const fn pass(reason: Reason) -> Self {
        Self::allow(reason, RuleId::NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_labels_are_unique_and_round_trip() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_code(*reason as u8), Some(*reason));
            assert!((*reason as u32) < Reason::CODES);
            for other in &Reason::ALL[i + 1..] {
                assert_ne!(reason.label(), other.label());
            }
        }
        assert_eq!(Reason::from_code(255), None);
    }

    /// A missing policy is refused by the decision, but is no policy's refusal: it is a fault, and is
    /// never silent.
    #[test]
    fn a_missing_policy_is_not_a_refusal_by_policy() {
        let of = |is: fn(Reason) -> bool| Reason::ALL.iter().copied().filter(move |r| is(*r));
        let policy = [Reason::Policy, Reason::DefaultDeny];
        assert!(of(Reason::is_policy).eq(policy));
        let decision = policy.into_iter().chain([Reason::PolicyMissing]);
        assert!(of(Reason::is_policy_or_missing).eq(decision));
    }
}
