// SPDX-License-Identifier: Apache-2.0
//! The data path in user space: what the kernel hands to the agent goes through a tunnel to the
//! agent of the other node, and from there to the application.

mod buffers;
mod relay;
mod socket;
#[cfg(test)]
mod testing;
mod tls;
pub mod tunnel;
