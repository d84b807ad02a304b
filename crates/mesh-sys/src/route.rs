// SPDX-License-Identifier: Apache-2.0
//! The rules, routes, links and addresses of a network namespace (rtnetlink).
//!
//! Additions and removals are idempotent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use tokio::io::unix::AsyncFd;

use super::netlink::{
    Attributes, Body, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Netlink, half, word,
};

const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const RTM_GETNSID: u16 = 90;

/// The origin of the mesh's rules and routes (`rtm_protocol`, `FRA_PROTOCOL`): a number that no routing daemon in
/// iproute2's `rt_protos` uses.
const PROTOCOL: u8 = 77;
const RTN_LOCAL: u8 = 2;
const RT_SCOPE_HOST: u8 = 254;
const FR_ACT_TO_TBL: u8 = 1;

const GROUP_LINK: u32 = 1;
const GROUP_IPV4_ROUTE: u32 = 7;
const GROUP_IPV4_RULE: u32 = 8;
const GROUP_IPV6_ROUTE: u32 = 11;
const GROUP_IPV6_RULE: u32 = 19;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Returns the family of an address.
    #[must_use]
    pub const fn of(addr: &IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }
}

/// `ip rule`: `fwmark MARK/MASK lookup TABLE priority PRIORITY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// The address family.
    pub family: Family,
    /// The value of the mark to match.
    pub mark: u32,
    /// The bits of the mark to compare.
    pub mask: u32,
    /// The routing table to look up.
    pub table: u32,
    /// The priority; the lowest is evaluated first.
    pub priority: u32,
}

/// `ip route`: `local default dev LINK [src SOURCE] table TABLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The address family.
    pub family: Family,
    /// The routing table.
    pub table: u32,
    /// The index of the interface.
    pub link: u32,
    /// The preferred source address.
    pub source: Option<IpAddr>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The index in this namespace.
    pub index: u32,
    /// The name.
    pub name: String,
    /// The MAC address; `None` = the hardware address does not have 6 bytes.
    pub mac: Option<[u8; 6]>,
    /// The index of the linked interface, such as a veth peer.
    pub peer: Option<u32>,
    /// The id in this namespace of the peer's network namespace; `None` = this namespace.
    pub peer_namespace: Option<i32>,
}

/// An rtnetlink socket of one network namespace.
#[derive(Debug)]
pub struct Routing(Netlink);

impl Routing {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// The request failed.
    pub fn open() -> io::Result<Self> {
        Netlink::open(libc::NETLINK_ROUTE).map(Self)
    }

