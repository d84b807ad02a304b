// SPDX-License-Identifier: Apache-2.0
//! What is used of `runtime.v1.RuntimeService` (the CRI), with its field numbers.

use std::collections::BTreeMap;

/// Lists sandboxes.
pub(super) const LIST: &str = "/runtime.v1.RuntimeService/ListPodSandbox";
/// Tells about one.
pub(super) const STATUS: &str = "/runtime.v1.RuntimeService/PodSandboxStatus";

/// `ListPodSandboxRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) filter: Option<Filter>,
}

/// `PodSandboxFilter`, but for its id.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Filter {
    #[prost(message, optional, tag = "2")]
    pub(super) state: Option<State>,
    /// All must hold.
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

/// `PodSandbox`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Sandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    /// In nanoseconds.
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

/// `PodSandboxStatusResponse`, of which only what the runtime adds is used.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StatusResponse {
    #[prost(btree_map = "string, string", tag = "2")]
    pub(super) info: BTreeMap<String, String>,
}
