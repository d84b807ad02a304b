// SPDX-License-Identifier: Apache-2.0
//! What the agent makes in an enrolled pod's namespace, as one list: made, checked and removed
//! here and nowhere else. Convenience, never a security boundary: a pod that changes it only cuts
//! itself off.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;

use mesh_common::settings::{
    MARK_CAPTURE, MARK_INBOUND, MARK_MASK, RULE_PRIORITY, TABLE_CAPTURE, TABLE_INBOUND,
};

use super::{Error, Tried as _};
use mesh_sys::netns::NetNs;
use mesh_sys::route::{Family, Route, Routing, Rule};

/// `lo` is the first interface of every namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const LOOPBACK: u32 = 1;

/// Lets an accepted socket inherit the mark of the connection, so that the answers to the agent's
/// hand-over take the same table. Serves IPv6 too.
const FWMARK_ACCEPT: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";

/// Sends the reset of a port that nobody listens on back to the agent's hand-over, which has the
/// address of a client elsewhere: without it the answer would leave the pod, and the agent wait.
const FWMARK_REFLECT: [(Family, &str); 2] = [
    (Family::V4, "/proc/sys/net/ipv4/fwmark_reflect"),
    (Family::V6, "/proc/sys/net/ipv6/fwmark_reflect"),
];

/// One thing in a pod's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Made {
    /// A routing rule.
    Rule(Rule),
    /// A route.
    Route(Route),
    /// `net.ipv4.tcp_fwmark_accept=1`.
    FwmarkAccept,
    /// `fwmark_reflect=1` of a family.
    FwmarkReflect(Family),
}

impl Made {
    /// The switch that is turned on, where it is one.
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

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => write!(f, "rule to table {} ({:?})", rule.table, rule.family),
            Self::Route(route) => write!(f, "route in table {} ({:?})", route.table, route.family),
            Self::FwmarkAccept => f.write_str("net.ipv4.tcp_fwmark_accept"),
            Self::FwmarkReflect(family) => write!(f, "fwmark_reflect ({family:?})"),
        }
    }
}

/// The list for a pod with these addresses on this interface. Routes come before the rules that
/// lead to them.
#[must_use]
pub fn wanted(interface: u32, addresses: &BTreeSet<IpAddr>) -> Vec<Made> {
    let mut list = vec![Made::FwmarkAccept];
    for address in addresses {
        let family = Family::of(address);
        list.push(Made::FwmarkReflect(family));
        // On the pod's own interface, so that a socket bound to it finds the route too.
        list.push(Made::Route(Route {
            family,
            table: TABLE_CAPTURE,
            link: interface,
            source: Some(*address),
        }));
        list.push(Made::Route(Route {
            family,
            table: TABLE_INBOUND,
            link: LOOPBACK,
            source: None,
        }));
        for (mark, table) in [(MARK_CAPTURE, TABLE_CAPTURE), (MARK_INBOUND, TABLE_INBOUND)] {
            list.push(Made::Rule(Rule {
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

/// Everything that any agent of this version may have made in a namespace, for whatever addresses
/// the pod had.
///
/// # Errors
/// When the namespace cannot be entered or read.
pub fn present(netns: &NetNs) -> Result<Vec<Made>, Error> {
    netns
        .run(|| {
            let mut routing = Routing::open()?;
            let mut list = Vec::new();
            for family in [Family::V4, Family::V6] {
                let (rules, routes) = read(&mut routing, family)?;
                list.extend(rules.into_iter().filter(is_ours).map(Made::Rule));
                list.extend(routes.into_iter().map(Made::Route));
            }
            list.retain(|made| match made {
                Made::Route(route) => [TABLE_CAPTURE, TABLE_INBOUND].contains(&route.table),
                Made::Rule(_) | Made::FwmarkAccept | Made::FwmarkReflect(_) => true,
            });
            if !list.is_empty() {
                list.push(Made::FwmarkAccept);
                list.extend(FWMARK_REFLECT.map(|(family, _)| Made::FwmarkReflect(family)));
            }
            Ok(list)
        })
        .tried("enter")?
        .tried("read the rules and routes")
}

/// Makes what is missing of a list; returns what was.
///
/// # Errors
/// When the kernel refuses.
pub fn ensure(netns: &NetNs, list: &[Made]) -> Result<Vec<Made>, Error> {
    netns
        .run(|| {
            let mut routing = Routing::open()?;
            let missing = missing(&mut routing, list)?;
            for made in &missing {
                match made {
                    Made::Rule(rule) => routing.add_rule(rule)?,
                    Made::Route(route) => routing.add_route(route)?,
                    Made::FwmarkAccept | Made::FwmarkReflect(_) => turn(made, "1")?,
                }
            }
            Ok(missing)
        })
        .tried("enter")?
        .tried("make rules and routes")
}

/// Removes a list, in reverse.
///
/// # Errors
/// The first that could not be removed; the others are.
pub fn remove(netns: &NetNs, list: &[Made]) -> Result<(), Error> {
    netns
        .run(|| {
            let mut routing = Routing::open()?;
            let mut result = Ok(());
            for made in list.iter().rev() {
                let one = match made {
                    Made::Rule(rule) => routing.remove_rule(rule),
                    Made::Route(route) => routing.remove_route(route),
                    Made::FwmarkAccept | Made::FwmarkReflect(_) => turn(made, "0"),
                };
                result = result.and(one);
            }
            result
        })
        .tried("enter")?
        .tried("remove rules and routes")
}

fn missing(routing: &mut Routing, list: &[Made]) -> io::Result<Vec<Made>> {
    let mut there = BTreeSet::new();
    let families: BTreeSet<Family> = list
        .iter()
        .filter_map(|made| match made {
            Made::Rule(rule) => Some(rule.family),
            Made::Route(route) => Some(route.family),
            Made::FwmarkAccept | Made::FwmarkReflect(_) => None,
        })
        .collect();
    for family in families {
        let (rules, routes) = read(routing, family)?;
        there.extend(rules.into_iter().map(Made::Rule));
        there.extend(routes.into_iter().map(Made::Route));
    }
    for made in list {
        if let Some(path) = made.switch()
            && fs::read_to_string(path)?.trim() == "1"
        {
            there.insert(*made);
        }
    }
    let missing = list.iter().filter(|made| !there.contains(made));
    Ok(missing.copied().collect())
}

fn turn(made: &Made, value: &str) -> io::Result<()> {
    match made.switch().map(|path| fs::write(path, value)) {
        // A kernel without IPv6 has no switch of it.
        Some(Err(e)) if e.kind() == io::ErrorKind::NotFound && value == "0" => Ok(()),
        Some(result) => result,
        None => Ok(()),
    }
}

/// A kernel without IPv6 has no rules of it.
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
