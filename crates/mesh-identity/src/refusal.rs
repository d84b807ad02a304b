// SPDX-License-Identifier: Apache-2.0
//! Reasons of failed handshakes, with their labels in `mesh_tls_handshakes_total{role,result}`.
//!
//! Verifiers return these reasons through rustls, which sends an alert to the peer. This module finds
//! them again in the errors of rustls and of sockets.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the errors of other crates grow; errors without a case of their own are general"
)]

use std::{io, sync::Arc};

use mesh_common::Reason;
use rustls::{
    AlertDescription, CertificateError, Error as TlsError, OtherError, PeerIncompatible,
    PeerMisbehaved,
};

/// The reason of a failed handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The peer presented no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// The certificate does not chain to a root of the trust domain.
    #[error("the peer's certificate is not signed by a root of the trust domain")]
    UnknownCa,
    /// The certificate or an issuer's certificate has expired, or this node's clock is wrong.
    #[error("the peer's certificate has expired: check its agent's CA and both nodes' clocks")]
    Expired,
    /// The certificate is not valid yet, or this node's clock is wrong.
    #[error("the peer's certificate is not valid yet: check both nodes' clocks")]
    NotYetValid,
    /// The certificate is revoked.
    #[error("the peer's certificate is revoked")]
    Revoked,
    /// The peer's identity differs from the identity expected at its address.
    #[error("the peer's identity is not the expected one")]
    WrongIdentity,
    /// The identity belongs to another trust domain.
    #[error("the peer's identity belongs to another trust domain")]
    WrongTrustDomain,
    /// The certificate has no SPIFFE ID of a workload, or a malformed one.
    #[error("the peer's certificate has no SPIFFE ID of a workload")]
    NoSpiffeId,
    /// The certificate has more than one URI name.
    #[error("the peer's certificate has more than one URI name")]
    SeveralNames,
    /// The certificate's key usage does not fit (a CA certificate, or without digitalSignature,
    /// clientAuth or serverAuth).
    #[error("the peer's certificate has an unsuitable key usage")]
    WrongUsage,
    /// The certificate cannot be parsed, or violates X.509.
    #[error("the peer's certificate is malformed")]
    BadCertificate,
    /// The peer does not have the certificate's private key.
    #[error("the peer's handshake signature is invalid")]
    BadSignature,
    /// The peer does not support TLS 1.3.
    #[error("the peer does not support TLS 1.3")]
    TlsVersion,
    /// The peer shares no cipher suite, key exchange or signature scheme.
    #[error("no TLS parameters in common with the peer")]
    NoCommonParameters,
    /// The peer does not support the tunnel protocol.
    #[error("the peer does not support the tunnel protocol")]
    Protocol,
    /// The received bytes are not TLS.
    #[error("the peer does not use TLS")]
    NotTls,
    /// The peer violated the TLS protocol.
    #[error("the peer violated the TLS protocol")]
    Misbehaved,
    /// The peer refused the handshake with this alert (RFC 8446, 6).
    #[error("the peer refused the handshake with alert {0}")]
    RefusedByPeer(u8),
    /// The peer closed or reset the connection.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// The handshake timed out.
    #[error("the handshake timed out")]
    Timeout,
    /// The handshake failed for a local reason, for example a socket error.
    #[error("the handshake failed locally")]
    Failed,
    /// A limit of handshakes or tunnels is reached.
    #[error("too many concurrent handshakes or tunnels")]
    LimitReached,
    /// This workload has no certificate to present.
    #[error("no certificate to present to the peer")]
    NoOwnCertificate,
}

impl Refusal {
    /// All label values, in the order of [`Self::index`].
    pub const LABELS: [&'static str; 23] = [
        "no_certificate",
        "unknown_ca",
        "expired",
        "not_yet_valid",
        "revoked",
        "wrong_identity",
        "wrong_trust_domain",
        "no_spiffe_id",
        "several_names",
        "wrong_usage",
        "bad_certificate",
        "bad_signature",
        "tls_version",
        "no_common_parameters",
        "protocol",
        "not_tls",
        "misbehaved",
        "refused_by_peer",
        "closed",
        "timeout",
        "failed",
        "limit_reached",
        "no_own_certificate",
    ];

    /// Returns the index in [`Self::LABELS`].
    pub fn index(self) -> usize {
        match self {
            Self::NoCertificate => 0,
            Self::UnknownCa => 1,
            Self::Expired => 2,
            Self::NotYetValid => 3,
            Self::Revoked => 4,
            Self::WrongIdentity => 5,
            Self::WrongTrustDomain => 6,
            Self::NoSpiffeId => 7,
            Self::SeveralNames => 8,
            Self::WrongUsage => 9,
            Self::BadCertificate => 10,
            Self::BadSignature => 11,
            Self::TlsVersion => 12,
            Self::NoCommonParameters => 13,
            Self::Protocol => 14,
            Self::NotTls => 15,
            Self::Misbehaved => 16,
            Self::RefusedByPeer(_) => 17,
            Self::Closed => 18,
            Self::Timeout => 19,
            Self::Failed => 20,
            Self::LimitReached => 21,
            Self::NoOwnCertificate => 22,
        }
    }

