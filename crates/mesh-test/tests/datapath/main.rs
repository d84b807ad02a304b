// SPDX-License-Identifier: Apache-2.0
//! What the agent makes on a node and in its pods, and what keeps it closed: pods that come and go,
//! services, restarts, and attempts to get around it.

mod bypass;
mod churn;
mod cni_conflicts;
mod enrollment;
mod map_overflow;
mod node;
mod restart;
mod services;
