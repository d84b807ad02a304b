// SPDX-License-Identifier: MIT OR GPL-2.0-only OR Apache-2.0
//! The sock_ops hook: one event from each local endpoint of a direct connection when it closes, the
//! service of a captured connection, and the TCP option of tunnels to applications' own ports.
//!
//! The agent itself records the connections that it relays. For those, this hook only stores the
//! service that the application used.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_RB_NO_WAKEUP, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB,
    BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG, BPF_SOCK_OPS_PARSE_HDR_OPT_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_WRITE_HDR_OPT_CB, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG,
    bpf_sock, bpf_tcp_sock,
};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_reserve_hdr_opt, bpf_store_hdr_opt, bpf_tcp_sock as tcp_sock,
};
use aya_ebpf::programs::SockOpsContext;
use mesh_common::counter::Counter;
use mesh_common::event::{Event, closed_by, kind};
use mesh_common::maps::{CapturedKey, ConnectionKey, OLD_ENDED};
use mesh_common::path::{Origin, Peers as _};
use mesh_common::pod::{PodIndex, PodState};
use mesh_common::settings::{MARK_INBOUND, MARK_MASK, TUNNEL_PORT};
use mesh_common::socket::{Exempt, SocketState, TUNNEL_OPTION};
use mesh_common::{Addr, Direction, Endpoint, Port, Protocol, Reason};

use crate::decision::{self, Ask, Decision};
use crate::report::{Hook, add, now, trace};
use crate::tables::{
    self, CAPTURED, EVENTS, EXEMPT, MARKED, OLD_CONNECTIONS, SOCKETS, TUNNELS, Tables, storage,
};
use crate::volatile::read;

/// The return value, which these callbacks ignore.
const DONE: u32 = 1;
const AF_INET: u32 = 2;
const FIN: u32 = 1;
const SYN: u32 = 2;

/// TCP states (Linux, include/net/tcp_states.h).
mod state {
    pub(super) const SYN_SENT: u32 = 2;
    pub(super) const SYN_RECV: u32 = 3;
    pub(super) const FIN_WAIT1: u32 = 4;
    pub(super) const FIN_WAIT2: u32 = 5;
    pub(super) const CLOSE: u32 = 7;
    pub(super) const CLOSE_WAIT: u32 = 8;
    pub(super) const LAST_ACK: u32 = 9;
    pub(super) const CLOSING: u32 = 11;
}

/// Handles the callbacks of the hook.
#[inline(always)]
pub(crate) fn sock_ops(ctx: &SockOpsContext) -> u32 {
    match read!(ctx.ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            if let Some(state) = known(ctx) {
                state.flags |= SocketState::ESTABLISHED;
            } else if ctx.cb_flags() & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG != 0 {
                let rest = ctx.cb_flags() & !BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
                let _ = ctx.set_cb_flags(rest as i32);
            }
        }
        BPF_SOCK_OPS_HDR_OPT_LEN_CB if read!(ctx.ops, skb_tcp_flags) & SYN != 0 => {
            // SAFETY: a helper of this callback. If there is no room, the SYN has no option, and the
            // agent connects to the tunnel port instead.
            let _ = unsafe { bpf_reserve_hdr_opt(ctx.ops, TUNNEL_OPTION.len() as u32, 0) };
        }
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB if read!(ctx.ops, skb_tcp_flags) & SYN != 0 => {
            let option = TUNNEL_OPTION;
            // SAFETY: a helper of this callback, which reads the option's bytes only.
            let _ = unsafe {
                bpf_store_hdr_opt(ctx.ops, option.as_ptr().cast(), option.len() as u32, 0)
            };
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB => {
            if read!(ctx.ops, skb_tcp_flags) & FIN != 0
                && let Some(state) = known(ctx)
            {
                state.flags |= FIN_SEEN;
            }
        }
        BPF_SOCK_OPS_STATE_CB => changed(ctx),
        _ => {}
    }
    DONE
}

/// The flag of a socket that received the peer's FIN after it had sent its own: the last TCP state alone
/// does not tell this.
const FIN_SEEN: u8 = 1 << 7;

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    // SAFETY: a field of the context.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk }
}

#[inline(always)]
fn netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: a helper of this program type.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Returns the hooks' decision about a pod's socket.
#[inline(always)]
fn known(ctx: &SockOpsContext) -> Option<&'static mut SocketState> {
    let sk = socket(ctx);
    if sk.is_null() {
        return None;
    }
    let state = storage::<_, SocketState>(&SOCKETS, sk, false);
    // SAFETY: null or of this type; it lives as long as the socket.
    unsafe { state.as_mut() }
}

