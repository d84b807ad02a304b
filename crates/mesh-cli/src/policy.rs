// SPDX-License-Identifier: Apache-2.0
//! Policy from manifests: the agents' own conversion, compiler and decision, without an agent.

pub(crate) mod diff;
pub(crate) mod explain;
mod index;
pub(crate) mod matrix;
mod table;
pub(crate) mod test;
mod world;
