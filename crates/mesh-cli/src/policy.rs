// SPDX-License-Identifier: Apache-2.0
//! Policy evaluated from manifests, with the conversion, the compiler and the decision of the agents.

pub(crate) mod diff;
pub(crate) mod explain;
pub(crate) mod matrix;
mod table;
pub(crate) mod test;
mod world;
