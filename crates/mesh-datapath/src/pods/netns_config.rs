// SPDX-License-Identifier: Apache-2.0
//! The rules, routes and sysctls that the agent configures in an enrolled pod's network namespace. Only this
//! module creates, checks and removes them. They are not a security boundary: a pod that changes them only
//! breaks its own traffic.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;

use mesh_common::settings::{
    MARK_CAPTURE, MARK_INBOUND, MARK_MASK, RULE_PRIORITY, TABLE_CAPTURE, TABLE_INBOUND,
};

use super::{Error, WithAction as _};
use mesh_sys::netns::NetNs;
use mesh_sys::route::{Family, Route, Routing, Rule};

/// `lo` is the first interface of every namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const LOOPBACK: u32 = 1;

/// Makes an accepted socket inherit the mark of its SYN, so that replies to a connection that the agent opens
/// to the application use the same routing table. Applies to IPv6 too.
const FWMARK_ACCEPT: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";

/// Marks the RST of a closed port as the SYN is marked. The agent connects with the address of a remote client:
/// without the mark, the RST would leave the pod, and the agent would wait for a time-out.
const FWMARK_REFLECT: [(Family, &str); 2] = [
    (Family::V4, "/proc/sys/net/ipv4/fwmark_reflect"),
    (Family::V6, "/proc/sys/net/ipv6/fwmark_reflect"),
];

/// One configuration item of a pod's network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NetnsItem {
    /// An `ip rule`.
    Rule(Rule),
    /// An `ip route`.
    Route(Route),
    /// `net.ipv4.tcp_fwmark_accept=1`.
    FwmarkAccept,
    /// `fwmark_reflect=1` for a family.
    FwmarkReflect(Family),
}

impl NetnsItem {
    /// Returns the path of the sysctl, if the item is one.
    fn switch(&self) -> Option<&'static str> {
        match self {
            Self::Rule(_) | Self::Route(_) => None,
            Self::FwmarkAccept => Some(FWMARK_ACCEPT),
            Self::FwmarkReflect(of) => FWMARK_REFLECT
                .iter()
                .find_map(|(family, path)| (family == of).then_some(*path)),
        }
    }
}

impl fmt::Display for NetnsItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => write!(f, "rule to table {} ({:?})", rule.table, rule.family),
            Self::Route(route) => write!(f, "route in table {} ({:?})", route.table, route.family),
            Self::FwmarkAccept => f.write_str("net.ipv4.tcp_fwmark_accept"),
            Self::FwmarkReflect(family) => write!(f, "fwmark_reflect ({family:?})"),
        }
    }
}

/// Returns the items for a pod with these addresses on this interface. Routes come before the rules that use
/// them.
#[must_use]
pub fn wanted(interface: u32, addresses: &BTreeSet<IpAddr>) -> Vec<NetnsItem> {
    let mut list = vec![NetnsItem::FwmarkAccept];
    for address in addresses {
        let family = Family::of(address);
        list.push(NetnsItem::FwmarkReflect(family));
        // The route uses the pod's own interface, so that a socket bound to the interface finds it too.
        list.push(NetnsItem::Route(Route {
            family,
            table: TABLE_CAPTURE,
            link: interface,
            source: Some(*address),
        }));
        list.push(NetnsItem::Route(Route {
            family,
            table: TABLE_INBOUND,
            link: LOOPBACK,
            source: None,
        }));
        for (mark, table) in [(MARK_CAPTURE, TABLE_CAPTURE), (MARK_INBOUND, TABLE_INBOUND)] {
            list.push(NetnsItem::Rule(Rule {
                family,
                mark,
                mask: MARK_MASK,
                table,
                priority: RULE_PRIORITY,
            }));
        }
    }
    list
}

/// Returns all items in a namespace that an agent of this version may have configured, for any addresses of
/// the pod.
///
/// # Errors
/// The namespace cannot be entered or read.
pub fn present(netns: &NetNs) -> Result<Vec<NetnsItem>, Error> {
    netns
        .run(|| {
            let mut routing = Routing::open()?;
            let mut list = Vec::new();
            for family in [Family::V4, Family::V6] {
                let (rules, routes) = read(&mut routing, family)?;
                list.extend(rules.into_iter().filter(is_ours).map(NetnsItem::Rule));
                list.extend(routes.into_iter().map(NetnsItem::Route));
            }
            list.retain(|item| match item {
                NetnsItem::Route(route) => [TABLE_CAPTURE, TABLE_INBOUND].contains(&route.table),
                NetnsItem::Rule(_) | NetnsItem::FwmarkAccept | NetnsItem::FwmarkReflect(_) => true,
            });
            if !list.is_empty() {
                list.push(NetnsItem::FwmarkAccept);
                list.extend(FWMARK_REFLECT.map(|(family, _)| NetnsItem::FwmarkReflect(family)));
            }
            Ok(list)
        })
        .with_action("enter")?
        .with_action("read the rules and routes")
}

