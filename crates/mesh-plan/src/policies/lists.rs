// SPDX-License-Identifier: Apache-2.0
//! Lists of answers by protocol and port. Equal content shares one list.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::policy::{Answer, ListId, PortKey};
use mesh_common::{Port, Protocol};

use super::ports::{PortPrefix, Span, prefixes, spans};
use super::rules::Ranked;
use super::work::Work;
use crate::cluster::{PortMatch, PortRange, Transport};
use crate::compile::Options;
use crate::identities::NamedPorts;
use crate::plan::Prefix;

/// The protocols with entries of their own, and their transports.
const PROTOCOLS: [(Protocol, Option<Transport>); 4] = [
    (Protocol::OTHER, None),
    (Protocol::TCP, Some(Transport::Tcp)),
    (Protocol::UDP, Some(Transport::Udp)),
    (Protocol::SCTP, Some(Transport::Sctp)),
];

/// A list that is never loaded: traffic with it is refused.
pub(crate) const REFUSED: ListId = ListId(1);

/// The content of a list.
type Content = [Vec<Span>; 4];

/// The meaning of named ports in a rule.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Names<'n> {
    /// These ports.
    Of(&'n NamedPorts<'n>),
    /// Every port of the transport: a Deny with names that cannot be resolved must not allow
    /// anything.
    Every,
}

/// All lists, by id.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    contents: BTreeMap<ListId, Content>,
    entries: BTreeMap<ListId, Vec<(Prefix<PortKey>, Answer)>>,
    /// Ids with two contents.
    pub(crate) collided: BTreeSet<ListId>,
}

impl Lists {
    /// Creates the list of rules that match a peer in everything but the port, each with the
    /// meaning of its named ports. Incomplete if the work limit is reached.
    pub(crate) fn add<'r, 'a: 'r>(
        &mut self,
        rules: impl Iterator<Item = (&'r Ranked<'a>, Names<'r>)> + Clone,
        options: &Options,
        work: &Work,
    ) -> ListId {
        let content: Content = PROTOCOLS.map(|(_, transport)| {
            let mut ranges = Vec::new();
            for (rule, names) in rules.clone() {
                if !work.take(1) {
                    break;
                }
                let answer = rule.answer();
                let mut add = |range: (u16, u16)| ranges.push((range.0, range.1, answer));
                match &rule.rule.ports {
                    None => add(ALL),
                    Some(ports) => {
                        for port in ports {
                            range(port, transport, names).map(&mut add);
                        }
                    }
                }
            }
            spans(&ranges, work)
        });
        let silent = |spans: &Vec<Span>| spans.iter().all(|s| s.answer == Answer::SILENT);
        if content.iter().all(silent) {
            return ListId::NONE;
        }
        let id = ListId(options.ids.id("list", REFUSED.0 + 1, &content));
        match self.contents.get(&id) {
            None => {
                self.entries.insert(id, entries(id, &content));
                self.contents.insert(id, content);
            }
            Some(known) if *known == content => {}
            Some(_) => {
                self.collided.insert(id);
            }
        }
        id
    }

    /// The entries of a list in the map `POLICY_PORTS`.
    pub(crate) fn entries(&self, id: ListId) -> &[(Prefix<PortKey>, Answer)] {
        self.entries.get(&id).map_or(&[], Vec::as_slice)
    }
}

const ALL: (u16, u16) = (0, u16::MAX);

/// The ports of a transport (`None` = a protocol without ports) that an alternative of a rule
/// matches.
fn range(port: &PortMatch, transport: Option<Transport>, names: Names<'_>) -> Option<(u16, u16)> {
    if port.transport.is_some() && port.transport != transport {
        return None;
    }
    match &port.ports {
        PortRange::All => Some(ALL),
        // Without a transport only `All` is meaningful.
        PortRange::Range(..) | PortRange::Named(_) if port.transport.is_none() => None,
        PortRange::Range(first, last) => (first <= last).then_some((*first, *last)),
        PortRange::Named(name) => match names {
            Names::Every => Some(ALL),
            Names::Of(ports) => ports
                .iter()
                .find(|(n, t, _)| n == name && Some(*t) == transport)
                .map(|(_, _, number)| (*number, *number)),
        },
    }
}

fn entries(id: ListId, content: &Content) -> Vec<(Prefix<PortKey>, Answer)> {
    let mut entries = Vec::new();
    for ((protocol, _), spans) in PROTOCOLS.iter().zip(content) {
        for PortPrefix { port, bits, answer } in prefixes(spans) {
            let key = Prefix {
                bits: PortKey::FIXED_BITS + bits,
                data: PortKey::new(id, *protocol, Port::new(port)),
            };
            entries.push((key, answer));
        }
    }
    entries
}
