// SPDX-License-Identifier: Apache-2.0
//! Validates values as the Kubernetes API does. Error texts name the value and the rule.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use mesh_plan::cluster::Transport;

/// Validates a DNS subdomain (RFC 1123), which every object name must be.
pub(super) fn subdomain(text: &str) -> Result<(), String> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(())
    } else {
        Err(format!(
            "invalid name {text:?}: must be a DNS subdomain of at most 253 lowercase letters, digits, '-' and '.'"
        ))
    }
}

/// Whether a text is a qualified name: a label value, or the part of a label key after the '/'.
fn is_qualified_name(text: &str) -> bool {
    let edge = |c: char| c.is_ascii_alphanumeric();
    text.len() <= 63
        && text.starts_with(edge)
        && text.ends_with(edge)
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Validates a label key: `[DNS subdomain/]name`.
pub(super) fn label_key(key: &str) -> Result<(), String> {
    let good = match key.split_once('/') {
        Some((prefix, name)) => subdomain(prefix).is_ok() && is_qualified_name(name),
        None => is_qualified_name(key),
    };
    good.then_some(())
        .ok_or_else(|| format!("invalid label key {key:?}"))
}

/// Validates a label value.
pub(super) fn label_value(value: &str) -> Result<(), String> {
    (value.is_empty() || is_qualified_name(value))
        .then_some(())
        .ok_or_else(|| format!("invalid label value {value:?}"))
}

/// Validates a port number.
pub(super) fn port(number: i64) -> Result<u16, String> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("invalid port {number}: must be between 1 and 65535"))
}

/// Validates a port name (IANA service name).
pub(super) fn port_name(name: &str) -> Result<(), String> {
    let good = !name.is_empty()
        && name.len() <= 15
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--");
    good.then_some(()).ok_or_else(|| {
        format!(
            "invalid port name {name:?}: must be at most 15 lowercase letters, digits and '-', with \
             at least one letter"
        )
    })
}

/// Parses a protocol. The default is TCP.
pub(super) fn transport(protocol: Option<&str>) -> Result<Transport, String> {
    match protocol {
        None | Some("TCP") => Ok(Transport::Tcp),
        Some("UDP") => Ok(Transport::Udp),
        Some("SCTP") => Ok(Transport::Sctp),
        Some(other) => Err(format!(
            "unsupported value {other:?}: must be TCP, UDP or SCTP"
        )),
    }
}

/// Parses an IP address. An IPv4-mapped IPv6 address becomes IPv4.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    text.parse()
        .map(|ip: IpAddr| ip.to_canonical())
        .map_err(|_invalid: std::net::AddrParseError| format!("invalid IP address {text:?}"))
}

/// Parses a CIDR. Bits after the prefix are ignored, as in the API server. An IPv4-mapped IPv6 prefix
/// (::ffff:10.0.0.0/104) becomes IPv4.
pub(super) fn cidr(text: &str) -> Result<IpNet, String> {
    let read = text
        .parse::<IpNet>()
        .map_err(|_invalid: ipnet::AddrParseError| {
            format!("invalid CIDR {text:?}: must be a prefix such as 10.0.0.0/8 or fd00::/8")
        })?;
    let mapped = match read {
        IpNet::V4(_) => None,
        IpNet::V6(net) => net
            .addr()
            .to_ipv4_mapped()
            .zip(net.prefix_len().checked_sub(96))
            .and_then(|(addr, bits)| Ipv4Net::new(addr, bits).ok()),
    };
    Ok(mapped.map_or(read, IpNet::V4).trunc())
}

/// Validates a name of ClusterNetworkPolicy's `domainNames`: labels separated by dots, with an
/// optional `*.` prefix.
pub(super) fn domain_name(text: &str) -> Result<(), String> {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        label.chars().all(inner) && end(label.chars().next()) && end(label.chars().last())
    };
    if name.contains('.') && name.split('.').all(label) {
        Ok(())
    } else {
        Err(format!(
            "invalid domain name {text:?}: must be a name such as example.com or *.example.com"
        ))
    }
}

/// Whether `inner` is a strict subset of `outer`.
pub(super) fn is_strictly_inside(inner: &IpNet, outer: &IpNet) -> bool {
    outer.contains(inner) && inner.prefix_len() > outer.prefix_len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_validated_like_the_api_server() {
        for good in ["a", "a.b-c", "1", &"a".repeat(253)] {
            assert_eq!(subdomain(good), Ok(()), "{good}");
        }
        for bad in ["", "A", "a/b", "a b", "-a", "a-", "a..b", &"a".repeat(254)] {
            assert!(subdomain(bad).is_err(), "{bad}");
        }
        for good in ["app", "mesh.rs/dataplane", "A_b.c"] {
            assert_eq!(label_key(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "/a",
            "a/",
            "a/b/c",
            "-a",
            "a b",
            "UPPER/a",
            &"a".repeat(64),
        ] {
            assert!(label_key(bad).is_err(), "{bad}");
        }
        assert_eq!(label_value(""), Ok(()));
        assert!(label_value("a b").is_err());
        assert!(port(0).is_err() && port(65536).is_err() && port(-1).is_err());
        assert_eq!(port(65535), Ok(65535));
        for bad in ["", "80", "a--b", "-a", "http-", "HTTP", "abcdefghijklmnop"] {
            assert!(port_name(bad).is_err(), "{bad}");
        }
        assert_eq!(port_name("http-1"), Ok(()));
        assert!(transport(Some("tcp")).is_err());
        assert_eq!(cidr("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert!(cidr("10.0.0.0").is_err() && cidr("10.0.0.0/33").is_err());
        for (text, expected) in [
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:0:0/95", "::fffe:0:0/95"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(cidr(text).unwrap().to_string(), expected);
        }
        for good in ["a.b", "*.Example.com", "a-b.c_d.e."] {
            assert_eq!(domain_name(good), Ok(()), "{good}");
        }
        for bad in [
            "", "a", "a..b", "*.*.b", "*a.b", "a.*", "-a.b", "a.b_", "a b.c", ".",
        ] {
            assert!(domain_name(bad).is_err(), "{bad}");
        }
        let net = |text: &str| cidr(text).unwrap();
        assert!(is_strictly_inside(&net("10.1.0.0/16"), &net("10.0.0.0/8")));
        assert!(!is_strictly_inside(&net("10.0.0.0/8"), &net("10.0.0.0/8")));
        assert!(!is_strictly_inside(&net("11.0.0.0/16"), &net("10.0.0.0/8")));
        assert!(!is_strictly_inside(&net("fd00::/16"), &net("10.0.0.0/8")));
    }
}