    /// Adds a rule.
    ///
    /// # Errors
    /// CAP_NET_ADMIN in the namespace is missing, or the kernel does not support the family.
    pub fn add_rule(&mut self, rule: &Rule) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        ignore(
            self.0.request(RTM_NEWRULE, flags, &rule_body(rule)),
            &[libc::EEXIST],
        )
    }

    /// Removes a rule.
    ///
    /// # Errors
    /// See [`Self::add_rule`].
    pub fn remove_rule(&mut self, rule: &Rule) -> io::Result<()> {
        ignore(
            self.0.request(RTM_DELRULE, 0, &rule_body(rule)),
            &[libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT],
        )
    }

    /// Lists the rules that [`Rule`] can represent, of any origin.
    ///
    /// # Errors
    /// The request failed.
    pub fn rules(&mut self, family: Family) -> io::Result<Vec<Rule>> {
        let body = Body::new(&[family.number(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.0
            .dump(RTM_GETRULE, &body, |payload| parse_rule(family, payload))
    }

    /// Adds a route, or replaces the table's default route.
    ///
    /// # Errors
    /// The interface or source address does not exist, or CAP_NET_ADMIN is missing.
    pub fn add_route(&mut self, route: &Route) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.0.request(RTM_NEWROUTE, flags, &route_body(route))
    }

    /// Removes a route.
    ///
    /// # Errors
    /// CAP_NET_ADMIN in the namespace is missing.
    pub fn remove_route(&mut self, route: &Route) -> io::Result<()> {
        ignore(
            self.0.request(RTM_DELROUTE, 0, &route_body(route)),
            &[
                libc::ENOENT,
                libc::ESRCH,
                libc::ENODEV,
                libc::EAFNOSUPPORT,
                libc::EINVAL,
            ],
        )
    }

    /// Lists the `local default` routes of all tables except the kernel's own, of any origin.
    ///
    /// # Errors
    /// The request failed.
    pub fn routes(&mut self, family: Family) -> io::Result<Vec<Route>> {
        let body = Body::new(&[family.number(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.0
            .dump(RTM_GETROUTE, &body, |payload| parse_route(family, payload))
    }

    /// Lists all interfaces.
    ///
    /// # Errors
    /// The request failed.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        self.0.dump(RTM_GETLINK, &Body::new(&[0; 16]), parse_link)
    }

    /// Lists all addresses with the indexes of their interfaces.
    ///
    /// # Errors
    /// The request failed.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, IpAddr)>> {
        self.0.dump(RTM_GETADDR, &Body::new(&[0; 8]), parse_address)
    }

    /// Returns the id of another network namespace in this one (NETNSA_NSID); `None` = none is assigned.
    ///
    /// # Errors
    /// `other` is not a network namespace.
    pub fn number_of(&mut self, other: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        const NETNSA_NSID: u16 = 1;
        const NETNSA_FD: u16 = 3;
        let fd = other.as_raw_fd().to_ne_bytes();
        let body = Body::new(&[0; 4]).with(NETNSA_FD, &fd);
        let answer = self.0.get(RTM_GETNSID, &body)?;
        let number = Attributes::after(&answer, 4)
            .find(|(kind, _)| *kind == NETNSA_NSID)
            .and_then(|(_, data)| word(data, 0))
            .map(u32::cast_signed);
        Ok(number.filter(|n| *n >= 0))
    }
}

/// A watch for changes of the rules, routes and links of a network namespace, which it keeps alive.
#[derive(Debug)]
pub struct RoutingWatch(AsyncFd<Netlink>);

impl RoutingWatch {
    /// Opens a watch in this thread's network namespace. Call it in a tokio runtime.
    ///
    /// # Errors
    /// The request failed.
    pub fn open() -> io::Result<Self> {
        let groups = [
            GROUP_LINK,
            GROUP_IPV4_ROUTE,
            GROUP_IPV4_RULE,
            GROUP_IPV6_ROUTE,
            GROUP_IPV6_RULE,
        ];
        let socket = Netlink::listening(libc::NETLINK_ROUTE, &groups)?;
        // SAFETY: a `Netlink` owns its descriptor, always returns the same one, and closes it on drop, after the
        // `AsyncFd` has deregistered it.
        Ok(Self(unsafe { AsyncFd::register(socket) }?))
    }

    /// Waits for a change since the last call. Cancel safe.
    ///
    /// # Errors
    /// The request failed.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable_mut().await?;
            // The order matters: a message after the last read makes the socket ready again.
            ready.clear_ready();
            if ready.get_inner_mut().drain()? {
                return Ok(());
            }
        }
    }
}

fn ignore(result: io::Result<()>, numbers: &[i32]) -> io::Result<()> {
    match result {
        Err(e) if e.raw_os_error().is_some_and(|n| numbers.contains(&n)) => Ok(()),
        other => other,
    }
}

const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;

fn rule_body(rule: &Rule) -> Body {
    let mut header = [0u8; 12];
    header[0] = rule.family.number();
    header[7] = FR_ACT_TO_TBL;
    Body::new(&header)
        .with(FRA_PRIORITY, &rule.priority.to_ne_bytes())
        .with(FRA_FWMARK, &rule.mark.to_ne_bytes())
        .with(FRA_FWMASK, &rule.mask.to_ne_bytes())
        .with(FRA_TABLE, &rule.table.to_ne_bytes())
        .with(FRA_PROTOCOL, &[PROTOCOL])
}

