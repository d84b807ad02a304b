// SPDX-License-Identifier: Apache-2.0
//! Tunnels of other agents: the peer is proven, each connection is decided with the proven
//! identity and the real port, and handed over to the application from the client's own address
//! and port.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use mesh_common::path::tunnelled;
use mesh_common::{
    Addr, Direction, Endpoint, Evidence, IdentityId, PodState, Port, Reason, Verdict,
};
use mesh_plan::Index;
use tokio::time::{Instant as Deadline, timeout, timeout_at};

use super::Counted;
use super::live::{Entry, Subject};
use super::outbound::{Failure, reset, text};
use super::relay::{End, Relay, cause};
use super::socket::Socket;
use super::tls::{self, HandshakeError};
use super::tunnel::frame::{Cause, Control, Open, StreamId, Why};
use super::tunnel::{Tunnel, TunnelError};
use super::turns::{self, Computing};
use super::worker::{Job, Share, Worker};
use crate::control::InForce;
use mesh_datapath::pods::PodHandle;
use mesh_identity::{Proof, Refusal, SpiffeId};
use mesh_telemetry::metrics::Role;
use mesh_telemetry::record::{
    Close, ClosedBy, ConnectionOpen, ConnectionRecord, Reporter, Security,
};

/// Serves a tunnel from its acceptance to its end.
pub(crate) async fn serve(worker: &Rc<Worker>, job: Job, socket: Socket) {
    let Job {
        share,
        place: _place,
        kind,
    } = job;
    let (Ok((here, from)), Some(pod)) = (worker.dial.ends(&socket), worker.pod(&share.uid)) else {
        return;
    };
    let Some(unproven) = share.admission.arrived(Endpoint::from(from).addr) else {
        super::listener::refuse(worker, kind, &socket);
        return;
    };
    let entry = worker.live.register(&share.uid);
    let proven = async {
        // Who says nothing takes no place.
        socket.readable().await.map_err(HandshakeError::from)?;
        let admitted = share.admission.accept(&unproven).await;
        let proven = prove(worker, &share, &socket).await;
        drop(admitted);
        proven
    };
    let proven = timeout(worker.timing.handshake, proven);
    let proven = tokio::select! {
        biased;
        _why = entry.ended() => return,
        proven = proven => proven.unwrap_or(Err(Failure::Refused(Refusal::Timeout))),
    };
    drop(unproven);
    let refused = |failure: &Failure| failure.refusal().label();
    let result = proven.as_ref().map(|_| ()).map_err(refused);
    worker.metrics().handshake(Role::Server, result);
    let (secured, proof) = match proven {
        Ok(proven) => proven,
        Err(failure) => {
            tracing::debug!(%from, uid = %share.uid, %failure, "refused a tunnel");
            return;
        }
    };
    drop(pod);
    entry.set_proof(&proof);
    let serving = Serving {
        worker,
        uid: &share.uid,
        pod: turns::number(&share.uid),
        here: Endpoint::from(here).port,
        from: Endpoint::from(from).addr,
        text: text(&proof.id),
        peer: &proof.id,
        proof: &proof,
        entry: &entry,
    };
    let mut tunnel = Tunnel::new(socket, secured, worker.lender(&share));
    match serving.run(&mut tunnel).await {
        Ok(()) | Err(TunnelError::Ended) => {}
        Err(error) => {
            tracing::debug!(%from, peer = %serving.peer, error = %error, "a tunnel ended");
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
    share: &Share,
    socket: &Socket,
) -> Result<(tls::Secured, Rc<Proof>), Failure> {
    let own = worker
        .own_identity(&share.uid)
        .ok_or(Failure::Refused(Refusal::Failed))?;
    let config = worker.identities.server(&own)?;
    let verify = |connection: &_| Ok::<_, Failure>(Rc::new(worker.identities.peer(connection)?));
    let computing = Computing::of(&worker.turns, &share.uid);
    tls::accept((socket, computing), config, verify).await
}

/// A tunnel whose peer is proven.
struct Serving<'a> {
    worker: &'a Rc<Worker>,
    uid: &'a str,
    /// The pod, as its worker's time is parted.
    pod: u64,
    /// The port that the tunnel has reached.
    here: Port,
    from: Addr,
    peer: &'a SpiffeId,
    proof: &'a Proof,
    text: Arc<str>,
    entry: &'a Entry,
}

/// What a refused stream is refused with.
struct Refused {
    why: Why,
    close: Close,
    verdict: Verdict,
}

impl Refused {
    /// By a decision.
    fn decided(verdict: Verdict) -> Self {
        Self {
            why: Why {
                rule: verdict.rule,
                ..Why::new(verdict.reason)
            },
            close: Close::Refused(verdict),
            verdict,
        }
    }
}

/// A stream that may be carried.
struct Allowed {
    verdict: Verdict,
    /// The refusal of policies in audit mode.
    audit: Option<Verdict>,
    /// What the pod's policy refuses is met with silence.
    silent: bool,
    id: IdentityId,
}

impl Serving<'_> {
    /// One stream after another.
    async fn run(&self, tunnel: &mut Tunnel) -> Result<(), TunnelError> {
        loop {
            self.entry.set_idle(true);
            let next = tokio::select! {
                biased;
                _why = self.entry.ended() => return Ok(()),
                next = timeout(self.worker.timing.tunnel_idle, tunnel.control()) => next,
            };
            let Ok(next) = next else {
                return Ok(());
            };
            match next? {
                // Unanswered: who opens it asks again with a certificate that has not ended, if
                // there is one.
                (_, Control::Open(_)) if !self.stands() => return Ok(()),
                (stream, Control::Open(open)) => {
                    tunnel.accept(stream)?;
                    self.entry.set_idle(false);
                    let again = self.stream(tunnel, stream, open).await;
                    self.entry.set_subject(None);
                    if !again || self.worker.draining.get() {
                        return Ok(());
                    }
                }
                // The opener's last word on a stream that has ended here.
                (stream, Control::FinAck) if stream == tunnel.streams() => {}
                // Its application went away after both directions had ended.
                (stream, Control::Reset(_)) if stream == tunnel.streams() => return Ok(()),
                (_, Control::FinAck | Control::Reset(_)) => {
                    return Err(TunnelError::Unexpected("the end of another stream"));
                }
                (_, Control::Opened | Control::Refused(_) | Control::Fin) => {
                    return Err(TunnelError::Unexpected("a frame between streams"));
                }
            }
        }
    }

    /// Whether the tunnel's certificates have not ended.
    fn stands(&self) -> bool {
        self.worker
            .own_identity(self.uid)
            .is_some_and(|own| self.worker.identities.stands(&own, self.proof))
    }

    /// One stream; whether the tunnel may carry another.
    async fn stream(&self, tunnel: &mut Tunnel, stream: StreamId, open: Open) -> bool {
        let Some(pod) = self.worker.pod(self.uid) else {
            return false;
        };
        let outcome = tokio::select! {
            biased;
            // A pod that is deleted does not wait for anybody's policy: it would stay until then.
            why = self.entry.ended() => Err(Refused::decided(Verdict::refuse(why.reason()))),
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
                tunnel.queue(stream, &Control::Refused(refused.why));
                tunnel.refuse();
                record.set_cause(refused.why.cause.label());
                record.finish(refused.close);
                true
            }
        }
    }

    /// Decides, and connects to the application.
    async fn admit(&self, pod: &PodHandle, open: &Open) -> Result<(Verdict, Socket), Refused> {
        let known = async {
            let mut in_force = self.worker.in_force.clone();
            let until = Deadline::now() + self.worker.timing.unknown_peer;
            loop {
                let plan = Arc::clone(&in_force.borrow_and_update().plan);
                let is_newer = |now: &Arc<InForce>| !Arc::ptr_eq(&now.plan, &plan);
                match self.decide(&plan, open) {
                    // Another node's pod may be known here a moment later than there.
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
                refused.why.cause = Cause::Silent;
            }
            return Err(refused);
        }
        if let Some(audit) = &allowed.audit {
            let opening = self.opening(open, allowed.verdict);
            self.worker.recorder.audited(&opening, audit);
        }
        self.entry.set_subject(Some(Subject::Inbound {
            from: open.source,
            peer: allowed.id,
            to: open.destination,
        }));
        match self.connect(pod, open).await {
            Ok(app) => Ok((allowed.verdict, app)),
            Err(error) => {
                tracing::debug!(to = %open.destination, %error, "cannot connect to an application");
                Err(Refused {
                    why: Why {
                        cause: cause(&error),
                        ..Why::new(Reason::ConnectFailed)
                    },
                    close: Close::Failed(Reason::ConnectFailed),
                    verdict: allowed.verdict,
                })
            }
        }
    }

    /// The decision, or why there cannot be one.
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
        // Who looked at the packets on the way was told this port.
        if self.here != self.worker.tunnel_port && self.here != open.destination.port {
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
            let begun = self.worker.dial.application(pod, client, to);
            let begun = begun.and_then(|(stream, done)| Ok((Socket::new(stream)?, done)));
            let connected = match begun {
                Ok((socket, true)) => Ok(socket),
                Ok((socket, false)) => timeout_at(until, socket.connected())
                    .await
                    .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
                    .map(|()| socket),
                Err(error) => Err(error),
            };
            match connected {
                // The last connection from this very port has ended a moment ago: the kernel lets
                // the port be used again after a second (tcp_tw_reuse).
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

    /// Carries a stream to its end; whether the tunnel may carry another.
    async fn carry(
        &self,
        tunnel: &mut Tunnel,
        stream: StreamId,
        app: &Socket,
        mut record: ConnectionRecord,
    ) -> bool {
        // Until it is known to have ended in order.
        app.reset_on_drop();
        tunnel.queue(stream, &Control::Opened);
        let end = {
            let count = Counted::destination(record.bytes());
            let relay = Relay::acceptor(app, tunnel, stream, &count);
            tokio::select! {
                biased;
                end = self.worker.fair.carry(self.pod, relay.run()) => Ok(end),
                why = self.entry.ended() => Err(why),
            }
        };
        let (rtt, retransmits) = tunnel.transport();
        record.set_transport(rtt, retransmits);
        let close = match end {
            Ok(End::Finished { local_first }) => {
                tunnel.end();
                app.close_on_drop();
                let by = if local_first {
                    ClosedBy::Local
                } else {
                    ClosedBy::Remote
                };
                record.finish(Close::Finished(by));
                return true;
            }
            Ok(End::AppReset(error)) => {
                tracing::trace!(%error, "an application reset its connection");
                tunnel.queue(stream, &Control::Reset(Why::APPLICATION));
                Close::Reset(ClosedBy::Local)
            }
            Ok(End::PeerReset(why) | End::Refused(why)) => reset(why),
            Ok(End::Tunnel { error, .. }) => {
                tracing::debug!(from = %self.from, error = %error, "a tunnel failed");
                if error.is_violation() {
                    self.worker.metrics().violated(Role::Server);
                    tunnel.queue(stream, &Control::Reset(Why::new(Reason::Protocol)));
                    Close::Failed(Reason::Protocol)
                } else {
                    Close::Reset(ClosedBy::Remote)
                }
            }
            Err(why) => {
                tunnel.queue(stream, &Control::Reset(why.why()));
                why.close()
            }
        };
        tunnel.end();
        record.finish(close);
        false
    }
}
