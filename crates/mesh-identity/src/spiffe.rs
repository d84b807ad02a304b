// SPDX-License-Identifier: Apache-2.0
//! SPIFFE IDs of workloads: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT`.
//!
//! A value of these types is always valid: it can be compared byte by byte, and its parts are safe as
//! path components. Nothing is normalized.

use std::{fmt, str::FromStr, sync::Arc};

/// Maximum length of a SPIFFE ID, in bytes (SPIFFE-ID 2.3).
const ID_MAX: usize = 2048;
/// Maximum length of a trust domain, in bytes (SPIFFE-ID 2.3).
const TRUST_DOMAIN_MAX: usize = 255;
/// Maximum length of an RFC 1123 label (names of namespaces), in bytes.
const LABEL_MAX: usize = 63;
/// Maximum length of an RFC 1123 subdomain (names of service accounts), in bytes.
const SUBDOMAIN_MAX: usize = 253;

/// A violation of the form of a workload's SPIFFE ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpiffeError {
    /// The scheme is not `spiffe` in lower case.
    #[error("does not begin with spiffe://")]
    Scheme,
    /// The ID is longer than 2048 bytes.
    #[error("longer than {ID_MAX} bytes")]
    TooLong,
    /// The trust domain is empty, too long, or has other characters than `a-z 0-9 . - _`.
    #[error("the trust domain must be 1 to {TRUST_DOMAIN_MAX} of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain,
    /// The path is not `/ns/NAMESPACE/sa/SERVICEACCOUNT`.
    #[error("the path is not /ns/NAMESPACE/sa/SERVICEACCOUNT")]
    Path,
    /// The namespace is not an RFC 1123 label.
    #[error("the namespace is not an RFC 1123 label")]
    Namespace,
    /// The service account is not an RFC 1123 subdomain.
    #[error("the service account is not an RFC 1123 subdomain")]
    ServiceAccount,
}

/// The name of a trust domain: 1 to 255 of `a-z`, `0-9`, `.`, `-` and `_` (SPIFFE-ID 2.1).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Validates a name.
    ///
    /// # Errors
    /// [`SpiffeError::TrustDomain`]. Upper case is rejected, not converted.
    pub fn new(name: &str) -> Result<Self, SpiffeError> {
        let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > TRUST_DOMAIN_MAX || !name.bytes().all(allowed) {
            return Err(SpiffeError::TrustDomain);
        }
        Ok(Self(name.into()))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(name: &str) -> Result<Self, SpiffeError> {
        Self::new(name)
    }
}

/// The identity of a workload: trust domain, namespace and service account.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// Builds an identity.
    ///
    /// # Errors
    /// When the namespace is not an RFC 1123 label, or the service account not an RFC 1123 subdomain.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        if !is_label(namespace) {
            return Err(SpiffeError::Namespace);
        }
        if service_account.len() > SUBDOMAIN_MAX || !service_account.split('.').all(is_sub_label) {
            return Err(SpiffeError::ServiceAccount);
        }
        Ok(Self {
            trust_domain: trust_domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }

    /// Parses a URI. Only the form that [`fmt::Display`] writes is accepted: no upper case, port, user,
    /// percent-encoding, query, fragment, empty segment or trailing slash.
    ///
    /// # Errors
    /// The first violation.
    pub fn parse(uri: &str) -> Result<Self, SpiffeError> {
        if uri.len() > ID_MAX {
            return Err(SpiffeError::TooLong);
        }
        let rest = uri.strip_prefix("spiffe://").ok_or(SpiffeError::Scheme)?;
        let (domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        let domain = TrustDomain::new(domain)?;
        let mut parts = path.split('/');
        match (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) {
            (Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(&domain, namespace, account)
            }
            _ => Err(SpiffeError::Path),
        }
    }

    /// Returns the identity with another trust domain.
    pub(super) fn in_domain(self, trust_domain: &TrustDomain) -> Self {
        Self {
            trust_domain: trust_domain.clone(),
            ..self
        }
    }

    /// Returns the trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Returns the Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(uri: &str) -> Result<Self, SpiffeError> {
        Self::parse(uri)
    }
}

fn is_label(text: &str) -> bool {
    text.len() <= LABEL_MAX && is_sub_label(text)
}

// Kubernetes limits the length of a subdomain, but not of its labels.
fn is_sub_label(text: &str) -> bool {
    let inner = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsed_id_is_written_unchanged() {
        for uri in [
            "spiffe://cluster.local/ns/shop/sa/default",
            "spiffe://a_b-c.9/ns/1/sa/frontend.v2-x",
        ] {
            assert_eq!(SpiffeId::parse(uri).unwrap().to_string(), uri);
        }
        let id = SpiffeId::parse("spiffe://td/ns/shop/sa/web").unwrap();
        assert_eq!((id.trust_domain().as_str(), id.namespace()), ("td", "shop"));
        assert_eq!(id.service_account(), "web");
    }

    #[test]
    fn other_forms_are_rejected() {
        let long = format!("spiffe://td/ns/a/sa/{}", "x".repeat(254));
        let longest = format!("spiffe://td/ns/a/sa/{}", "x".repeat(3000));
        let domain = format!("spiffe://{}/ns/a/sa/b", "x".repeat(256));
        let namespace = format!("spiffe://td/ns/{}/sa/b", "x".repeat(64));
        let rows: &[(&str, SpiffeError)] = &[
            ("", SpiffeError::Scheme),
            ("https://td/ns/a/sa/b", SpiffeError::Scheme),
            ("SPIFFE://td/ns/a/sa/b", SpiffeError::Scheme),
            ("spiffe:/td/ns/a/sa/b", SpiffeError::Scheme),
            (" spiffe://td/ns/a/sa/b", SpiffeError::Scheme),
            ("spiffe:///ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://TD/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://td:443/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://user@td/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://t%64/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://td?x/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://tü/ns/a/sa/b", SpiffeError::TrustDomain),
            (&domain, SpiffeError::TrustDomain),
            ("spiffe://td", SpiffeError::Path),
            ("spiffe://td/", SpiffeError::Path),
            ("spiffe://td/ns/a", SpiffeError::Path),
            ("spiffe://td/ns/a/sa", SpiffeError::Path),
            ("spiffe://td//ns/a/sa/b", SpiffeError::Path),
            ("spiffe://td/sa/a/ns/b", SpiffeError::Path),
            ("spiffe://td/NS/a/sa/b", SpiffeError::Path),
            ("spiffe://td/ns/a/sa/b/", SpiffeError::Path),
            ("spiffe://td/ns/a/sa/b/c", SpiffeError::Path),
            ("spiffe://td/ns//sa/b", SpiffeError::Namespace),
            ("spiffe://td/ns/../sa/b", SpiffeError::Namespace),
            ("spiffe://td/ns/a.b/sa/b", SpiffeError::Namespace),
            ("spiffe://td/ns/A/sa/b", SpiffeError::Namespace),
            (&namespace, SpiffeError::Namespace),
            ("spiffe://td/ns/a/sa/", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/..", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/b?q", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/b#f", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/b%2fc", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/-b", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/b.", SpiffeError::ServiceAccount),
            ("spiffe://td/ns/a/sa/b\0", SpiffeError::ServiceAccount),
            (&long, SpiffeError::ServiceAccount),
            (&longest, SpiffeError::TooLong),
        ];
        for (uri, why) in rows {
            assert_eq!(SpiffeId::parse(uri), Err(*why), "{uri:?}");
        }
    }
}
