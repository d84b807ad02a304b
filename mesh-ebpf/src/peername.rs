// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The getpeername() hook: the application sees the service that it connected to.

use aya_ebpf::programs::SockAddrContext;

use crate::sendmsg::show_service;
use crate::sock_addr::{Family, PASS, endpoint};

/// Handles the hooks getpeername4 and getpeername6.
#[inline(always)]
pub(crate) fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    show_service::<F>(ctx, &endpoint::<F>(ctx));
    PASS
}
