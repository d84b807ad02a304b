// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The mesh's kernel programs: entry points only.
//!
//! Built for the host this is an empty program, so that `cargo build --workspace` and editors
//! work; what runs in the kernel exists for `target_arch = "bpf"` alone. A hook reads its context,
//! asks `mesh_common`, and acts; every path ends in a verdict with a reason that is counted.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        clippy::cast_possible_truncation,
        clippy::let_underscore_must_use,
        reason = "contexts hold small numbers in wide fields; what a program cannot help it passes by"
    )
)]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        unsafe_code,
        reason = "programs, maps and helpers are raw memory and symbols"
    ),
    deny(unused_results)
)]

#[cfg(target_arch = "bpf")]
mod audit;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod context;
#[cfg(target_arch = "bpf")]
mod datagram;
#[cfg(target_arch = "bpf")]
mod decision;
#[cfg(target_arch = "bpf")]
mod established;
#[cfg(target_arch = "bpf")]
mod gate;
#[cfg(target_arch = "bpf")]
mod inbound;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod peername;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod tables;
#[cfg(target_arch = "bpf")]
mod udp;

#[cfg(target_arch = "bpf")]
mod kernel {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier, sk_lookup, sock_ops};
    use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, TcContext};

    use crate::context::{V4, V6};
    use crate::{connect, datagram, established, gate, inbound, peername};

    #[cgroup_sock_addr(connect4)]
    fn connect4(ctx: SockAddrContext) -> i32 {
        connect::connect::<V4>(&ctx)
    }

    #[cgroup_sock_addr(connect6)]
    fn connect6(ctx: SockAddrContext) -> i32 {
        connect::connect::<V6>(&ctx)
    }

    #[cgroup_sock_addr(sendmsg4)]
    fn sendmsg4(ctx: SockAddrContext) -> i32 {
        datagram::sendmsg::<V4>(&ctx)
    }

    #[cgroup_sock_addr(sendmsg6)]
    fn sendmsg6(ctx: SockAddrContext) -> i32 {
        datagram::sendmsg::<V6>(&ctx)
    }

    #[cgroup_sock_addr(recvmsg4)]
    fn recvmsg4(ctx: SockAddrContext) -> i32 {
        datagram::recvmsg::<V4>(&ctx)
    }

    #[cgroup_sock_addr(recvmsg6)]
    fn recvmsg6(ctx: SockAddrContext) -> i32 {
        datagram::recvmsg::<V6>(&ctx)
    }

    #[cgroup_sock_addr(getpeername4)]
    fn getpeername4(ctx: SockAddrContext) -> i32 {
        peername::getpeername::<V4>(&ctx)
    }

    #[cgroup_sock_addr(getpeername6)]
    fn getpeername6(ctx: SockAddrContext) -> i32 {
        peername::getpeername::<V6>(&ctx)
    }

    #[sock_ops]
    fn established(ctx: SockOpsContext) -> u32 {
        established::established(&ctx)
    }

    #[sk_lookup]
    fn inbound(ctx: SkLookupContext) -> u32 {
        inbound::inbound(&ctx)
    }

    #[classifier]
    fn gate_from_pod(ctx: TcContext) -> i32 {
        gate::from_pod(&ctx)
    }

    #[classifier]
    fn gate_to_pod(ctx: TcContext) -> i32 {
        gate::to_pod(&ctx)
    }

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
