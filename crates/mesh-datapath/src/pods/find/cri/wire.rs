// SPDX-License-Identifier: Apache-2.0
//! The messages of `runtime.v1.RuntimeService` (the CRI) with the fields that the agent uses.

use std::collections::BTreeMap;

/// The method that lists sandboxes.
pub(super) const LIST: &str = "/runtime.v1.RuntimeService/ListPodSandbox";
/// The method that returns the status of a sandbox.
pub(super) const STATUS: &str = "/runtime.v1.RuntimeService/PodSandboxStatus";

/// `ListPodSandboxRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) filter: Option<Filter>,
}

/// `PodSandboxFilter` without its id.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Filter {
    #[prost(message, optional, tag = "2")]
    pub(super) state: Option<State>,
    /// The labels, all of which must match.
    #[prost(btree_map = "string, string", tag = "3")]
    pub(super) labels: BTreeMap<String, String>,
}

/// `PodSandboxStateValue`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct State {
    #[prost(int32, tag = "1")]
    pub(super) state: i32,
}

impl State {
    /// `SANDBOX_READY`.
    pub(super) const READY: i32 = 0;
}

/// `ListPodSandboxResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) items: Vec<Sandbox>,
}

/// `PodSandbox` with the fields that the agent uses.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Sandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    /// The creation time in nanoseconds.
    #[prost(int64, tag = "4")]
    pub(super) created_at: i64,
}

/// `PodSandboxStatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StatusRequest {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(bool, tag = "2")]
    pub(super) verbose: bool,
}

/// `PodSandboxStatusResponse` with only the runtime's verbose information.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StatusResponse {
    #[prost(btree_map = "string, string", tag = "2")]
    pub(super) info: BTreeMap<String, String>,
}