/// Enables more callbacks of this socket.
#[inline(always)]
fn watch(ctx: &SockOpsContext, flags: u32) {
    let _ = ctx.set_cb_flags((ctx.cb_flags() | flags) as i32);
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> Endpoint {
    let v4 = read!(ctx.ops, local_ip4);
    let v6 = [
        read!(ctx.ops, local_ip6[0]),
        read!(ctx.ops, local_ip6[1]),
        read!(ctx.ops, local_ip6[2]),
        read!(ctx.ops, local_ip6[3]),
    ];
    Endpoint::new(by_family(ctx, v4, v6), local_port(ctx))
}

#[inline(always)]
fn local_port(ctx: &SockOpsContext) -> Port {
    Port::new(read!(ctx.ops, local_port) as u16)
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Endpoint {
    let v4 = read!(ctx.ops, remote_ip4);
    let v6 = [
        read!(ctx.ops, remote_ip6[0]),
        read!(ctx.ops, remote_ip6[1]),
        read!(ctx.ops, remote_ip6[2]),
        read!(ctx.ops, remote_ip6[3]),
    ];
    // Network order, in the upper half of the word.
    let port = Port((read!(ctx.ops, remote_port) >> 16) as u16);
    Endpoint::new(by_family(ctx, v4, v6), port)
}

/// Returns the address of the socket's family. Callers read both before: reads in branches would become
/// one read through a computed pointer, which the verifier refuses for contexts.
#[inline(always)]
fn by_family(ctx: &SockOpsContext, v4: u32, v6: [u32; 4]) -> Addr {
    if read!(ctx.ops, family) == AF_INET {
        Addr::from_v4_word(v4)
    } else {
        Addr::from_words(v6)
    }
}

/// Handles a socket that sends its SYN.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(state) = known(ctx) else {
        connecting_tunnel(ctx);
        return;
    };
    if state.flags & SocketState::CAPTURED == 0 {
        watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
        return;
    }
    if state.service == Endpoint::NONE {
        return;
    }
    let key = CapturedKey {
        netns_cookie: netns(ctx),
        to: state.backend,
        local_port: local_port(ctx),
        pad: 0,
    };
    let _ = CAPTURED.insert(key, state.service, 0);
}

/// Handles an agent's socket that sends its SYN: the gate is told to pass the tunnel. If the destination
/// is an application's own port, the SYN carries the option for the peer's node.
#[inline(always)]
fn connecting_tunnel(ctx: &SockOpsContext) {
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    let exempt = storage::<_, Exempt>(&EXEMPT, sk, false);
    // SAFETY: null or of this type.
    let Some(exempt) = (unsafe { exempt.as_ref() }) else {
        return;
    };
    if exempt.exempt == Exempt::MARKED {
        add_tunnel(ctx, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
    } else if remote(ctx).port == TUNNEL_PORT {
        add_tunnel(ctx, 0);
    }
}

/// Adds a tunnel to `TUNNELS` until its socket closes.
#[inline(always)]
fn add_tunnel(ctx: &SockOpsContext, flags: u32) {
    let _ = TUNNELS.insert(tuple(ctx), 1, 0);
    watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG | flags);
}

#[inline(always)]
fn tuple(ctx: &SockOpsContext) -> ConnectionKey {
    ConnectionKey {
        local: local(ctx),
        remote: remote(ctx),
    }
}

/// Handles a connection that a socket accepted.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    let exempt = storage::<_, Exempt>(&EXEMPT, sk, false);
    if !exempt.is_null() || read!(sk, mark) & MARK_MASK == MARK_INBOUND {
        return;
    }
    let Some(pod) = tables::pod_by_netns(netns(ctx)) else {
        return;
    };
    let Some(view) = tables::pod(pod).map(|state| &state.view) else {
        return;
    };
    let (here, there) = (local(ctx), remote(ctx));
    // Captured connections, and connections of the pod with itself.
    if !view.owns(&here.addr) || here.addr == there.addr {
        return;
    }
    if here.port == TUNNEL_PORT {
        // The sk_lookup hook gives the tunnel port of an enrolled pod to the agent.
        if view.has(PodState::ENROLLED) {
            add_tunnel(ctx, 0);
        }
        return;
    }
    if tables::is_steered(&here, &there) {
        // In this order, a reader always finds the tunnel in one of the two maps.
        add_tunnel(ctx, 0);
        let _ = MARKED.remove(tuple(ctx));
        return;
    }
    let ask = Ask {
        remote: there,
        pod,
        local_port: here.port,
        protocol: Protocol::TCP,
        origin: Origin::of(view),
    };
    // The sk_lookup hook allowed the connection, but cannot store its decision with the socket.
    let mut decision = Decision::UNDECIDED;
    decision::inbound(&ask, &mut decision);
    let path = &decision.path;
    trace(Hook::Accepted, &ask, path);
    let state = storage::<_, SocketState>(&SOCKETS, sk, true);
    // SAFETY: null or of this type.
    let Some(state) = (unsafe { state.as_mut() }) else {
        return;
    };
    state.rule = path.verdict.rule.0;
    state.set = view.set.0;
    state.start_ns = now();
    state.backend = here;
    state.direction = Direction::Ingress as u8;
    state.plaintext = path.clear as u8;
    state.reason = path.verdict.reason as u8;
    state.flags = SocketState::DECIDED | SocketState::ESTABLISHED;
    state.pod = pod.0;
    watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/// Handles a change of a socket's TCP state.
