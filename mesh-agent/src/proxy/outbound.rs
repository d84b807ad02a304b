// SPDX-License-Identifier: Apache-2.0
//! A captured connection on its way out: decided again, given a tunnel to the destination's node,
//! and carried.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mesh_common::path::{Outbound, Path, outbound};
use mesh_common::{Direction, Endpoint, Evidence, Protocol, Reason, Verdict};
use mesh_plan::Plan;
use tokio::time::{Instant as Deadline, sleep, timeout_at};

use super::Counted;
use super::live::{Entry, Subject};
use super::pool::{Key, Pooled};
use super::relay::{End, Relay, Retained};
use super::socket::Socket;
use super::tls::{self, HandshakeError};
use super::tunnel::Tunnel;
use super::tunnel::frame::{Control, Open, StreamId, Why};
use super::worker::{Job, Worker};
use crate::identity::{self, Epoch, Refusal, SpiffeId, server_name};
use crate::metrics::Role;
use crate::pods::PodHandle;
use crate::record::{Close, ClosedBy, ConnectionOpen, ConnectionRecord, Reporter, Security};

/// Who may be behind a tunnel's other end, and how it is reached.
struct Target {
    key: Key,
    from: SocketAddr,
    to: SocketAddr,
}

/// Carries a captured connection from its acceptance to its record.
pub(crate) async fn carry(worker: &Rc<Worker>, job: Job, app: Socket) {
    let Job {
        share,
        place: _place,
        kind: _,
    } = job;
    let entry = worker.live.register(&share.uid);
    // Reset, until it is known to have ended otherwise.
    app.reset_on_drop();
    let (Ok((to, from)), Some(pod)) = (worker.dial.ends(&app), worker.pod(&share.uid)) else {
        return;
    };
    let (from, to) = (Endpoint::from(from), Endpoint::from(to));
    let service = worker.dial.service(&pod, to, from.port);
    let open = Open {
        destination: to,
        source: from,
        service,
    };
    let plan = worker.plan();
    let decided = decide(worker, &plan, &pod, &open);
    drop(plan);
    let record = |verdict, peer: Option<&SpiffeId>| {
        worker.recorder.open(ConnectionOpen {
            reporter: Reporter::Source,
            source: from,
            destination: to,
            service,
            verdict,
            evidence: Evidence::Tls,
            peer_identity: peer.map(text),
            security: Security::MutualTls,
        })
    };
    let (target, verdict) = match decided {
        Ok(decided) => decided,
        Err(verdict) => {
            worker.metrics().verdict(Direction::Egress, &verdict);
            record(verdict, None).finish(Close::Refused(verdict));
            return;
        }
    };
    let mut record = record(verdict, Some(&target.key.expected));
    entry.set_subject(Some(Subject::Outbound { to }));
    let connection = Connection {
        worker,
        pod: &pod,
        app: &app,
        target: &target,
        open,
    };
    let close = connection.relay(&mut record, &entry).await;
    record.finish(close);
}

/// Decides again: the mark that brought the connection here is no proof of anything.
fn decide(
    worker: &Worker,
    plan: &Plan,
    pod: &PodHandle,
    open: &Open,
) -> Result<(Target, Verdict), Verdict> {
    let refused = Err(Verdict::refuse(Reason::NotTunnelled));
    let local = plan.pods.get(&pod.uid).unwrap_or(&pod.local);
    let Path {
        action, verdict, ..
    } = outbound(plan, &local.view, open.destination, Protocol::TCP);
    match action {
        Outbound::Tunnel => {}
        Outbound::Refuse => return Err(verdict),
        Outbound::Direct => return refused,
    }
    if !local.view.owns(&open.source.addr) {
        return refused;
    }
    let Some(peer) = plan.names.workloads.get(&open.destination.addr) else {
        return Err(Verdict::refuse(Reason::UnknownPeer));
    };
    let (Some(own), Some(expected)) = (
        worker.identity(&local.name.namespace, &local.service_account),
        worker.identity(&peer.pod.namespace, &peer.service_account),
    ) else {
        return Err(Verdict::refuse(Reason::IdentityRefused));
    };
    let key = Key {
        to: Endpoint::new(open.destination.addr, worker.tunnel_port),
        from: open.source.addr,
        uid: pod.uid.as_str().into(),
        own,
        expected,
    };
    let from = SocketAddr::new(IpAddr::from(open.source.addr), 0);
    let to = SocketAddr::from(key.to);
    Ok((Target { key, from, to }, verdict))
}

