// SPDX-License-Identifier: Apache-2.0
//! Serves tunnels of other agents. The peer proves its identity; policy decides each connection by that
//! identity and the real port; the connection is relayed to the application from the client's own address
//! and port.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use mesh_common::path::tunnelled;
use mesh_common::{
    Addr, Direction, Endpoint, Evidence, IdentityId, PodState, Port, Reason, Verdict,
};
use mesh_datapath::pods::PodHandle;
use mesh_identity::{Proof, Refusal, SpiffeId};
use mesh_plan::Index;
use mesh_telemetry::metrics::Role;
use mesh_telemetry::record::{
    Close, ClosedBy, ConnectionOpen, ConnectionRecord, Reporter, Security,
};
use mesh_tunnel::frame::{Cause, CloseReason, Open, StreamId};
use mesh_tunnel::relay::{Outcome, Relay, cause};
use mesh_tunnel::tls::{self, HandshakeError, SecureConnection};
use mesh_tunnel::{Carrier as _, CarrierError as _, Socket, Tunnel, TunnelError};
use tokio::time::{Instant as Deadline, timeout, timeout_at};

use super::connection_registry::{ConnectionEntry, DecisionInput};
use super::handshake_scheduler::{self, PodHandshakes};
use super::outbound::{HandshakeFailure, reset, text};
use super::pod_sockets::Connecting;
use super::traffic::{Traffic, transport};
use super::worker::{Job, PodResources, Worker};
use crate::control::InForce;

/// Serves a tunnel from its acceptance to its end.
pub(crate) async fn serve(worker: &Rc<Worker>, job: Job, socket: Socket) {
    let Job {
        resources,
        slot: _slot,
        kind,
    } = job;
    let (Ok(addresses), Some(pod)) = (
        worker.sockets.addresses(&socket),
        worker.pod(&resources.uid),
    ) else {
        return;
    };
    let from = Endpoint::from(addresses.peer);
    let Some(unproven) = resources.admission.arrived(from.addr) else {
        super::listener::refuse(worker, kind, &socket);
        return;
    };
    let entry = worker.connections.register(&resources.uid);
    let proven = async {
        // A connection that has sent nothing holds no permit.
        socket.readable().await.map_err(HandshakeError::from)?;
        let admitted = resources.admission.accept(&unproven).await;
        let proven = prove(worker, &resources, &socket).await;
        drop(admitted);
        proven
    };
    let proven = timeout(worker.timing.handshake, proven);
    let proven = tokio::select! {
        biased;
        _why = entry.terminated() => return,
        proven = proven => proven.unwrap_or(Err(HandshakeFailure::Refused(Refusal::Timeout))),
    };
    drop(unproven);
    let refused = |failure: &HandshakeFailure| failure.refusal().label();
    let result = proven.as_ref().map(|_| ()).map_err(refused);
    worker.metrics().handshake(Role::Server, result);
    let (secured, proof) = match proven {
        Ok(proven) => proven,
        Err(failure) => {
            tracing::debug!(%from, uid = %resources.uid, %failure, "tunnel refused");
            return;
        }
    };
    drop(pod);
    entry.set_proof(&proof);
    let serving = Serving {
        worker,
        uid: &resources.uid,
        pod: handshake_scheduler::number(&resources.uid),
        port: Endpoint::from(addresses.local).port,
        from: from.addr,
        text: text(&proof.id),
        peer: &proof.id,
        proof: &proof,
        entry: &entry,
    };
    let mut tunnel = Tunnel::new(socket, secured, worker.buffer_account(&resources));
    match serving.run(&mut tunnel).await {
        Ok(()) | Err(TunnelError::Closed) => {}
        Err(error) => {
            tracing::debug!(%from, peer = %serving.peer, %error, "tunnel failed");
            if error.is_violation() {
                worker.metrics().violated(Role::Server);
            }
        }
    }
    drop(serving);
    drop(entry);
    tunnel.close().await;
}

async fn prove(
    worker: &Worker,
    resources: &PodResources,
    socket: &Socket,
) -> Result<(SecureConnection, Rc<Proof>), HandshakeFailure> {
    let own = worker
        .own_identity(&resources.uid)
        .ok_or(HandshakeFailure::Refused(Refusal::Failed))?;
    let config = worker.identities.server(&own)?;
    let verify =
        |connection: &_| Ok::<_, HandshakeFailure>(Rc::new(worker.identities.peer(connection)?));
    let cpu = PodHandshakes::new(&worker.handshakes, &resources.uid);
    tls::accept(socket, &cpu, config, verify).await
}

/// A tunnel whose peer has proven its identity.
struct Serving<'a> {
    worker: &'a Rc<Worker>,
    uid: &'a str,
    /// The pod, for the scheduler of its worker's time.
    pod: u64,
    /// The port that the tunnel was opened to.
    port: Port,
    from: Addr,
    peer: &'a SpiffeId,
    proof: &'a Proof,
    text: Arc<str>,
    entry: &'a ConnectionEntry,
}

