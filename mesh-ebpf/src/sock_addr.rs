// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Access to `bpf_sock_addr`, the context of the socket address hooks (connect, sendmsg, recvmsg,
//! getpeername). Each family has a type, because a program may access only the fields of its own attach
//! type.

use core::ptr;

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_set_retval, bpf_setsockopt};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::settings::MARK_MASK;
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::tables::EXEMPT;
use crate::volatile::read;

const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const ECONNREFUSED: i32 = 111;

/// The return value by which the system call goes on.
pub(crate) const PASS: i32 = 1;
/// The return value by which the system call fails.
const REFUSE: i32 = 0;

/// The address family of an attach type.
pub(crate) trait Family {
    /// Reads the address of the system call.
    fn address(ctx: *mut bpf_sock_addr) -> Addr;
    /// Replaces the address of the system call.
    fn set_address(ctx: *mut bpf_sock_addr, addr: &Addr);
}

/// The family of connect4, sendmsg4, recvmsg4 and getpeername4.
pub(crate) struct V4;

/// The family of connect6, sendmsg6, recvmsg6 and getpeername6: AF_INET6 sockets, which can also use
/// IPv4-mapped addresses.
pub(crate) struct V6;

impl Family for V4 {
    #[inline(always)]
    fn address(ctx: *mut bpf_sock_addr) -> Addr {
        Addr::from_v4_word(read!(ctx, user_ip4))
    }

    #[inline(always)]
    fn set_address(ctx: *mut bpf_sock_addr, addr: &Addr) {
        if let Some(word) = addr.v4_word() {
            // SAFETY: a writable field of this attach type.
            unsafe { ptr::write_volatile(&raw mut (*ctx).user_ip4, word) };
        }
    }
}

impl Family for V6 {
    #[inline(always)]
    fn address(ctx: *mut bpf_sock_addr) -> Addr {
        Addr::from_words([
            read!(ctx, user_ip6[0]),
            read!(ctx, user_ip6[1]),
            read!(ctx, user_ip6[2]),
            read!(ctx, user_ip6[3]),
        ])
    }

    #[inline(always)]
    fn set_address(ctx: *mut bpf_sock_addr, addr: &Addr) {
        let [a, b, c, d] = addr.words();
        // SAFETY: writable fields of this attach type.
        unsafe {
            ptr::write_volatile(&raw mut (*ctx).user_ip6[0], a);
            ptr::write_volatile(&raw mut (*ctx).user_ip6[1], b);
            ptr::write_volatile(&raw mut (*ctx).user_ip6[2], c);
            ptr::write_volatile(&raw mut (*ctx).user_ip6[3], d);
        }
    }
}

/// Returns the address and port of the system call.
#[inline(always)]
pub(crate) fn endpoint<F: Family>(ctx: &SockAddrContext) -> Endpoint {
    // The field holds the port in network order in its first two bytes.
    let port = read!(ctx.sock_addr, user_port) as u16;
    Endpoint::new(F::address(ctx.sock_addr), Port(port))
}

/// Replaces the address and port of the system call.
#[inline(always)]
pub(crate) fn set_endpoint<F: Family>(ctx: &SockAddrContext, to: &Endpoint) {
    F::set_address(ctx.sock_addr, &to.addr);
    // SAFETY: a writable field of every attach type.
    unsafe { ptr::write_volatile(&raw mut (*ctx.sock_addr).user_port, to.port.0.into()) };
}

/// Returns the socket's protocol. MPTCP (262), which does not fit a byte, is TCP: its subflows are.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> Protocol {
    match read!(ctx.sock_addr, protocol) {
        6 | 262 => Protocol::TCP,
        17 => Protocol::UDP,
        132 => Protocol::SCTP,
        _ => Protocol::OTHER,
    }
}

/// Returns the cookie of the socket's network namespace.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a helper of this program type.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}

/// Returns the socket, which can be null.
#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: a field of the context.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Returns whether the socket is the agent's own.
#[inline(always)]
pub(crate) fn exempt(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context's own socket.
    let value = unsafe { EXEMPT.get_ptr_mut(ctx) };
    !value.is_null()
}

/// Sets the mesh's bits of the socket's mark and keeps the application's. Returns whether the socket now
/// has these bits.
#[inline(always)]
pub(crate) fn set_mark(ctx: &SockAddrContext, bits: u32) -> bool {
    let sk = socket(ctx);
    if sk.is_null() {
        return bits == 0;
    }
    let old = read!(sk, mark);
    let new = (old & !MARK_MASK) | bits;
    if new == old {
        return true;
    }
    let value = (&raw const new).cast_mut().cast();
    // SAFETY: the value is 4 bytes on the stack.
    unsafe { bpf_setsockopt(ctx.sock_addr.cast(), SOL_SOCKET, SO_MARK, value, 4) == 0 }
}

/// Makes the system call fail with ECONNREFUSED.
#[inline(always)]
pub(crate) fn refuse() -> i32 {
    // SAFETY: a helper of this program type. If it fails, the system call fails with EPERM.
    let _ = unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}

/// Returns the socket's own port; 0 = not chosen yet.
#[inline(always)]
pub(crate) fn local_port(ctx: &SockAddrContext) -> Port {
    let sk = socket(ctx);
    if sk.is_null() {
        return Port(0);
    }
    // Host order, 4 bytes wide.
    Port::new(read!(sk, src_port) as u16)
}
