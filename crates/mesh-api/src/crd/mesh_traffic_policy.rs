// SPDX-License-Identifier: Apache-2.0
//! MeshTrafficPolicy.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::status::PolicyStatus;

/// How connections to one service are made.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshTrafficPolicy",
    doc = "How connections to one service are made. This version does not act on it.",
    namespaced,
    status = "PolicyStatus",
    derive = "PartialEq",
    plural = "meshtrafficpolicies",
    shortname = "mtp",
    category = "mesh",
    printcolumn(name = "Service", type_ = "string", json_path = ".spec.targetRef.name")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshTrafficPolicySpec {
    /// The service, in the policy's namespace.
    pub target_ref: ServiceTarget,
    /// How an endpoint is chosen. Default: Random.
    #[serde(default)]
    pub load_balancing: LoadBalancing,
    /// Limits of open connections.
    #[serde(default)]
    pub connections: Option<ConnectionLimits>,
    /// When and how often connecting is tried again.
    #[serde(default)]
    pub retry: Option<RetryPolicy>,
    /// When an endpoint that fails is left out.
    #[serde(default)]
    pub outlier_ejection: Option<OutlierEjection>,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceTarget {
    /// Its name.
    pub name: String,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LoadBalancing {
    /// By chance.
    #[default]
    Random,
    /// The one with fewer open connections, of two taken by chance.
    LeastConnections,
}

/// Limits of open connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionLimits {
    /// Of one source pod to the service.
    pub max_per_source: Option<u32>,
    /// Seconds until connecting to an endpoint counts as failed.
    pub connect_timeout_seconds: Option<u32>,
}

/// When and how often connecting is tried again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryPolicy {
    /// How often, beside the first time.
    pub attempts: u32,
}

/// When an endpoint that fails is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierEjection {
    /// After how many failures in a row.
    pub consecutive_failures: u32,
    /// For how many seconds.
    pub base_ejection_seconds: u32,
    /// At most how many per cent of the endpoints.
    #[schemars(range(min = 0, max = 100))]
    pub max_ejected_percent: u32,
}
