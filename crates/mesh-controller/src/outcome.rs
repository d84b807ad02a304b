// SPDX-License-Identifier: Apache-2.0
//! Results of requests for certificates, as in metrics, logs and gRPC statuses (docs/controller.md).

/// The result of a request for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Issued,
    /// The token is missing, or the API server rejects it.
    Unauthenticated,
    /// The token is for another audience.
    WrongAudience,
    /// The token belongs to another service account than the agents'.
    NotAnAgent,
    /// The token names no node, or several.
    NotBound,
    /// The requested identity is missing or invalid.
    NoIdentity,
    /// The requested identity belongs to another trust domain.
    ForeignIdentity,
    /// No pod of the requested service account runs on the caller's node.
    NotOnNode,
    /// The signing request exceeds the size limit.
    Oversized,
    /// The signing request cannot be parsed, or is not signed with its own key.
    Malformed,
    /// The key is too short, or its algorithm is not supported.
    WeakKey,
    /// The key already has a certificate.
    Replayed,
    /// The caller exceeds its rate limit.
    RateLimited,
    /// The API server does not answer, or there is no CA yet.
    Unavailable,
}

impl Outcome {
    pub(super) const ALL: [Self; 14] = [
        Self::Issued,
        Self::Unauthenticated,
        Self::WrongAudience,
        Self::NotAnAgent,
        Self::NotBound,
        Self::NoIdentity,
        Self::ForeignIdentity,
        Self::NotOnNode,
        Self::Oversized,
        Self::Malformed,
        Self::WeakKey,
        Self::Replayed,
        Self::RateLimited,
        Self::Unavailable,
    ];

    /// Returns the value of the label `result`, and the name in logs and errors.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Unauthenticated => "unauthenticated",
            Self::WrongAudience => "wrong_audience",
            Self::NotAnAgent => "not_an_agent",
            Self::NotBound => "not_bound",
            Self::NoIdentity => "no_identity",
            Self::ForeignIdentity => "foreign_identity",
            Self::NotOnNode => "not_on_node",
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::WeakKey => "weak_key",
            Self::Replayed => "replayed",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lists_the_outcomes_in_order() {
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
        }
    }
}
