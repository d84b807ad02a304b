// SPDX-License-Identifier: Apache-2.0
//! The mesh's Kubernetes kinds, and the door from manifests to facts.
//!
//! [`manifests`] reads YAML and JSON, [`crd`] has the mesh's own kinds, [`convert()`] turns objects
//! of every kind into a [`mesh_plan::Cluster`] or says by object and field why it cannot, [`truth`]
//! reads tables of what must hold in a cluster. Nothing here does I/O, keeps state or knows a
//! Kubernetes client.

pub mod convert;
pub mod crd;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod manifests;
pub mod truth;

pub use convert::{Facts, LastGood, Object, Options, Outcome, Warning, convert};
