// SPDX-License-Identifier: Apache-2.0
//! The mesh against a real Kubernetes control plane: the agent, the controller, the CRDs and what is
//! installed.

mod agent;
mod ca;
mod controller;
mod crds;
mod install;
mod servers;