/// Creates the missing items of a list, and returns them.
///
/// # Errors
/// A kernel operation failed.
pub fn ensure(netns: &NetNs, list: &[NetnsItem]) -> Result<Vec<NetnsItem>, Error> {
    netns
        .run(|| {
            let mut routing = Routing::open()?;
            let missing = missing(&mut routing, list)?;
            for item in &missing {
                match item {
                    NetnsItem::Rule(rule) => routing.add_rule(rule)?,
                    NetnsItem::Route(route) => routing.add_route(route)?,
                    NetnsItem::FwmarkAccept | NetnsItem::FwmarkReflect(_) => switch_to(item, "1")?,
                }
            }
            Ok(missing)
        })
        .with_action("enter")?
        .with_action("create rules and routes")
}

/// Removes the items of a list in reverse order.
///
/// # Errors
/// The first item that could not be removed; all other items are removed.
pub fn remove(netns: &NetNs, list: &[NetnsItem]) -> Result<(), Error> {
    netns
        .run(|| {
            let mut routing = Routing::open()?;
            let mut result = Ok(());
            for item in list.iter().rev() {
                let one = match item {
                    NetnsItem::Rule(rule) => routing.remove_rule(rule),
                    NetnsItem::Route(route) => routing.remove_route(route),
                    NetnsItem::FwmarkAccept | NetnsItem::FwmarkReflect(_) => switch_to(item, "0"),
                };
                result = result.and(one);
            }
            result
        })
        .with_action("enter")?
        .with_action("remove rules and routes")
}

fn missing(routing: &mut Routing, list: &[NetnsItem]) -> io::Result<Vec<NetnsItem>> {
    let mut there = BTreeSet::new();
    let families: BTreeSet<Family> = list
        .iter()
        .filter_map(|item| match item {
            NetnsItem::Rule(rule) => Some(rule.family),
            NetnsItem::Route(route) => Some(route.family),
            NetnsItem::FwmarkAccept | NetnsItem::FwmarkReflect(_) => None,
        })
        .collect();
    for family in families {
        let (rules, routes) = read(routing, family)?;
        there.extend(rules.into_iter().map(NetnsItem::Rule));
        there.extend(routes.into_iter().map(NetnsItem::Route));
    }
    for item in list {
        if let Some(path) = item.switch()
            && fs::read_to_string(path)?.trim() == "1"
        {
            there.insert(*item);
        }
    }
    let missing = list.iter().filter(|item| !there.contains(item));
    Ok(missing.copied().collect())
}

fn switch_to(item: &NetnsItem, value: &str) -> io::Result<()> {
    match item.switch().map(|path| fs::write(path, value)) {
        // A kernel without IPv6 has no IPv6 sysctls.
        Some(Err(e)) if e.kind() == io::ErrorKind::NotFound && value == "0" => Ok(()),
        Some(result) => result,
        None => Ok(()),
    }
}

/// Reads the rules and routes of a family; empty if the kernel does not support the family.
fn read(routing: &mut Routing, family: Family) -> io::Result<(Vec<Rule>, Vec<Route>)> {
    let absent = |e: &io::Error| {
        [libc::EAFNOSUPPORT, libc::EOPNOTSUPP]
            .iter()
            .any(|n| e.raw_os_error() == Some(*n))
    };
    match (routing.rules(family), routing.routes(family)) {
        (Err(e), _) | (_, Err(e)) if absent(&e) => Ok((Vec::new(), Vec::new())),
        (rules, routes) => Ok((rules?, routes?)),
    }
}

fn is_ours(rule: &Rule) -> bool {
    rule.priority == RULE_PRIORITY
        && rule.mask == MARK_MASK
        && [(MARK_CAPTURE, TABLE_CAPTURE), (MARK_INBOUND, TABLE_INBOUND)]
            .contains(&(rule.mark, rule.table))
}
