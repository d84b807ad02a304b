// SPDX-License-Identifier: Apache-2.0
//! The one table of metrics: what the page holds and what the documentation says.

use std::fmt::Write as _;

use prometheus_client::metrics::MetricType;

/// A family of metrics.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The name as it is scraped, `_total` of counters included.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it counts, without a final period.
    pub help: &'static str,
}

/// Types of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows while its series lives.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

impl Kind {
    const fn label(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }

    pub(super) const fn metric_type(self) -> MetricType {
        match self {
            Self::Counter => MetricType::Counter,
            Self::Gauge => MetricType::Gauge,
            Self::Histogram => MetricType::Histogram,
        }
    }
}

/// The labels of connections.
pub(super) const WORKLOAD: &[&str] = &[
    "reporter",
    "source_namespace",
    "source_workload",
    "source_service_account",
    "destination_namespace",
    "destination_workload",
    "destination_service_account",
    "destination_service",
    "security",
];

macro_rules! descriptions {
    ($($id:ident $name:literal $kind:ident $labels:expr, $help:literal;)*) => {
        $(pub(super) const $id: &Description = &Description {
            name: $name,
            kind: Kind::$kind,
            labels: $labels,
            help: $help,
        };)*

        /// Every family, in the order of the page.
        pub const ALL: &[&Description] = &[$($id,)*];
    };
}

descriptions! {
    OPENED "mesh_tcp_connections_opened_total" Counter WORKLOAD,
        "TCP connections opened. One of the kernel's, which no proxy carries, is counted when it ends";
    CLOSED "mesh_tcp_connections_closed_total" Counter WORKLOAD,
        "TCP connections that ended, refused and failed ones included: one for each record";
    SENT "mesh_tcp_sent_bytes_total" Counter WORKLOAD,
        "Application bytes from source to destination";
    RECEIVED "mesh_tcp_received_bytes_total" Counter WORKLOAD,
        "Application bytes from destination to source";
    FAILED "mesh_tcp_connections_failed_total" Counter &["reporter", "reason"],
        "TCP connections that did not end in order, by reason; docs/reasons.md explains them";
    RETRIED "mesh_tcp_connections_retried_total" Counter &["reason"],
        "Times a connection was made to another endpoint of its service because one could not be connected to";
    SILENT "mesh_policy_silent_refusals_total" Counter &["result"],
        "Captured connections that a policy at the other end refused with silence: held, or reset at once because \
         the pod has too many of them (limit)";
    VERDICTS "mesh_policy_verdicts_total" Counter &["direction", "verdict", "reason", "decided_by"],
        "Decisions about connections, datagrams and packets. The kernel's survive restarts of the agent";
    AUDIT "mesh_policy_audit_total" Counter &["direction", "rule", "reason"],
        "Connections, UDP flows and packets that passed and that a policy with `mode: Audit` would have \
         refused, by its rule; those of suppressed events are not in it";
    UNENCRYPTED "mesh_unencrypted_bytes_total" Counter &["reason"],
        "Bytes of enrolled workloads that were not under mTLS, by reason";
    HANDSHAKES "mesh_tls_handshakes_total" Counter &["role", "result"],
        "TLS handshakes between agents: ok, or the reason of the failure";
    VIOLATIONS "mesh_tunnel_violations_total" Counter &["role"],
        "Tunnels that ended because the peer broke their protocol, in a stream or between two; at level debug the log names the peer";
    MARKS_LOST "mesh_tunnel_marks_lost_total" Counter &[],
        "Times a peer was not reached as a tunnel on an application's own port, but on 15008: the network takes the mark away, or the peer does not know it";
    WORKER_SECONDS "mesh_worker_seconds_total" Counter &["namespace", "workload"],
        "Time of the agent's workers spent on connections and tunnels of pods of this node, handshakes included";
    BUFFER_BYTES "mesh_buffer_bytes" Gauge &["namespace", "workload"],
        "Buffers that connections of pods of this node hold";
    EXPIRY "mesh_certificate_expiry_timestamp_seconds" Gauge &["namespace", "service_account"],
        "When the certificate in use expires, in seconds since 1970";
    REVOKED "mesh_certificate_revoked" Gauge &["namespace", "service_account"],
        "1 while a CA has revoked the certificate in use, and there is no other yet: peers refuse it";
    CRL_NEXT_UPDATE "mesh_crl_next_update_timestamp_seconds" Gauge &["file"],
        "When a revocation list in use promises to be replaced, in seconds since 1970; it counts after that too";
    CLOCK_SKEW "mesh_clock_skew_seconds" Gauge &[],
        "By how much this node's clock was seen to be behind that of a CA: the most by which a certificate that was believed lay in the future";
    MAP_ENTRIES "mesh_map_entries" Gauge &["map"],
        "Entries of the kernel's maps; MARKED forgets its oldest when it is full";
    MAP_CAPACITY "mesh_map_capacity" Gauge &["map"],
        "Entries that the kernel's maps can hold";
    PLAN_APPLY "mesh_plan_apply_seconds" Histogram &[],
        "Time from a change of the cluster's state to its being in force in the kernel";
    REVISION "mesh_policy_revision" Gauge &[],
        "Number of the plan in force, from 1 at the start of the agent";
    STALE "mesh_source_stale" Gauge &[],
        "1 while the source of the cluster's state cannot be followed; what was known last stays in force, and /status says why";
    REJECTED "mesh_rejected_fields" Gauge &[],
        "Parts of objects that are rejected now; the log and /status name them";
    PODS "mesh_pods" Gauge &["state"],
        "Pods of this node: enrolled, not_enrolled, or not_protected (no gate could be attached); isolated are \
         those of them that are cut off, because what is asked for cannot be guaranteed or does not fit into a map";
    READY "mesh_ready" Gauge &["condition"],
        "1 if a condition of readiness holds";
    LOST "mesh_flow_events_lost_total" Counter &["at"],
        "Records of connections that were lost: in the kernel's ring, or on the way to the flow log";
    SUPPRESSED "mesh_flow_events_suppressed_total" Counter &[],
        "Refused, dropped and audited packets that got no record, because their pod had too many in one \
         second";
    SERIES "mesh_connection_series" Gauge &[],
        "Label sets of connection metrics in use";
    SERIES_OVERFLOWED "mesh_connection_series_overflowed_total" Counter &[],
        "Connections counted under the labels `other`, because too many label sets are in use";
    PANICS "mesh_panics_total" Counter &[],
        "Tasks that panicked; each is a defect";
    BUILD "mesh_build_info" Gauge &["version"],
        "Always 1";
    CPU "process_cpu_seconds_total" Counter &[],
        "CPU time of the agent";
    RSS "process_resident_memory_bytes" Gauge &[],
        "Memory of the agent";
    FDS "process_open_fds" Gauge &[],
        "Open descriptors of the agent";
    MAX_FDS "process_max_fds" Gauge &[],
        "Most descriptors the agent may open";
    START "process_start_time_seconds" Gauge &[],
        "When the agent started, in seconds since 1970";
}

