// SPDX-License-Identifier: Apache-2.0
//! The table of the agent's metrics, from which the page and the reference are generated.

use std::fmt::Write as _;

use prometheus_client::metrics::MetricType;

/// A family of metrics.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// Name as it is scraped, with `_total` for counters.
    pub name: &'static str,
    /// Type of the metric.
    pub kind: Kind,
    /// Names of the labels.
    pub labels: &'static [&'static str],
    /// Description, without a final period.
    pub help: &'static str,
}

/// Types of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Increases only.
    Counter,
    /// Increases and decreases.
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
        "TCP connections opened. A connection that the proxy does not carry is counted when it closes";
    CLOSED "mesh_tcp_connections_closed_total" Counter WORKLOAD,
        "TCP connections closed, including refused and failed ones: one for each flow record";
    SENT "mesh_tcp_sent_bytes_total" Counter WORKLOAD,
        "Application bytes from source to destination";
    RECEIVED "mesh_tcp_received_bytes_total" Counter WORKLOAD,
        "Application bytes from destination to source";
    FAILED "mesh_tcp_connections_failed_total" Counter &["reporter", "reason"],
        "TCP connections that did not close in order, by reason; docs/reasons.md explains the reasons";
    RETRIED "mesh_tcp_connections_retried_total" Counter &["reason"],
        "Connections retried with another endpoint of their service, by the reason of the first failure";
    SILENT "mesh_policy_silent_refusals_total" Counter &["result"],
        "Captured connections that a policy of the destination refused silently: held, or reset at once because \
         the pod has too many of them (limit)";
    VERDICTS "mesh_policy_verdicts_total" Counter &["direction", "verdict", "reason", "decided_by"],
        "Decisions about connections, datagrams and packets. Those of the kernel survive restarts of the agent";
    AUDIT "mesh_policy_audit_total" Counter &["direction", "rule", "reason"],
        "Connections, UDP flows and packets that passed and that a policy with `mode: Audit` would have \
         refused, by rule; suppressed events are not included";
    UNENCRYPTED "mesh_unencrypted_bytes_total" Counter &["reason"],
        "Bytes of enrolled workloads sent or received as plaintext, by reason";
    HANDSHAKES "mesh_tls_handshakes_total" Counter &["role", "result"],
        "TLS handshakes between agents, by result: ok, or the reason of the failure";
    VIOLATIONS "mesh_tunnel_violations_total" Counter &["role"],
        "Tunnels closed because the peer violated the tunnel protocol; the log names the peer at level debug";
    MARKS_LOST "mesh_tunnel_marks_lost_total" Counter &[],
        "Peers that were reached on port 15008 only and not on the application's port: the network removes the mark of tunnels, or the peer does not support it";
    WORKER_SECONDS "mesh_worker_seconds_total" Counter &["namespace", "workload"],
        "CPU time of the agent's workers for connections and tunnels of pods of this node, including handshakes";
    BUFFER_BYTES "mesh_buffer_bytes" Gauge &["namespace", "workload"],
        "Buffers held by connections of pods of this node";
    EXPIRY "mesh_certificate_expiry_timestamp_seconds" Gauge &["namespace", "service_account"],
        "Expiry of the certificate in use, in seconds since 1970";
    REVOKED "mesh_certificate_revoked" Gauge &["namespace", "service_account"],
        "1 while the certificate in use is revoked and not replaced: peers refuse it";
    CRL_NEXT_UPDATE "mesh_crl_next_update_timestamp_seconds" Gauge &["file"],
        "Next update of a revocation list in use, in seconds since 1970; the list stays in use after that";
    CLOCK_SKEW "mesh_clock_skew_seconds" Gauge &[],
        "Observed lag of this node's clock behind a CA's: the largest time by which an accepted certificate was not valid yet";
    MAP_ENTRIES "mesh_map_entries" Gauge &["map"],
        "Entries of the eBPF maps; MARKED evicts its oldest entry when it is full";
    MAP_CAPACITY "mesh_map_capacity" Gauge &["map"],
        "Capacity of the eBPF maps, in entries";
    PLAN_APPLY "mesh_plan_apply_seconds" Histogram &[],
        "Time from a change of the cluster's state to its enforcement in the kernel";
    REVISION "mesh_policy_revision" Gauge &[],
        "Revision of the policy in force; starts at 1 with each start of the agent";
    STALE "mesh_source_stale" Gauge &[],
        "1 while the source of the cluster's state is unavailable; the last known state stays in force, and /status shows the cause";
    REJECTED "mesh_rejected_fields" Gauge &[],
        "Fields of objects that are rejected now; the log and /status list them";
    PODS "mesh_pods" Gauge &["state"],
        "Pods of this node: enrolled, not_enrolled, or not_protected (no tc gate could be attached); isolated counts \
         those of them whose requested protection cannot be guaranteed or does not fit into a map";
    READY "mesh_ready" Gauge &["condition"],
        "1 if a condition of readiness holds";
    LOST "mesh_flow_events_lost_total" Counter &["at"],
        "Flow records lost in the kernel's ring, or on the way to the flow log";
    SUPPRESSED "mesh_flow_events_suppressed_total" Counter &[],
        "Refused, dropped and audited packets without a flow record, because their pod had too many within one \
         second";
    SERIES "mesh_connection_series" Gauge &[],
        "Label sets of connection metrics in use";
    SERIES_OVERFLOWED "mesh_connection_series_overflowed_total" Counter &[],
        "Connections counted under the labels `other`, because too many label sets are in use";
    PANICS "mesh_panics_total" Counter &[],
        "Tasks that panicked; each is a bug";
    BUILD "mesh_build_info" Gauge &["version"],
        "Always 1";
    CPU "process_cpu_seconds_total" Counter &[],
        "CPU time of the agent";
    RSS "process_resident_memory_bytes" Gauge &[],
        "Memory of the agent";
    FDS "process_open_fds" Gauge &[],
        "Open file descriptors of the agent";
    MAX_FDS "process_max_fds" Gauge &[],
        "Maximum number of open file descriptors of the agent";
    START "process_start_time_seconds" Gauge &[],
        "Start time of the agent, in seconds since 1970";
}

/// Generates the reference of all metrics, as Markdown.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "<!-- Generated from crates/mesh-telemetry/src/metrics/describe.rs; do not edit. -->\n\
         # Metrics of the agent\n\n\
         Served at `/metrics` of the `--metrics` address, as OpenMetrics or Prometheus text. Units are base\n\
         units.\n\n\
         Connection metrics have these labels: `reporter` (`source` or `destination`: the endpoint whose node\n\
         counted; a connection within one node is counted by both), namespace, workload (the owner: a\n\
         Deployment, not its ReplicaSet) and service account of both endpoints, `destination_service`\n\
         (`namespace/name`, empty without one) and `security` (`mutual_tls`, `same_node` or `none`). An\n\
         endpoint that is not a pod has no namespace, and `host`, `remote-node`, `kube-apiserver`, `world`\n\
         or `unknown` as its workload.\n\n",
    );
    let lines = writeln!(
        text,
        "At most {} label sets of connections are kept; further connections count under `other`. A label\n\
         set without an open connection for {} minutes is removed, and starts from 0 when it comes back.\n\n\
         | Metric | Type | Labels | Description |\n\
         |---|---|---|---|",
        super::series::MOST_SERIES,
        super::series::IDLE.as_secs() / 60,
    );
    lines.expect("a String takes everything");
    for one in ALL {
        let labels = if one.labels == WORKLOAD {
            "connection labels".to_owned()
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

/// Generates the reference of all reasons, as Markdown.
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
