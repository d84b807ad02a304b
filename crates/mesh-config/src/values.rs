// SPDX-License-Identifier: Apache-2.0
//! Parsers of single values. Each error states the expected format.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use super::{AdminAddr, Deny, FlowLog, LogFormat, Source, TUNNEL_PORT, TunnelPort};

type Parsed<T> = Result<T, String>;

pub(super) fn path(text: &str) -> Parsed<PathBuf> {
    if text.is_empty() {
        return Err("expected a path".to_owned());
    }
    Ok(PathBuf::from(text))
}

/// Parses the path of an existing directory.
pub(super) fn directory(text: &str) -> Parsed<PathBuf> {
    let path = path(text)?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err("not a directory".to_owned())
    }
}

/// Parses a DNS name in lower case (RFC 1123), such as a node name or a trust domain.
pub(super) fn dns_name(text: &str) -> Parsed<String> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(text.to_owned())
    } else {
        Err("expected a DNS name in lower case (RFC 1123)".to_owned())
    }
}

pub(super) fn source(text: &str) -> Parsed<Source> {
    match text.split_once(':') {
        Some(("dir", dir)) if !dir.is_empty() => Ok(Source::Dir(dir.into())),
        None if text == "kubernetes" => Ok(Source::Kubernetes),
        Some(_) | None => Err("expected dir:PATH or kubernetes".to_owned()),
    }
}

/// The value of `--ca`.
pub(super) enum WhichCa {
    /// `grpc:URL`.
    Grpc(String),
    /// `files:DIR`.
    Files(PathBuf),
    /// `self:DIR`.
    SelfSigned(PathBuf),
}

pub(super) fn ca(text: &str) -> Parsed<WhichCa> {
    match text.split_once(':') {
        Some(("grpc", url)) if url.starts_with("https://") => Ok(WhichCa::Grpc(url.to_owned())),
        Some(("grpc", _)) => Err("expected grpc:https://HOST:PORT".to_owned()),
        Some(("files", dir)) if !dir.is_empty() => Ok(WhichCa::Files(dir.into())),
        Some(("self", dir)) if !dir.is_empty() => Ok(WhichCa::SelfSigned(dir.into())),
        Some(_) | None => Err("expected grpc:URL, files:DIR or self:DIR".to_owned()),
    }
}

/// Parses a name that is used in a header or certificate.
pub(super) fn name(text: &str) -> Parsed<String> {
    if !text.is_empty() && text.len() <= 253 && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("expected 1 to 253 printable ASCII characters without spaces".to_owned())
    }
}

pub(super) fn admin(text: &str) -> Parsed<AdminAddr> {
    let path = text.strip_prefix("unix:").unwrap_or(text);
    if path.starts_with('/') {
        // sockaddr_un holds 108 bytes with the terminating 0, and the agent binds the socket under a name
        // with a suffix first.
        if path.len() > 100 {
            return Err("too long for a Unix socket (at most 100 bytes)".to_owned());
        }
        return Ok(AdminAddr::Unix(path.into()));
    }
    match text.parse::<SocketAddr>() {
        Ok(addr) if addr.ip().is_loopback() => Ok(AdminAddr::Tcp(addr)),
        Ok(_) => {
            Err("not a loopback address; the admin interface has no authentication".to_owned())
        }
        Err(_) => Err("expected an absolute path or a loopback IP:PORT".to_owned()),
    }
}

pub(super) fn socket_addr(text: &str) -> Parsed<SocketAddr> {
    text.parse()
        .map_err(|error| format!("expected IP:PORT, such as 0.0.0.0:15020 or [::]:15020: {error}"))
}

pub(super) fn flow_log(text: &str) -> Parsed<FlowLog> {
    match text.split_once(':') {
        None if text == "stdout" => Ok(FlowLog::Stdout),
        None if text == "off" => Ok(FlowLog::Off),
        Some(("file", path)) if !path.is_empty() => Ok(FlowLog::File(path.into())),
        Some(_) | None => Err("expected stdout, file:PATH or off".to_owned()),
    }
}

pub(super) fn duration(text: &str) -> Parsed<Duration> {
    let expected = || "expected a number with ms, s, m or h, such as 10s".to_owned();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .ok_or_else(expected)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok().ok_or_else(expected)?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(expected()),
    };
    number
        .checked_mul(milliseconds)
        .map(Duration::from_millis)
        .ok_or_else(|| "too long".to_owned())
}

pub(super) fn cidr(text: &str) -> Parsed<IpNet> {
    let net: IpNet = text
        .parse()
        .map_err(|error| format!("expected a CIDR, such as 10.1.0.0/16: {error}"))?;
    if net.trunc() == net {
        Ok(net)
    } else {
        Err(format!("host bits are set; did you mean {}?", net.trunc()))
    }
}

pub(super) fn count(text: &str) -> Parsed<NonZeroUsize> {
    match text.parse::<NonZeroUsize>() {
        Ok(count) if count.get() <= 1024 => Ok(count),
        Ok(_) | Err(_) => Err("expected a number from 1 to 1024".to_owned()),
    }
}

pub(super) fn tunnel_port(text: &str) -> Parsed<TunnelPort> {
    match text {
        "real" => Ok(TunnelPort::Real),
        port if port.parse() == Ok(TUNNEL_PORT.get()) => Ok(TunnelPort::Fixed(TUNNEL_PORT)),
        _ => Err(format!("expected {} or real", TUNNEL_PORT.get())),
    }
}

pub(super) fn deny(text: &str) -> Parsed<Deny> {
    match text {
        "reject" => Ok(Deny::Reject),
        "drop" => Ok(Deny::Drop),
        _ => Err("expected reject or drop".to_owned()),
    }
}

pub(super) fn trace_datapath(text: &str) -> Parsed<bool> {
    match text {
        "on" if cfg!(feature = "trace") => Ok(true),
        "on" => {
            Err("not supported by this build: build mesh-agent with --features trace".to_owned())
        }
        "off" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

pub(super) fn log_format(text: &str) -> Parsed<LogFormat> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("expected text or json".to_owned()),
    }
}

pub(super) fn log_level(text: &str) -> Parsed<String> {
    mesh_log::filter(text).map(|_valid| text.to_owned())
}

/// Returns the cgroup2 mount point from the content of `/proc/self/mountinfo` (proc_pid_mountinfo(5)): the first
/// mount of the whole hierarchy, or else the first cgroup2 mount.
#[must_use]
pub fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    let mut mounts = mountinfo.lines().filter_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        if kind.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = place.split(' ').skip(3);
        let (root, mount_point) = (fields.next()?, fields.next()?);
        Some((root == "/", unescape(mount_point)))
    });
    let first = mounts.next()?;
    let whole = std::iter::once(first.clone())
        .chain(mounts)
        .find(|(whole, _)| *whole);
    Some(whole.unwrap_or(first).1)
}

/// Decodes the octal escapes of a mount point.
fn unescape(text: &str) -> PathBuf {
    let plain = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (escape, plain)| {
        text.replace(escape, plain)
    });
    Path::new(&plain).to_owned()
}