/// The reference of all metrics, as Markdown.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "<!-- Generated from mesh-agent/src/metrics/describe.rs; do not edit. -->\n\
         # Metrics of the agent\n\n\
         Served at `/metrics` of the `--metrics` address, as OpenMetrics or Prometheus text. Units are base\n\
         units.\n\n\
         Connections carry these labels: `reporter` (`source` or `destination`: which end's node counted\n\
         it; a connection inside one node is counted by both), namespace, workload (the owner: a\n\
         Deployment, not its ReplicaSet) and service account of both ends, `destination_service`\n\
         (`namespace/name`, empty without one) and `security` (`mutual_tls`, `same_node` or `none`). An end\n\
         that is no pod has no namespace, and `host`, `remote-node`, `kube-apiserver`, `world` or `unknown`\n\
         as its workload.\n\n",
    );
    let lines = writeln!(
        text,
        "At most {} label sets of connections are kept; beyond that connections count under `other`. A\n\
         label set without an open connection for {} minutes is forgotten, and starts from 0 when it\n\
         comes back.\n\n\
         | Metric | Type | Labels | What it is |\n\
         |---|---|---|---|",
        super::series::MOST_SERIES,
        super::series::IDLE.as_secs() / 60,
    );
    lines.expect("a String takes everything");
    for one in ALL {
        let labels = if one.labels == WORKLOAD {
            "those of connections".to_owned()
        } else {
            one.labels
                .iter()
                .map(|label| format!("`{label}`"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let line = writeln!(
            text,
            "| `{}` | {} | {labels} | {}. |",
            one.name,
            one.kind.label(),
            one.help
        );
        line.expect("a String takes everything");
    }
    text
}

/// The reference of all reasons, as Markdown.
#[must_use]
pub fn reasons() -> String {
    let mut text = String::from(
        "<!-- Generated from mesh-common/src/verdict.rs; do not edit. -->\n\
         # Reasons\n\n\
         Why something was allowed, refused, ended or sent in clear: the label `reason` of metrics, and the\n\
         fields `reason`, `clear` and `close` of records. `close` can also be `finished`, `reset` (an end\n\
         reset the connection) and `aborted` (a defect of the agent: see `mesh_panics_total`).\n\n\
         | Code | Label | What it means, and what to check |\n\
         |---|---|---|\n",
    );
    for reason in mesh_common::Reason::ALL {
        let line = writeln!(
            text,
            "| {} | `{}` | {} |",
            *reason as u8,
            reason.label(),
            reason.help()
        );
        line.expect("a String takes everything");
    }
    text
}
