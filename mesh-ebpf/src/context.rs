// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! Reads and writes of `bpf_sock_addr`, one type for each family: a program may touch only the
//! fields of its own attach type.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_set_retval, bpf_setsockopt, bpf_sk_storage_get,
};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::settings::MARK_MASK;
use mesh_common::{Addr, Endpoint, Port, Protocol};

use crate::tables::EXEMPT;

const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const ECONNREFUSED: i32 = 111;

/// What the kernel does with the call.
pub(crate) const PASS: i32 = 1;
/// The call fails.
pub(crate) const REFUSE: i32 = 0;

/// Reads a field exactly once and at its own width, as the verifier demands of contexts.
macro_rules! read {
    ($from:expr, $($field:tt)+) => {
        // SAFETY: a field of a context that the kernel handed to this program.
        unsafe { core::ptr::read_volatile(&raw const (*$from).$($field)+) }
    };
}
pub(crate) use read;

/// The family of an attach type.
pub(crate) trait Family {
    fn address(ctx: *mut bpf_sock_addr) -> Addr;
    fn set_address(ctx: *mut bpf_sock_addr, addr: &Addr);
}

/// connect4, sendmsg4, recvmsg4, getpeername4.
pub(crate) struct V4;

/// connect6, sendmsg6, recvmsg6, getpeername6: sockets of AF_INET6, v4-mapped addresses included.
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

/// The address and port of the call.
#[inline(always)]
pub(crate) fn endpoint<F: Family>(ctx: &SockAddrContext) -> Endpoint {
    // The field holds the port in network order in its first two bytes.
    let port = read!(ctx.sock_addr, user_port) as u16;
    Endpoint::new(F::address(ctx.sock_addr), Port(port))
}

/// Rewrites the address and port of the call.
#[inline(always)]
pub(crate) fn set_endpoint<F: Family>(ctx: &SockAddrContext, to: &Endpoint) {
    F::set_address(ctx.sock_addr, &to.addr);
    // SAFETY: a writable field of every attach type.
    unsafe { ptr::write_volatile(&raw mut (*ctx.sock_addr).user_port, to.port.0.into()) };
}

/// The protocol of the socket. MPTCP (262) does not fit a byte: its subflows are TCP.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> Protocol {
    match read!(ctx.sock_addr, protocol) {
        6 | 262 => Protocol::TCP,
        17 => Protocol::UDP,
        132 => Protocol::SCTP,
        _ => Protocol::OTHER,
    }
}

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a helper of this program type.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}

/// The socket.
#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: a field of the context.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Whether this is a socket of the agent itself.
#[inline(always)]
pub(crate) fn exempt(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context's own socket.
    let value = unsafe { EXEMPT.get_ptr_mut(ctx) };
    !value.is_null()
}

/// The value of a socket storage, made if asked for.
#[inline(always)]
pub(crate) fn storage<S, T>(map: &'static S, sk: *mut bpf_sock, create: bool) -> *mut T {
    let flags = if create {
        u64::from(BPF_SK_STORAGE_GET_F_CREATE)
    } else {
        0
    };
    let map: *mut c_void = ptr::from_ref(map).cast_mut().cast();
    // SAFETY: `map` is a socket storage of `T`; `sk` was checked or comes from the context.
    unsafe { bpf_sk_storage_get(map, sk.cast(), ptr::null_mut(), flags) }.cast()
}

/// Sets the mesh's bits of the socket's mark, keeping the application's own. Returns whether the
/// socket has them now.
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

/// Lets the call fail with ECONNREFUSED.
#[inline(always)]
pub(crate) fn refuse() -> i32 {
    // SAFETY: a helper of this program type; where it fails the call fails with EPERM.
    let _ = unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
