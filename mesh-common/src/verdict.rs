// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Verdicts and the one list of their reasons: code, metric label and help text from one table.

use crate::policy::RuleId;

/// Makes [`Reason`] from one table. Codes are part of the pinned maps' layout: append only.
macro_rules! reasons {
    ($($code:literal $name:ident $label:literal $help:literal;)*) => {
        /// Why something was allowed, refused or sent in clear. The number is the code in events
        /// and counters.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $(#[doc = $help] $name = $code,)*
        }

        impl Reason {
            /// Every reason, in the order of the codes.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// How many codes there are: the size of arrays indexed by code. Codes are dense.
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

            /// What it means and what to check, for people.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Self::$name => $help,)* }
            }
        }
    };
}

reasons! {
    0 NoPolicy "no_policy" "No policy says anything about this connection; it is allowed.";
    1 Policy "policy" "A rule of a policy matched; the record names it.";
    2 DefaultDeny "default_deny" "The pod is isolated in this direction by a policy, and no rule allows this connection.";
    3 NodeLocal "node_local" "Traffic from the node to its own pods is allowed, as the NetworkPolicy API says; only the admin tier can deny it.";
    4 PolicyMissing "policy_missing" "The pod's policy is not loaded, did not fit, or was rejected without an older version: everything is refused until it is.";
    5 NotAdopted "not_adopted" "The socket's network namespace is no known pod's.";
    6 Exempt "exempt" "A socket of the agent itself.";
    7 OwnAddress "own_address" "The pod talks to itself.";
    8 NoEndpoints "no_endpoints" "The service has no endpoint that takes traffic.";
    9 NoServicePort "no_service_port" "The service has no such port.";
    10 TunnelPort "tunnel_port" "Only the agent may connect to the tunnel port of an enrolled pod.";
    11 PlaintextRefused "plaintext_refused" "The pod accepts mTLS only (Strict), and this connection came without it. Enrol the client or allow plaintext with MeshAuthentication.";
    12 PeerNotReady "peer_not_ready" "The peer is enrolled, but its node has not yet reported that it accepts tunnels.";
    13 PeerNotEnrolled "peer_not_enrolled" "The peer is a pod outside the mesh, and outbound is Required. Enrol it, or set outbound to Opportunistic.";
    14 UnknownPeer "unknown_peer" "The address is in a pod CIDR, but no known pod has it.";
    15 LinkLocal "link_local" "TCP and UDP to IPv6 link-local addresses are refused for enrolled pods.";
    16 UdpMode "udp_mode" "MeshAuthentication's `udp` does not allow UDP with this peer.";
    17 CaptureFailed "capture_failed" "The kernel refused to mark the socket for capture; refused rather than sent in clear.";
    18 ListenerGone "listener_gone" "The agent of this node is not running; connections that need it are refused, never sent in clear.";
    19 Bypass "bypass" "A packet that should have gone through the tunnel was sent past the socket hooks (raw socket, nested namespace) and was dropped.";
    20 Spoofed "spoofed" "A packet with an address that is not its sender's was dropped.";
    21 Untranslated "untranslated" "A packet to a virtual address that the socket hooks did not translate was dropped.";
    22 Fragment "fragment" "A fragment that cannot be decided was dropped.";
    23 Malformed "malformed" "A packet that cannot be parsed was dropped.";
    24 NoFlow "no_flow" "A datagram that belongs to no live flow, and that policy does not allow.";
    25 UnsupportedProtocol "unsupported_protocol" "A protocol that sockets' hooks do not see, to or from a pod whose policy isolates it.";
    26 PreEnrolment "pre_enrolment" "A connection that is older than the pod's enrolment is left in clear while both ends are Permissive.";
    27 Reply "reply" "Part of a flow that was allowed.";
    28 TableFull "table_full" "A bounded table is full; refused.";
    29 SameNode "same_node" "Both pods are on this node; the traffic does not leave it.";
    30 Udp "udp" "UDP is not encrypted by the mesh.";
    31 NotAWorkload "not_a_workload" "The other end is no pod.";
    32 OptedOut "opted_out" "This end is not enrolled.";
    33 PermissivePlaintext "permissive_plaintext" "The pod is Permissive and accepted a connection without mTLS.";
    34 IdentityRefused "identity_refused" "The peer's certificate does not prove the identity that was expected, or was revoked; mesh_tls_handshakes_total has the exact reason of refused handshakes.";
    35 TlsFailed "tls_failed" "The TLS handshake failed.";
    36 ConnectFailed "connect_failed" "The application's port could not be connected to.";
    37 PeerUnreachable "peer_unreachable" "The other node's agent could not be reached on the tunnel port.";
    38 PolicyChanged "policy_changed" "An open connection was ended because policy now denies it.";
    39 AgentShutdown "agent_shutdown" "The agent stopped and the drain time ended.";
    40 PodDeleted "pod_deleted" "The pod was deleted.";
    41 NotTunnelled "not_tunnelled" "A captured connection that is not to be tunnelled was refused.";
    42 Protocol "protocol" "The other agent broke the tunnel's protocol.";
    43 LimitReached "limit_reached" "A bound of this pod or node is reached.";
    44 Echo "echo" "ICMP echo passes and is counted.";
    45 Control "control" "ARP, neighbour discovery and ICMP errors pass with a true source.";
    46 NoCertificate "no_certificate" "No valid certificate of the pod's service account is at hand.";
    47 ForeignDestination "foreign_destination" "A packet to an enrolled pod under an address that the cluster does not know as the pod's: no hook could decide it.";
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

/// What was decided, why, and by which rule.
#[must_use = "a verdict that is thrown away is a hole"]
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Verdict {
    /// Whether it may pass.
    pub allowed: bool,
    /// Why.
    pub reason: Reason,
    /// The rule that decided, or [`RuleId::NONE`].
    pub rule: RuleId,
}

impl Verdict {
    /// It may pass.
    #[inline(always)]
    pub const fn allow(reason: Reason, rule: RuleId) -> Self {
        Self {
            allowed: true,
            reason,
            rule,
        }
    }

    /// It may not.
    #[inline(always)]
    pub const fn deny(reason: Reason, rule: RuleId) -> Self {
        Self {
            allowed: false,
            reason,
            rule,
        }
    }

    /// A refusal that no policy rule made.
    #[inline(always)]
    pub const fn refuse(reason: Reason) -> Self {
        Self::deny(reason, RuleId::NONE)
    }

    /// A pass that no policy rule made.
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
}