/// A request that is refused.
struct Refused {
    /// The reason that the peer receives.
    reason: CloseReason,
    close: Close,
    verdict: Verdict,
}

impl Refused {
    /// A refusal by a decision.
    fn decided(verdict: Verdict) -> Self {
        Self {
            reason: CloseReason {
                rule: verdict.rule,
                ..CloseReason::new(verdict.reason)
            },
            close: Close::Refused(verdict),
            verdict,
        }
    }
}

/// The decision about a request.
struct Allowed {
    verdict: Verdict,
    /// The refusal by policies in audit mode.
    audit: Option<Verdict>,
    /// Whether the client must see silence if the pod's policy refuses.
    silent: bool,
    id: IdentityId,
}

impl Serving<'_> {
    /// Serves one stream after another.
    async fn run(&self, tunnel: &mut Tunnel) -> Result<(), TunnelError> {
        loop {
            self.entry.set_idle(true);
            let next = tokio::select! {
                biased;
                _why = self.entry.terminated() => return Ok(()),
                next = timeout(self.worker.timing.tunnel_idle, tunnel.accept()) => next,
            };
            let Ok(next) = next else {
                return Ok(());
            };
            let Some((stream, request)) = next? else {
                return Ok(());
            };
            // No answer: the client opens the stream again with a valid certificate, if it has one.
            if !self.is_proven() {
                return Ok(());
            }
            self.entry.set_idle(false);
            let may_continue = self.stream(tunnel, stream, request).await;
            self.entry.set_input(None);
            if !may_continue || self.worker.draining.get() {
                return Ok(());
            }
        }
    }

    /// Whether the tunnel's certificates are still valid.
    fn is_proven(&self) -> bool {
        self.worker
            .own_identity(self.uid)
            .is_some_and(|own| self.worker.identities.stands(&own, self.proof))
    }

    /// Serves one stream; returns whether the tunnel may carry another.
    async fn stream(&self, tunnel: &mut Tunnel, stream: StreamId, open: Open) -> bool {
        let Some(pod) = self.worker.pod(self.uid) else {
            return false;
        };
        let outcome = tokio::select! {
            biased;
            // A deleted pod does not wait for a policy: its namespace would stay until then.
            why = self.entry.terminated() => Err(Refused::decided(Verdict::refuse(why.reason()))),
            outcome = self.admit(&pod, &open) => outcome,
        };
        drop(pod);
        let verdict = match &outcome {
            Ok((verdict, _app)) => verdict,
            Err(refused) => &refused.verdict,
        };
        self.worker.metrics().verdict(Direction::Ingress, verdict);
        let mut record = self.record(&open, *verdict);
        match outcome {
            Ok((_verdict, app)) => self.carry(tunnel, stream, &app, record).await,
            Err(refused) => {
                tunnel.refuse(stream, &refused.reason);
                record.set_cause(refused.reason.cause.label());
                record.finish(refused.close);
                true
            }
        }
    }

    /// Decides a request, and connects to the application.
    async fn admit(&self, pod: &PodHandle, open: &Open) -> Result<(Verdict, Socket), Refused> {
        let known = async {
            let mut in_force = self.worker.in_force.clone();
            let until = Deadline::now() + self.worker.timing.unknown_peer;
            loop {
                let plan = Arc::clone(&in_force.borrow_and_update().plan);
                let is_newer = |now: &Arc<InForce>| !Arc::ptr_eq(&now.plan, &plan);
                match self.decide(&plan, open) {
                    // This node may learn of a pod of another node a moment later than that node.
                    Err(Reason::UnknownPeer | Reason::IdentityRefused)
                        if timeout_at(until, in_force.wait_for(is_newer))
                            .await
                            .is_ok_and(|c| c.is_ok()) => {}
                    decided => break decided,
                }
            }
        };
        let allowed = known
            .await
            .map_err(|reason| Refused::decided(Verdict::refuse(reason)))?;
        if !allowed.verdict.allowed {
            let mut refused = Refused::decided(allowed.verdict);
            if allowed.silent && allowed.verdict.reason.is_policy() {
                refused.reason.cause = Cause::Silent;
            }
            return Err(refused);
        }
        if let Some(audit) = &allowed.audit {
            let opening = self.opening(open, allowed.verdict);
            self.worker.recorder.audited(&opening, audit);
        }
        self.entry.set_input(Some(DecisionInput::Inbound {
            from: open.source,
            peer: allowed.id,
            to: open.destination,
        }));
        match self.connect(pod, open).await {
            Ok(app) => Ok((allowed.verdict, app)),
            Err(error) => {
                tracing::debug!(to = %open.destination, %error, "cannot connect to the application");
                Err(Refused {
                    reason: CloseReason {
                        cause: cause(&error),
                        ..CloseReason::new(Reason::ConnectFailed)
                    },
                    close: Close::Failed(Reason::ConnectFailed),
                    verdict: allowed.verdict,
                })
            }
        }
    }

    /// Decides a request, or tells why it cannot be decided.
    fn decide(&self, plan: &Index, open: &Open) -> Result<Allowed, Reason> {
        let view = plan.pods.get(self.uid).ok_or(Reason::PodDeleted)?.view;
        if open.source.addr != self.from {
            return Err(Reason::Spoofed);
        }
        if !view.owns(&open.destination.addr) {
            return Err(Reason::NotTunnelled);
        }
        if open.destination.port == self.worker.tunnel_port || open.destination.port.get() == 0 {
            return Err(Reason::TunnelPort);
        }
        // Packet filters between the nodes have seen this port.
        if self.port != self.worker.tunnel_port && self.port != open.destination.port {
            return Err(Reason::NotTunnelled);
        }
        let (Some(workload), Some(peer)) = (
            plan.names.workloads.get(&self.from),
            plan.peers.get(&self.from),
        ) else {
            return Err(Reason::UnknownPeer);
        };
        if workload.name.namespace != self.peer.namespace()
            || workload.service_account != self.peer.service_account()
        {
            return Err(Reason::IdentityRefused);
        }
        let port = open.destination.port;
        let decide = |set| tunnelled(plan, set, peer.id, &self.from, port);
        let audit = plan.audit_set(&view).map(decide);
        Ok(Allowed {
            verdict: decide(view.set),
            audit: audit.filter(|verdict| !verdict.allowed),
            silent: view.has(PodState::SILENT),
            id: peer.id,
        })
    }

    async fn connect(&self, pod: &PodHandle, open: &Open) -> io::Result<Socket> {
        let client = SocketAddr::from(open.source);
        let to = SocketAddr::from(open.destination);
        let timing = &self.worker.timing;
        let until = Deadline::now() + timing.connect;
        loop {
            let begun = self.worker.sockets.application(pod, client, to);
            let begun = begun
                .and_then(|Connecting { stream, connected }| Ok((Socket::new(stream)?, connected)));
            let connected = match begun {
                Ok((socket, true)) => Ok(socket),
                Ok((socket, false)) => timeout_at(until, socket.connected())
                    .await
                    .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
                    .map(|()| socket),
                Err(error) => Err(error),
            };
            match connected {
                // The last connection from this port ended a moment ago: the kernel allows its reuse
                // after a second (tcp_tw_reuse).
                Err(error)
                    if error.kind() == io::ErrorKind::AddrNotAvailable
                        && Deadline::now() + timing.first_retry < until =>
                {
                    tokio::time::sleep(timing.first_retry).await;
                }
                other => return other,
            }
        }
    }

    fn record(&self, open: &Open, verdict: Verdict) -> ConnectionRecord {
        self.worker.recorder.open(self.opening(open, verdict))
    }

    fn opening(&self, open: &Open, verdict: Verdict) -> ConnectionOpen {
        ConnectionOpen {
            reporter: Reporter::Destination,
            source: open.source,
            destination: open.destination,
            service: open.service,
            verdict,
            evidence: Evidence::Tls,
            peer_identity: Some(Arc::clone(&self.text)),
            security: Security::MutualTls,
        }
    }

    /// Relays a stream to its end; returns whether the tunnel may carry another.
    async fn carry(
        &self,
        tunnel: &mut Tunnel,
        stream: StreamId,
        app: &Socket,
        mut record: ConnectionRecord,
    ) -> bool {
        // The default is a reset; an orderly end changes it.
        app.reset_on_drop();
        tunnel.confirm(stream);
        let outcome = {
            let traffic = Traffic::of_destination(record.bytes());
            let relay = Relay::acceptor(app, tunnel.stream(stream), &traffic);
            tokio::select! {
                biased;
                outcome = self.worker.fair.carry(self.pod, relay.run()) => Ok(outcome),
                why = self.entry.terminated() => Err(why),
            }
        };
        let (rtt, retransmits) = transport(tunnel);
        record.set_transport(rtt, retransmits);
        let close = match outcome {
            Ok(Outcome::Finished { local_first }) => {
                tunnel.end_stream();
                app.close_on_drop();
                let by = if local_first {
                    ClosedBy::Local
                } else {
                    ClosedBy::Remote
                };
                record.finish(Close::Finished(by));
                return true;
            }
            Ok(Outcome::AppReset(error)) => {
                tracing::trace!(%error, "application reset its connection");
                tunnel.reset(stream, &CloseReason::APPLICATION);
                Close::Reset(ClosedBy::Local)
            }
            Ok(Outcome::PeerReset(reason) | Outcome::Refused(reason)) => reset(reason),
            Ok(Outcome::CarrierFailed { error, .. }) => {
                tracing::debug!(from = %self.from, %error, "tunnel failed");
                if error.is_violation() {
                    self.worker.metrics().violated(Role::Server);
                    tunnel.reset(stream, &CloseReason::new(Reason::Protocol));
                    Close::Failed(Reason::Protocol)
                } else {
                    Close::Reset(ClosedBy::Remote)
                }
            }
            Err(why) => {
                tunnel.reset(stream, &why.reason_for_peer());
                why.close()
            }
        };
        tunnel.end_stream();
        record.finish(close);
        false
    }
}