fn parse_rule(family: Family, payload: &[u8]) -> Option<Rule> {
    if *payload.first()? != family.number() {
        return None;
    }
    let mut rule = Rule {
        family,
        mark: 0,
        mask: 0,
        table: u32::from(*payload.get(4)?),
        priority: 0,
    };
    for (kind, data) in Attributes::after(payload, 12) {
        match kind {
            FRA_PRIORITY => rule.priority = word(data, 0)?,
            FRA_FWMARK => rule.mark = word(data, 0)?,
            FRA_FWMASK => rule.mask = word(data, 0)?,
            FRA_TABLE => rule.table = word(data, 0)?,
            _ => {}
        }
    }
    Some(rule)
}

const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;

fn route_body(route: &Route) -> Body {
    let mut header = [0u8; 12];
    header[0] = route.family.number();
    header[5] = PROTOCOL;
    header[6] = RT_SCOPE_HOST;
    header[7] = RTN_LOCAL;
    let body = Body::new(&header)
        .with(RTA_OIF, &route.link.to_ne_bytes())
        .with(RTA_TABLE, &route.table.to_ne_bytes());
    match route.source {
        Some(IpAddr::V4(source)) => body.with(RTA_PREFSRC, &source.octets()),
        Some(IpAddr::V6(source)) => body.with(RTA_PREFSRC, &source.octets()),
        None => body,
    }
}

fn parse_route(family: Family, payload: &[u8]) -> Option<Route> {
    const RT_TABLE_LOCAL: u32 = 255;
    let [number, bits, _, _, table, _, _, kind] = *payload.first_chunk::<8>()?;
    if number != family.number() || bits != 0 || kind != RTN_LOCAL {
        return None;
    }
    let mut route = Route {
        family,
        table: u32::from(table),
        link: 0,
        source: None,
    };
    for (kind, data) in Attributes::after(payload, 12) {
        match kind {
            RTA_OIF => route.link = word(data, 0)?,
            RTA_TABLE => route.table = word(data, 0)?,
            RTA_PREFSRC => route.source = ip(data),
            _ => {}
        }
    }
    (route.table != RT_TABLE_LOCAL).then_some(route)
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    const IFLA_ADDRESS: u16 = 1;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINK: u16 = 5;
    const IFLA_LINK_NETNSID: u16 = 37;
    half(payload, 0)?;
    let mut link = Link {
        index: word(payload, 4)?,
        name: String::new(),
        mac: None,
        peer: None,
        peer_namespace: None,
    };
    for (kind, data) in Attributes::after(payload, 16) {
        match kind {
            IFLA_ADDRESS => link.mac = data.try_into().ok(),
            IFLA_IFNAME => {
                let name = data.split(|b| *b == 0).next().unwrap_or(data);
                link.name = String::from_utf8_lossy(name).into_owned();
            }
            IFLA_LINK => link.peer = word(data, 0),
            IFLA_LINK_NETNSID => link.peer_namespace = word(data, 0).map(u32::cast_signed),
            _ => {}
        }
    }
    Some(link)
}

fn parse_address(payload: &[u8]) -> Option<(u32, IpAddr)> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let link = word(payload, 4)?;
    let mut found = None;
    for (kind, data) in Attributes::after(payload, 8) {
        match kind {
            // On point-to-point links, IFA_ADDRESS is the peer's address.
            IFA_LOCAL => return Some((link, ip(data)?)),
            IFA_ADDRESS => found = ip(data),
            _ => {}
        }
    }
    Some((link, found?))
}

fn ip(data: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(data) {
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets = <[u8; 16]>::try_from(data).ok()?;
    Some(Ipv6Addr::from(octets).into())
}
