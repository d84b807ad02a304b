// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! getpeername(): the application sees the service that it connected to.

use aya_ebpf::programs::SockAddrContext;

use crate::context::{Family, PASS, endpoint};
use crate::datagram::connected;

/// The hooks getpeername4 and getpeername6.
#[inline(always)]
pub(crate) fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    connected::<F>(ctx, &endpoint::<F>(ctx));
    PASS
}
