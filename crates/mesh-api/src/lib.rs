// SPDX-License-Identifier: Apache-2.0
//! The mesh's Kubernetes API: the custom kinds, and the conversion of manifests to a cluster snapshot.
//!
//! [`manifests`] reads YAML and JSON, [`crd`] defines the mesh's own kinds, [`Kind`] lists every kind
//! that the mesh reads, [`convert()`] converts objects to a [`mesh_plan::ClusterSnapshot`] or rejects them by
//! object and field, and [`truth`] reads tables of expected connections. This crate does no I/O, keeps
//! no state and has no Kubernetes client.

#![forbid(unsafe_code)]

pub mod convert;
pub mod crd;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod manifests;
mod pruned;
pub mod truth;

pub use convert::{
    IncrementalConverter, Kind, LastGood, Object, Options, Origin, Outcome, Scope, Warning, convert,
};