#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    // SAFETY: the arguments of this callback.
    let (old, new) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_1.args[0]),
            core::ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_1.args[1]),
        )
    };
    if new == state::FIN_WAIT1 {
        watch(ctx, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
    }
    if new != state::CLOSE {
        return;
    }
    let sk = socket(ctx);
    if sk.is_null() {
        return;
    }
    let state = storage::<_, SocketState>(&SOCKETS, sk, false);
    // SAFETY: null or of this type.
    let Some(state) = (unsafe { state.as_ref() }) else {
        // The agent's own socket: a tunnel.
        let _ = TUNNELS.remove(tuple(ctx));
        return;
    };
    // SAFETY: a full socket; the result can be null.
    let tcp = unsafe { tcp_sock(sk) };
    if tcp.is_null() {
        return;
    }
    let (sent, received) = application_bytes(tcp, state, old);
    let there = remote(ctx);
    let plaintext = plaintext_reason(state);
    // Another connection with these endpoints must not be plaintext, but the last acknowledgment of
    // this one is still to be sent, perhaps more than once.
    if let Some(old) = OLD_CONNECTIONS.get_ptr_mut(tuple(ctx)) {
        // SAFETY: the element lives until the program ends.
        unsafe { *old |= OLD_ENDED };
    }
    add(Counter::UnencryptedBytes(plaintext), sent);
    if Tables.local(&there.addr).is_none() {
        add(Counter::UnencryptedBytes(plaintext), received);
    }
    let Some(mut event) = EVENTS.reserve::<Event>(0) else {
        add(Counter::LostEvents, 1);
        return;
    };
    let _ = event.write(Event {
        time_ns: now(),
        start_ns: state.start_ns,
        rule: state.rule,
        sent,
        received,
        local: local(ctx),
        remote: there,
        service: state.service,
        pod: state.pod,
        rtt_us: read!(tcp, srtt_us) >> 3,
        retransmits: read!(tcp, total_retrans),
        kind: kind::CLOSED,
        direction: state.direction,
        protocol: Protocol::TCP.0,
        reason: state.reason,
        plaintext: plaintext as u8,
        closed_by: first_to_close(old, state),
        spare: 0,
        spare_end: 0,
    });
    event.submit(BPF_RB_NO_WAKEUP.into());
}

/// Returns the reason why a connection is plaintext. The pod may have been enrolled after the decision.
#[inline(always)]
fn plaintext_reason(state: &SocketState) -> Reason {
    let reason = Reason::from_code(state.plaintext).unwrap_or(Reason::NoPolicy);
    let enrolled = || {
        let pod = tables::pod(PodIndex(state.pod));
        pod.is_some_and(|pod| pod.view.has(PodState::ENROLLED))
    };
    if reason == Reason::OptedOut && enrolled() {
        Reason::PreEnrolment
    } else {
        reason
    }
}

/// Returns the application bytes sent and received. The kernel's counters include SYN and FIN as one
/// byte each (RFC 9293, 3.4); `old` is the last TCP state.
#[inline(always)]
fn application_bytes(tcp: *mut bpf_tcp_sock, state: &SocketState, old: u32) -> (u64, u64) {
    let mut sent = read!(tcp, bytes_acked);
    let mut received = read!(tcp, bytes_received);
    // The SYN of an accepted connection was acknowledged before the counter started.
    let active = state.direction == Direction::Egress as u8;
    if active && state.flags & SocketState::ESTABLISHED != 0 && sent > 0 {
        sent -= 1;
    }
    let sent_fin = matches!(
        old,
        state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING | state::LAST_ACK
    );
    if sent_fin && sent > 0 && read!(tcp, snd_una) == read!(tcp, snd_nxt) {
        sent -= 1;
    }
    let got_fin = match old {
        state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING => true,
        _ => state.flags & FIN_SEEN != 0,
    };
    if got_fin && received > 0 {
        received -= 1;
    }
    (sent, received)
}

/// Returns the endpoint that closed first, by the last TCP state `old`.
#[inline(always)]
fn first_to_close(old: u32, known: &SocketState) -> u8 {
    match old {
        state::SYN_SENT | state::SYN_RECV => closed_by::FAILED,
        state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING => closed_by::LOCAL,
        state::CLOSE_WAIT | state::LAST_ACK => closed_by::REMOTE,
        _ if known.flags & SocketState::ESTABLISHED == 0 => closed_by::FAILED,
        _ => closed_by::RESET,
    }
}
