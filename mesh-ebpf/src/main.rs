// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The mesh's kernel programs: entry points only.
//!
//! Built for the host this is an empty program, so that `cargo build --workspace` and editors
//! work; what runs in the kernel exists for `target_arch = "bpf"` alone.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        unsafe_code,
        reason = "programs, maps and helpers are raw memory and symbols"
    ),
    deny(unused_results)
)]

#[cfg(target_arch = "bpf")]
mod kernel {
    use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

    /// Lets every connect pass.
    #[cgroup_sock_addr(connect4)]
    fn connect4(_ctx: SockAddrContext) -> i32 {
        1
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
