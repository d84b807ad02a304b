// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The entry points of the mesh's kernel programs.
//!
//! Each hook has a module: it reads its context, calls the decision functions of `mesh_common`, and
//! acts. Every path ends in a counted verdict with a reason. Only `target_arch = "bpf"` has the
//! programs; built for the host this is an empty program, so that `cargo build --workspace` and
//! editors work.
//!
//! The names of programs are part of the pins' names (`link_established` and so on): an agent that
//! takes over replaces the programs of its predecessor by these names, so they stay.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        clippy::cast_possible_truncation,
        clippy::let_underscore_must_use,
        reason = "contexts hold small numbers in wide fields; a program cannot handle every failure"
    )
)]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        unsafe_code,
        reason = "programs, maps and helpers use raw memory and symbols"
    ),
    deny(unused_results)
)]

#[cfg(target_arch = "bpf")]
mod audit;
#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod decision;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod peername;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod sendmsg;
#[cfg(target_arch = "bpf")]
mod sk_lookup;
#[cfg(target_arch = "bpf")]
mod sock_addr;
#[cfg(target_arch = "bpf")]
mod sock_ops;
#[cfg(target_arch = "bpf")]
mod tables;
#[cfg(target_arch = "bpf")]
mod tc;
#[cfg(target_arch = "bpf")]
mod udp_flows;
#[cfg(target_arch = "bpf")]
mod volatile;

#[cfg(target_arch = "bpf")]
mod kernel {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier, sk_lookup, sock_ops};
    use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, TcContext};

    use crate::sock_addr::{V4, V6};
    use crate::{connect, peername, sendmsg, sk_lookup, sock_ops, tc};

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
        sendmsg::sendmsg::<V4>(&ctx)
    }

    #[cgroup_sock_addr(sendmsg6)]
    fn sendmsg6(ctx: SockAddrContext) -> i32 {
        sendmsg::sendmsg::<V6>(&ctx)
    }

    #[cgroup_sock_addr(recvmsg4)]
    fn recvmsg4(ctx: SockAddrContext) -> i32 {
        sendmsg::recvmsg::<V4>(&ctx)
    }

    #[cgroup_sock_addr(recvmsg6)]
    fn recvmsg6(ctx: SockAddrContext) -> i32 {
        sendmsg::recvmsg::<V6>(&ctx)
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
        sock_ops::sock_ops(&ctx)
    }

    #[sk_lookup]
    fn inbound(ctx: SkLookupContext) -> u32 {
        sk_lookup::sk_lookup(&ctx)
    }

    #[classifier]
    fn gate_from_pod(ctx: TcContext) -> i32 {
        tc::from_pod(&ctx)
    }

    #[classifier]
    fn gate_to_pod(ctx: TcContext) -> i32 {
        tc::to_pod(&ctx)
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