/// One captured connection.
struct Connection<'a> {
    worker: &'a Rc<Worker>,
    pod: &'a PodHandle,
    app: &'a Socket,
    target: &'a Target,
    open: Open,
}

impl Connection<'_> {
    /// Relays through a tunnel that waits, or a new one. A tunnel that the peer closed before it
    /// acted on OPEN is replaced by a new one, once.
    async fn relay(&self, record: &mut ConnectionRecord, entry: &Entry) -> Close {
        let mut retained = Retained::default();
        let key = &self.target.key;
        let epoch = self.worker.identities.epoch(&key.own);
        let waiting = epoch.and_then(|now| self.worker.pool.take(key, now, Instant::now()));
        if let Some(pooled) = waiting
            && let Some(close) = self.attempt(pooled, &mut retained, record, entry).await
        {
            return close;
        }
        let made = tokio::select! {
            biased;
            reason = entry.ended() => Err(reason),
            made = self.tunnel() => made,
        };
        let pooled = match made {
            Ok(pooled) => pooled,
            Err(reason) => return Close::Failed(reason),
        };
        self.attempt(pooled, &mut retained, record, entry)
            .await
            .unwrap_or(Close::Failed(Reason::PeerUnreachable))
    }

    /// Relays through one tunnel; `None` = another may be tried.
    async fn attempt(
        &self,
        mut pooled: Pooled,
        retained: &mut Retained,
        record: &mut ConnectionRecord,
        entry: &Entry,
    ) -> Option<Close> {
        let tunnel = &mut pooled.tunnel;
        let stream = tunnel.begin()?;
        tunnel.queue(stream, &Control::Open(self.open));
        let end = {
            let count = Counted::source(record.bytes());
            let relay = Relay::opener(self.app, tunnel, stream, &count, retained);
            tokio::select! {
                biased;
                end = relay.run() => Ok(end),
                reason = entry.ended() => Err(reason),
            }
        };
        let (rtt, retransmits) = tunnel.transport();
        record.set_transport(rtt, retransmits);
        match end {
            Ok(end) => self.conclude(pooled, stream, end),
            Err(reason) => {
                self.give_up(pooled.tunnel, stream, Why::new(reason));
                Some(Close::Failed(reason))
            }
        }
    }

    /// What becomes of the tunnel, and how the connection ended.
    fn conclude(&self, mut pooled: Pooled, stream: StreamId, end: End) -> Option<Close> {
        match end {
            End::Finished { local_first } => {
                self.app.close_on_drop();
                self.keep(pooled);
                Some(Close::Finished(if local_first {
                    ClosedBy::Local
                } else {
                    ClosedBy::Remote
                }))
            }
            End::Refused(why) => {
                pooled.tunnel.end();
                self.keep(pooled);
                Some(refused(why))
            }
            End::AppReset(error) => {
                tracing::trace!(%error, "an application reset its connection");
                self.give_up(pooled.tunnel, stream, Why::APPLICATION);
                Some(Close::Reset(ClosedBy::Local))
            }
            End::PeerReset(why) => {
                self.worker.close(vec![pooled.tunnel]);
                Some(reset(why))
            }
            End::Tunnel { unused: true, .. } => None,
            End::Tunnel { error, .. } => {
                tracing::debug!(to = %self.target.key.to, error = %error, "a tunnel failed");
                if !error.is_violation() {
                    return Some(Close::Reset(ClosedBy::Remote));
                }
                self.give_up(pooled.tunnel, stream, Why::new(Reason::Protocol));
                Some(Close::Failed(Reason::Protocol))
            }
        }
    }

    /// Keeps a tunnel for the next connection.
    fn keep(&self, mut pooled: Pooled) {
        pooled.tunnel.end();
        if self.worker.draining.get() {
            self.worker.close(vec![pooled.tunnel]);
            return;
        }
        let put = self
            .worker
            .pool
            .put(&self.target.key, pooled, Instant::now());
        if let Some(tunnel) = put {
            self.worker.close(vec![tunnel]);
        }
    }

    /// Ends a stream in the middle, and with it the tunnel.
    fn give_up(&self, mut tunnel: Tunnel, stream: StreamId, why: Why) {
        tunnel.queue(stream, &Control::Reset(why));
        self.worker.close(vec![tunnel]);
    }

    /// A new tunnel to the destination's agent.
    async fn tunnel(&self) -> Result<Pooled, Reason> {
        let timing = &self.worker.timing;
        let begun = Deadline::now();
        let key = &self.target.key;
        let ready = self.worker.identities.ready(&key.own);
        match timeout_at(begun + timing.certificate, ready).await {
            Ok(Ok(_certificate)) => {}
            Ok(Err(_)) | Err(_) => return Err(Reason::NoCertificate),
        }
        let connected = timeout_at(begun + timing.connect, self.connected(begun)).await;
        let socket = match connected {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                tracing::debug!(to = %key.to, %error, "cannot reach another node's agent");
                return Err(Reason::PeerUnreachable);
            }
            Err(_elapsed) => return Err(Reason::PeerUnreachable),
        };
        let handshake = self.secure(socket);
        let made = match timeout_at(Deadline::now() + timing.handshake, handshake).await {
            Ok(made) => made,
            Err(_elapsed) => Err(Failure::Refused(Refusal::Timeout)),
        };
        let result = made.as_ref().map(|_| ()).map_err(Failure::reason);
        self.worker.metrics().handshake(Role::Client, result);
        made.map_err(|failure| {
            tracing::debug!(to = %key.to, expected = %key.expected, %failure, "no tunnel");
            failure.reason()
        })
    }

    /// Connects; a peer that refuses may be just starting, and is asked again for a while. It is
    /// never reached in clear instead.
    async fn connected(&self, begun: Deadline) -> io::Result<Socket> {
        let timing = &self.worker.timing;
        let mut pause = timing.first_retry;
        loop {
            let Target { from, to, .. } = *self.target;
            let stream = self.worker.dial.peer(self.pod, from, to)?;
            let socket = Socket::new(stream)?;
            match socket.connected().await {
                Ok(()) => return Ok(socket),
                Err(error)
                    if error.kind() == io::ErrorKind::ConnectionRefused
                        && begun.elapsed() + pause < timing.retry =>
                {
                    sleep(pause).await;
                    pause *= 2;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn secure(&self, socket: Socket) -> Result<Pooled, Failure> {
        let key = &self.target.key;
        let identities = &self.worker.identities;
        let config = identities.client(&key.own, &key.expected)?;
        let epoch: Epoch = identities
            .epoch(&key.own)
            .ok_or(Failure::Refused(Refusal::Failed))?;
        let name = server_name(key.to.addr.into());
        let verify = |connection: &_| {
            let proven = identities.peer(connection)?;
            if proven == key.expected {
                Ok(())
            } else {
                Err(Failure::Refused(Refusal::WrongIdentity))
            }
        };
        let (secured, ()) = tls::connect(&socket, config, name, verify).await?;
        Ok(Pooled {
            tunnel: Tunnel::new(socket, secured, Rc::clone(&self.worker.buffers)),
            epoch,
            made: Instant::now(),
        })
    }
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The handshake did not prove the peer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no certificate to show.
    #[error(transparent)]
    Identity(#[from] identity::Error),
}

impl From<HandshakeError> for Failure {
    fn from(error: HandshakeError) -> Self {
        Self::Refused(error.refusal())
    }
}

impl Failure {
    /// For metrics and records.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Refused(refusal) => refusal.reason(),
            Self::Identity(_) => Reason::NoCertificate,
        }
    }
}

/// How a connection ended that the other end refused.
pub(crate) fn refused(why: Why) -> Close {
    let reason = why.reason.unwrap_or(Reason::Protocol);
    let decided = matches!(
        reason,
        Reason::Policy | Reason::DefaultDeny | Reason::PolicyMissing
    );
    if decided {
        Close::Refused(Verdict::deny(reason, why.rule))
    } else {
        Close::Failed(reason)
    }
}

/// How a connection ended that the other end reset.
pub(crate) fn reset(why: Why) -> Close {
    why.reason
        .map_or(Close::Reset(ClosedBy::Remote), Close::Failed)
}

/// An `Arc<str>` of an identity, for records.
pub(crate) fn text(id: &SpiffeId) -> Arc<str> {
    id.to_string().into()
}
