// SPDX-License-Identifier: Apache-2.0
//! The state of a node and its pods, and that it fails closed: pods that come and go,
//! services, restarts, and attempts to get around it.

mod bypass;
mod churn;
mod cni_conflicts;
mod enrollment;
mod map_overflow;
mod node;
mod restart;
mod services;
