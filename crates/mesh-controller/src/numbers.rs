// SPDX-License-Identifier: Apache-2.0
//! What the controller counts, and how a page of it looks. The names are in docs/controller.md.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// Name, kind and help of a metric, and its rows of labels and value.
type Family = (&'static str, &'static str, &'static str, Vec<(String, i64)>);

/// What came of a request for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Issued,
    /// No token, or one that the API server does not know.
    Unauthenticated,
    /// A token for somebody else than this CA.
    WrongAudience,
    /// A token of another account than the agents'.
    NotAnAgent,
    /// A token that says no node.
    NotBound,
    /// No identity, or one that is none.
    NoIdentity,
    /// An identity of another trust domain.
    ForeignIdentity,
    /// No pod of that service account runs on the caller's node.
    NotOnNode,
    /// The request is longer than any real one.
    Oversized,
    /// The request is none, or not signed with its own key.
    Malformed,
    /// A key that is too short, or of a kind that is not known.
    WeakKey,
    /// A key that was certified before.
    Replayed,
    /// More requests than an agent ever needs.
    RateLimited,
    /// The API server does not answer, or the CA has no root yet.
    Unavailable,
}

impl Outcome {
    const ALL: [Self; 14] = [
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

    /// As in metrics and logs.
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

#[derive(Debug, Default)]
struct All {
    requests: [AtomicU64; Outcome::ALL.len()],
    status_writes: AtomicU64,
    status_failures: AtomicU64,
    leader: AtomicU64,
    nodes: AtomicU64,
    roots: AtomicU64,
    root_expiry: AtomicI64,
    signer_expiry: AtomicI64,
}

/// The numbers; clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers(Arc<All>);

impl Numbers {
    pub(super) fn request(&self, outcome: Outcome) {
        let place = Outcome::ALL.iter().position(|one| *one == outcome);
        if let Some(counter) = place.and_then(|place| self.0.requests.get(place)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn status_write(&self, done: bool) {
        let counter = if done {
            &self.0.status_writes
        } else {
            &self.0.status_failures
        };
        counter.fetch_add(1, Relaxed);
    }

    pub(super) fn leads(&self, leads: bool) {
        self.0.leader.store(leads.into(), Relaxed);
    }

    pub(super) fn nodes(&self, nodes: usize) {
        self.0.nodes.store(nodes as u64, Relaxed);
    }

    /// How many roots are published, and until when root and signing certificate hold (UNIX time).
    pub(super) fn authority(&self, roots: usize, root_expiry: i64, signer_expiry: i64) {
        self.0.roots.store(roots as u64, Relaxed);
        self.0.root_expiry.store(root_expiry, Relaxed);
        self.0.signer_expiry.store(signer_expiry, Relaxed);
    }

    /// The page of `/metrics`.
    pub(super) fn page(&self) -> String {
        let mut page = String::new();
        for (name, kind, help, rows) in self.families() {
            let head = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            head.expect("a String takes everything");
            for (labels, value) in rows {
                writeln!(page, "{name}{labels} {value}").expect("a String takes everything");
            }
        }
        page
    }

    fn families(&self) -> Vec<Family> {
        let all = &self.0;
        let count = |counter: &AtomicU64| i64::try_from(counter.load(Relaxed)).unwrap_or(i64::MAX);
        let one = |value: i64| vec![(String::new(), value)];
        let gauge = |name, help, value| (name, "gauge", help, one(value));
        let result = |label: &str, counter| (format!("{{result=\"{label}\"}}"), count(counter));
        let requests = Outcome::ALL.iter().zip(&all.requests);
        let requests = requests.map(|(outcome, counter)| result(outcome.label(), counter));
        let writes = vec![
            result("done", &all.status_writes),
            result("failed", &all.status_failures),
        ];
        vec![
            (
                "mesh_ca_requests_total",
                "counter",
                "Requests for certificates.",
                requests.collect(),
            ),
            gauge(
                "mesh_ca_roots",
                "Roots that are published.",
                count(&all.roots),
            ),
            gauge(
                "mesh_ca_root_expiry_timestamp_seconds",
                "When the root that signs ends.",
                all.root_expiry.load(Relaxed),
            ),
            gauge(
                "mesh_ca_signer_expiry_timestamp_seconds",
                "When the intermediate that signs ends.",
                all.signer_expiry.load(Relaxed),
            ),
            gauge(
                "mesh_controller_leader",
                "1 on the replica that holds the lease.",
                count(&all.leader),
            ),
            gauge(
                "mesh_controller_nodes",
                "Nodes that count in status.",
                count(&all.nodes),
            ),
            (
                "mesh_controller_status_writes_total",
                "counter",
                "Status of policies written, by whether it was accepted.",
                writes,
            ),
        ]
    }
}
