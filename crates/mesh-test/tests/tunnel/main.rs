// SPDX-License-Identifier: Apache-2.0
//! Connections through tunnels: what applications, the wire, hostile peers and the records see.

mod application_port;
mod close_reasons;
mod cpu_affinity;
mod fair_scheduling;
mod flow_records;
mod handshake_flood;
mod hostile_peers;
mod interoperability;
mod plaintext_metrics;
mod relay;
mod transparency;
mod unreachable_endpoints;
