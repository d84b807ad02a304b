// SPDX-License-Identifier: Apache-2.0
//! The metrics of the controller. docs/controller.md lists them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};

use mesh_telemetry::metrics::{Description, Family, Format, Kind, family, page, process};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::outcome::Outcome;

const REQUESTS: &Description = &Description {
    name: "mesh_ca_requests_total",
    kind: Kind::Counter,
    labels: &["result"],
    help: "Requests for certificates",
};
const ROOTS: &Description = &gauge("mesh_ca_roots", "Roots that are published");
const ROOT_EXPIRY: &Description = &gauge(
    "mesh_ca_root_expiry_timestamp_seconds",
    "When the root that signs ends",
);
const SIGNER_EXPIRY: &Description = &gauge(
    "mesh_ca_signer_expiry_timestamp_seconds",
    "When the intermediate that signs ends",
);
const LEADER: &Description = &gauge(
    "mesh_controller_leader",
    "1 on the replica that holds the lease",
);
const NODES: &Description = &gauge("mesh_controller_nodes", "Nodes that count in status");
const STATUS_WRITES: &Description = &Description {
    name: "mesh_controller_status_writes_total",
    kind: Kind::Counter,
    labels: &["result"],
    help: "Status of policies written, by whether it was accepted",
};

const fn gauge(name: &'static str, help: &'static str) -> Description {
    Description {
        name,
        kind: Kind::Gauge,
        labels: &[],
        help,
    }
}

#[derive(Debug, Default)]
struct Inner {
    requests: [AtomicU64; Outcome::ALL.len()],
    status_writes: AtomicU64,
    status_failures: AtomicU64,
    leader: AtomicBool,
    nodes: AtomicU64,
    roots: AtomicU64,
    root_expiry: AtomicI64,
    signer_expiry: AtomicI64,
}

/// The metrics of the controller. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics(Arc<Inner>);

impl Metrics {
    /// Counts a request for a certificate.
    pub(super) fn request(&self, outcome: Outcome) {
        if let Some(counter) = self.0.requests.get(outcome as usize) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Counts a write of a policy's status.
    pub(super) fn status_write(&self, succeeded: bool) {
        let counter = if succeeded {
            &self.0.status_writes
        } else {
            &self.0.status_failures
        };
        counter.fetch_add(1, Relaxed);
    }

    /// Sets whether this replica holds the lease.
    pub(super) fn leader(&self, leader: bool) {
        self.0.leader.store(leader, Relaxed);
    }

    /// Sets the number of nodes that count in status.
    pub(super) fn nodes(&self, nodes: usize) {
        self.0.nodes.store(nodes as u64, Relaxed);
    }

    /// Sets the number of published roots, and the expiry of root and signing certificate (UNIX time).
    pub(super) fn authority(&self, roots: usize, root_expiry: i64, signer_expiry: i64) {
        self.0.roots.store(roots as u64, Relaxed);
        self.0.root_expiry.store(root_expiry, Relaxed);
        self.0.signer_expiry.store(signer_expiry, Relaxed);
    }

    /// Writes the page of `/metrics`.
    pub(super) fn page(&self, format: Format) -> String {
        page(Page(self.clone()), format)
    }
}

/// The page of `/metrics`.
#[derive(Debug)]
struct Page(Metrics);

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let inner = &*self.0.0;
        let encoder = &mut encoder;
        let mut requests = family(encoder, REQUESTS)?;
        for (outcome, counter) in Outcome::ALL.iter().zip(&inner.requests) {
            results(&mut requests, outcome.label(), counter)?;
        }
        family(encoder, ROOTS)?.gauge(&[], inner.roots.load(Relaxed))?;
        family(encoder, ROOT_EXPIRY)?.gauge(&[], inner.root_expiry.load(Relaxed))?;
        family(encoder, SIGNER_EXPIRY)?.gauge(&[], inner.signer_expiry.load(Relaxed))?;
        family(encoder, LEADER)?.gauge(&[], i64::from(inner.leader.load(Relaxed)))?;
        family(encoder, NODES)?.gauge(&[], inner.nodes.load(Relaxed))?;
        let mut writes = family(encoder, STATUS_WRITES)?;
        results(&mut writes, "done", &inner.status_writes)?;
        results(&mut writes, "failed", &inner.status_failures)?;
        process(encoder)
    }
}

fn results(family: &mut Family<'_>, result: &str, counter: &AtomicU64) -> fmt::Result {
    family.counter(&[("result", result)], counter.load(Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_every_family_with_its_labels_and_help() {
        let metrics = Metrics::default();
        metrics.request(Outcome::Replayed);
        metrics.status_write(true);
        metrics.leader(true);
        metrics.nodes(3);
        metrics.authority(2, 1_900_000_000, 1_800_000_000);
        let page = metrics.page(Format::Prometheus);
        for line in [
            "# HELP mesh_ca_requests_total Requests for certificates",
            "# TYPE mesh_ca_requests_total counter",
            "mesh_ca_requests_total{result=\"issued\"} 0",
            "mesh_ca_requests_total{result=\"replayed\"} 1",
            "# TYPE mesh_ca_roots gauge",
            "mesh_ca_roots 2",
            "mesh_ca_root_expiry_timestamp_seconds 1900000000",
            "mesh_ca_signer_expiry_timestamp_seconds 1800000000",
            "mesh_controller_leader 1",
            "mesh_controller_nodes 3",
            "mesh_controller_status_writes_total{result=\"done\"} 1",
            "mesh_controller_status_writes_total{result=\"failed\"} 0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
        assert!(page.contains("\nprocess_open_fds "));
    }
}
