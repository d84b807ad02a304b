// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The ABI of the mesh: every byte that both sides of the kernel boundary agree on, and the
//! decisions that both sides make.
//!
//! `no_std`, no allocation, no I/O, no clock. The kernel programs run [`policy::decide`],
//! [`service::route`] and [`path`] over BPF maps; the agent runs the same functions over its plan;
//! tests run them over a `BTreeMap`. With the feature `user` every type that crosses the boundary
//! proves by derive that it has no padding.

#![cfg_attr(not(feature = "std"), no_std)]
#![cfg_attr(
    feature = "user",
    allow(unnameable_types, reason = "helper types that zerocopy's derives make")
)]

/// Derives what a type needs to be a map key or value, and lets the compiler prove its layout.
macro_rules! abi {
    ($($(#[$meta:meta])* pub struct $name:ident $body:tt)*) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(
            feature = "user",
            derive(
                zerocopy::FromBytes,
                zerocopy::IntoBytes,
                zerocopy::Immutable,
                zerocopy::KnownLayout
            )
        )]
        pub struct $name $body

        // SAFETY: `repr(C)`, made of integers only; `IntoBytes` above proves there is no padding.
        #[cfg(feature = "user")]
        #[allow(unsafe_code, reason = "aya's marker for map keys and values")]
        unsafe impl aya::Pod for $name {}
    )* };
}

/// As [`abi!`], for a transparent number.
macro_rules! abi_id {
    ($($(#[$meta:meta])* pub struct $name:ident(pub $int:ty);)*) => { $(
        $(#[$meta])*
        #[repr(transparent)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(
            feature = "user",
            derive(
                zerocopy::FromBytes,
                zerocopy::IntoBytes,
                zerocopy::Immutable,
                zerocopy::KnownLayout
            )
        )]
        pub struct $name(pub $int);

        // SAFETY: a transparent integer has no padding and any bit pattern is valid.
        #[cfg(feature = "user")]
        #[allow(unsafe_code, reason = "aya's marker for map keys and values")]
        unsafe impl aya::Pod for $name {}
    )* };
}

pub mod addr;
pub mod counter;
pub mod event;
pub mod flow;
pub mod identity;
pub mod maps;
pub mod path;
pub mod pod;
pub mod policy;
pub mod service;
pub mod settings;
pub mod socket;
pub mod verdict;

pub use addr::{Addr, Endpoint, Port, Protocol};
pub use identity::{Evidence, IdentityId, Peer};
pub use pod::PodState;
pub use policy::{Direction, decide};
pub use service::route;
pub use verdict::{Reason, Verdict};