    /// Returns the label of the result in metrics and records.
    pub fn label(self) -> &'static str {
        Self::LABELS[self.index()]
    }

    /// Returns the reason of the connection's record.
    pub fn reason(self) -> Reason {
        match self {
            Self::NoCertificate
            | Self::UnknownCa
            | Self::Expired
            | Self::NotYetValid
            | Self::Revoked
            | Self::WrongIdentity
            | Self::WrongTrustDomain
            | Self::NoSpiffeId
            | Self::SeveralNames
            | Self::WrongUsage
            | Self::BadCertificate
            | Self::BadSignature => Reason::IdentityRefused,
            Self::Protocol => Reason::Protocol,
            Self::LimitReached => Reason::LimitReached,
            Self::NoOwnCertificate => Reason::NoCertificate,
            Self::TlsVersion
            | Self::NoCommonParameters
            | Self::NotTls
            | Self::Misbehaved
            | Self::RefusedByPeer(_)
            | Self::Closed
            | Self::Timeout
            | Self::Failed => Reason::TlsFailed,
        }
    }

    /// Finds the reason in an error of rustls.
    pub fn of_tls(error: &TlsError) -> Self {
        match error {
            TlsError::InvalidCertificate(why) => Self::of_certificate(why),
            TlsError::NoCertificatesPresented => Self::NoCertificate,
            TlsError::NoApplicationProtocol => Self::Protocol,
            TlsError::PeerIncompatible(why) => Self::of_incompatible(why),
            TlsError::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedApplicationProtocol) => {
                Self::Protocol
            }
            TlsError::AlertReceived(AlertDescription::ProtocolVersion) => Self::TlsVersion,
            TlsError::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::Protocol,
            TlsError::AlertReceived(alert) => Self::RefusedByPeer(u8::from(*alert)),
            TlsError::InvalidMessage(_) => Self::NotTls,
            TlsError::PeerMisbehaved(_)
            | TlsError::InappropriateMessage { .. }
            | TlsError::InappropriateHandshakeMessage { .. }
            | TlsError::DecryptError
            | TlsError::PeerSentOversizedRecord => Self::Misbehaved,
            _ => Self::Failed,
        }
    }

    /// Finds the reason in an error of a TLS stream.
    pub fn of_io(error: &io::Error) -> Self {
        let inner = error.get_ref();
        if let Some(tls) = inner.and_then(|e| e.downcast_ref::<TlsError>()) {
            return Self::of_tls(tls);
        }
        if let Some(refusal) = inner.and_then(|e| e.downcast_ref::<Self>()) {
            return *refusal;
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Self::Closed,
            io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Failed,
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid
            }
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownIssuer => Self::UnknownCa,
            CertificateError::BadSignature => Self::BadSignature,
            CertificateError::Other(OtherError(other)) => other
                .downcast_ref()
                .copied()
                .unwrap_or(Self::BadCertificate),
            _ => Self::BadCertificate,
        }
    }

    fn of_incompatible(why: &PeerIncompatible) -> Self {
        match why {
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::SupportedVersionsExtensionRequired => Self::TlsVersion,
            _ => Self::NoCommonParameters,
        }
    }
}

/// Converts the reason so that rustls sends the matching alert to the peer.
impl From<Refusal> for TlsError {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(match refusal {
            Refusal::Expired => CertificateError::Expired,
            Refusal::NotYetValid => CertificateError::NotValidYet,
            Refusal::Revoked => CertificateError::Revoked,
            Refusal::UnknownCa => CertificateError::UnknownIssuer,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

impl From<webpki::Error> for Refusal {
    fn from(error: webpki::Error) -> Self {
        use webpki::Error as E;
        match error {
            E::CertExpired { .. } | E::InvalidCertValidity => Self::Expired,
            E::CertNotValidYet { .. } => Self::NotYetValid,
            E::CertRevoked => Self::Revoked,
            // A foreign root may have the same name as a trusted root; then only the signature differs.
            E::UnknownIssuer | E::InvalidSignatureForPublicKey => Self::UnknownCa,
            E::RequiredEkuNotFoundContext(_)
            | E::CaUsedAsEndEntity
            | E::EndEntityUsedAsCa
            | E::PathLenConstraintViolated => Self::WrongUsage,
            _ => Self::BadCertificate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_survives_conversion_to_rustls_and_io_errors() {
        for refusal in [
            Refusal::Expired,
            Refusal::NotYetValid,
            Refusal::UnknownCa,
            Refusal::WrongIdentity,
            Refusal::SeveralNames,
        ] {
            let tls = TlsError::from(refusal);
            assert_eq!(Refusal::of_tls(&tls), refusal);
            assert_eq!(
                Refusal::of_io(&io::Error::new(io::ErrorKind::InvalidData, tls)),
                refusal
            );
            assert_eq!(Refusal::of_io(&io::Error::other(refusal)), refusal);
        }
    }

    #[test]
    fn labels_are_distinct_and_match_their_reasons() {
        let labels: std::collections::BTreeSet<_> = Refusal::LABELS.iter().collect();
        assert_eq!(labels.len(), Refusal::LABELS.len());
        assert_eq!(Refusal::NoCertificate.label(), "no_certificate");
        assert_eq!(Refusal::SeveralNames.label(), "several_names");
        assert_eq!(Refusal::RefusedByPeer(48).label(), "refused_by_peer");
        assert_eq!(Refusal::Failed.label(), "failed");
        let last = Refusal::NoOwnCertificate;
        assert_eq!(last.index() + 1, Refusal::LABELS.len());
    }

    #[test]
    fn socket_errors_have_reasons() {
        let of = |kind| Refusal::of_io(&io::Error::from(kind)).label();
        assert_eq!(of(io::ErrorKind::UnexpectedEof), "closed");
        assert_eq!(of(io::ErrorKind::TimedOut), "timeout");
        assert_eq!(of(io::ErrorKind::PermissionDenied), "failed");
    }
}
