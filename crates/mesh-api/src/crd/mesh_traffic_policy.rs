// SPDX-License-Identifier: Apache-2.0
//! The type MeshTrafficPolicy.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::status::PolicyStatus;

/// The message about a MeshTrafficPolicy, in warnings of agents and in its status.
pub const NO_EFFECT: &str = "MeshTrafficPolicy has no effect in this version";

/// MeshTrafficPolicySpec defines how connections to a service are made.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mesh.rs",
    version = "v1alpha1",
    kind = "MeshTrafficPolicy",
    doc = "MeshTrafficPolicy defines how connections to a service are made. It has no effect in this version.",
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
    /// targetRef is the service, in the namespace of the policy.
    pub target_ref: ServiceTarget,
    /// loadBalancing is the algorithm that selects an endpoint. Defaults to Random.
    #[serde(default)]
    pub load_balancing: LoadBalancing,
    /// connections limits the connections to the service.
    #[serde(default)]
    pub connections: Option<ConnectionLimits>,
    /// retry defines how often a failed connection attempt is retried.
    #[serde(default)]
    pub retry: Option<RetryPolicy>,
    /// outlierEjection defines when a failing endpoint is not selected any more.
    #[serde(default)]
    pub outlier_ejection: Option<OutlierEjection>,
}

/// ServiceTarget is a reference to a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceTarget {
    /// name is the name of the service.
    pub name: String,
}

/// LoadBalancing is an algorithm that selects an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LoadBalancing {
    /// Random selects a random endpoint.
    #[default]
    Random,
    /// LeastConnections selects the endpoint with fewer open connections of two random ones.
    LeastConnections,
}

/// ConnectionLimits limits the connections to a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionLimits {
    /// maxPerSource is the largest number of open connections of one source pod to the service.
    pub max_per_source: Option<u32>,
    /// connectTimeoutSeconds is the timeout of a connection attempt, in seconds.
    pub connect_timeout_seconds: Option<u32>,
}

/// RetryPolicy defines how often a failed connection attempt is retried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryPolicy {
    /// attempts is the number of retries after the first attempt.
    pub attempts: u32,
}

/// OutlierEjection defines when a failing endpoint is not selected any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierEjection {
    /// consecutiveFailures is the number of consecutive failures that ejects an endpoint.
    pub consecutive_failures: u32,
    /// baseEjectionSeconds is the duration of an ejection, in seconds.
    pub base_ejection_seconds: u32,
    /// maxEjectedPercent is the largest percentage of ejected endpoints.
    #[schemars(range(min = 0, max = 100))]
    pub max_ejected_percent: u32,
}
