// SPDX-License-Identifier: Apache-2.0
//! Carries a captured connection: decides it again, finds a tunnel to the destination's node, and relays.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mesh_common::{Direction, Endpoint, Evidence, Reason, Verdict};
use mesh_datapath::pods::PodHandle;
use mesh_identity::SpiffeId;
use mesh_telemetry::metrics::Role;
use mesh_telemetry::record::{
    Close, ClosedBy, ConnectionOpen, ConnectionRecord, Reporter, Security,
};
use mesh_tunnel::frame::{Cause, CloseReason, Open, StreamId};
use mesh_tunnel::relay::{Outcome, Relay, ReplayBuffer};
use mesh_tunnel::{Carrier as _, CarrierError as _, Socket, Tunnel, TunnelError};

use self::attempts::{Attempt, Attempts};
use self::target::Target;
use super::connection_registry::{ConnectionEntry, DecisionInput};
use super::handshake_scheduler;
use super::pool::Pooled;
use super::traffic::{Traffic, transport};
use super::worker::{Job, Load, PodResources, Slot, Worker};

pub(crate) use self::dial::HandshakeFailure;

mod attempts;
mod dial;
mod target;

/// Carries a captured connection from its acceptance to its record.
pub(crate) async fn carry(worker: &Rc<Worker>, job: Job, app: Socket, load: &Load) {
    let Job {
        resources,
        slot: _slot,
        kind: _,
    } = job;
    let entry = worker.connections.register(&resources.uid);
    // The default is a reset; an orderly end changes it.
    app.reset_on_drop();
    let (Ok(addresses), Some(pod)) = (worker.sockets.addresses(&app), worker.pod(&resources.uid))
    else {
        return;
    };
    let (from, to) = (
        Endpoint::from(addresses.peer),
        Endpoint::from(addresses.local),
    );
    let service = worker.sockets.service(&pod, to, from.port);
    let request = Open {
        destination: to,
        source: from,
        service,
    };
    let decided = target::decide(worker, &worker.plan(), &pod, request);
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
    let target = match decided {
        Ok(target) => target,
        Err(verdict) => {
            worker.metrics().verdict(Direction::Egress, &verdict);
            record(verdict, None).finish(Close::Refused(verdict));
            return;
        }
    };
    let mut record = record(target.verdict, Some(&target.key.expected));
    let connection = Connection {
        worker,
        pod: &pod,
        resources: &resources,
        app: &app,
        load,
        entry: &entry,
    };
    let ended = connection.relay(target, &mut record).await;
    record.finish(ended.close);
    if ended.silent {
        hold(worker, &resources, &app, &entry).await;
    }
}

/// One captured connection.
struct Connection<'a> {
    worker: &'a Rc<Worker>,
    pod: &'a PodHandle,
    resources: &'a PodResources,
    app: &'a Socket,
    /// The connection's part of its worker's load.
    load: &'a Load,
    entry: &'a ConnectionEntry,
}

/// The end of a connection.
struct Ended {
    close: Close,
    /// Whether the refusal is hidden from the application.
    silent: bool,
}

/// The result of one attempt to carry a connection.
enum AttemptResult {
    /// The connection has ended.
    Ended(Ended),
    /// The peer closed the tunnel before it acted on the request: another tunnel may be tried.
    Unused,
    /// There is no connection to this endpoint, and no data was given to an application: another
    /// endpoint may be tried.
    NotMade(Close),
}

impl AttemptResult {
    /// The connection has ended, and the application notices.
    const fn ended(close: Close) -> Self {
        Self::Ended(Ended {
            close,
            silent: false,
        })
    }
}

impl Connection<'_> {
    /// Tries one tunnel after another until one carries the connection to its end.
    async fn relay(&self, target: Target, record: &mut ConnectionRecord) -> Ended {
        let mut replay = ReplayBuffer::default();
        let mut endpoint = target.request.destination;
        let mut close = Close::Failed(Reason::PeerUnreachable);
        let mut attempts = Attempts::new(self.worker, self.pod, target);
        while let Some(attempt) = attempts.next() {
            let target = Rc::clone(&attempt.target);
            let to = target.request.destination;
            if to != endpoint {
                tracing::debug!(%endpoint, instead = %to, reason = close.label(), "trying another endpoint of the service");
                self.worker.metrics().retried(&close);
                record.redirect(to, target.verdict, text(&target.key.expected));
                endpoint = to;
            }
            self.entry.set_input(Some(DecisionInput::Outbound { to }));
            match self.attempt(attempt, &mut replay, record).await {
                AttemptResult::Ended(ended) => return ended,
                AttemptResult::Unused => close = Close::Failed(Reason::PeerUnreachable),
                AttemptResult::NotMade(because) => {
                    close = because;
                    attempts.skip_endpoint();
                }
            }
        }
        Ended {
            close,
            silent: false,
        }
    }

    /// Relays through the attempt's tunnel, which is made first if it is a new one.
    async fn attempt(
        &self,
        attempt: Attempt,
        replay: &mut ReplayBuffer,
        record: &mut ConnectionRecord,
    ) -> AttemptResult {
        let target = &*attempt.target;
        let pooled = match attempt.pooled {
            Some(pooled) => pooled,
            None => {
                let dial = dial::Dialer {
                    worker: self.worker,
                    pod: self.pod,
                    resources: self.resources,
                    target,
                };
                let made = tokio::select! {
                    biased;
                    why = self.entry.terminated() => return AttemptResult::ended(why.close()),
                    made = dial.tunnel(attempt.has_alternative) => made,
                };
                match made {
                    Ok(pooled) => pooled,
                    Err(reason @ (Reason::PeerUnreachable | Reason::TlsFailed)) => {
                        return AttemptResult::NotMade(Close::Failed(reason));
                    }
                    Err(reason) => return AttemptResult::ended(Close::Failed(reason)),
                }
            }
        };
        self.relay_through(pooled, target, replay, record).await
    }

    /// Relays through one tunnel.
    async fn relay_through(
        &self,
        mut pooled: Pooled,
        target: &Target,
        replay: &mut ReplayBuffer,
        record: &mut ConnectionRecord,
    ) -> AttemptResult {
        let tunnel = &mut pooled.tunnel;
        let Some(stream) = tunnel.open(&target.request) else {
            return AttemptResult::Unused;
        };
        self.entry.set_proof(&pooled.proof);
        let outcome = {
            let traffic = Traffic::of_source(record.bytes(), self.load);
            let relay = Relay::opener(self.app, tunnel.stream(stream), &traffic, replay);
            let pod = handshake_scheduler::number(&self.resources.uid);
            tokio::select! {
                biased;
                outcome = self.worker.fair.carry(pod, relay.run()) => Ok(outcome),
                why = self.entry.terminated() => Err(why),
            }
        };
        let (rtt, retransmits) = transport(tunnel);
        record.set_transport(rtt, retransmits);
        match outcome {
            Ok(outcome) => {
                if let Outcome::Refused(reason) = &outcome {
                    record.set_cause(reason.cause.label());
                }
                self.conclude(pooled, target, stream, outcome)
            }
            Err(why) => {
                self.give_up(pooled.tunnel, stream, why.reason_for_peer());
                AttemptResult::ended(why.close())
            }
        }
    }

    /// Keeps or closes the tunnel, and tells how the connection ended.
    fn conclude(
        &self,
        mut pooled: Pooled,
        target: &Target,
        stream: StreamId,
        outcome: Outcome<TunnelError>,
    ) -> AttemptResult {
        AttemptResult::ended(match outcome {
            Outcome::Finished { local_first } => {
                self.app.close_on_drop();
                self.keep(pooled, target);
                Close::Finished(if local_first {
                    ClosedBy::Local
                } else {
                    ClosedBy::Remote
                })
            }
            Outcome::Refused(reason) => {
                pooled.tunnel.end_stream();
                self.keep(pooled, target);
                let close = refused(reason);
                if is_about_the_endpoint(&close) {
                    return AttemptResult::NotMade(close);
                }
                let silent = reason.cause == Cause::Silent;
                return AttemptResult::Ended(Ended { close, silent });
            }
            Outcome::AppReset(error) => {
                tracing::trace!(%error, "application reset its connection");
                self.give_up(pooled.tunnel, stream, CloseReason::APPLICATION);
                Close::Reset(ClosedBy::Local)
            }
            Outcome::PeerReset(reason) => {
                self.worker.close(vec![pooled.tunnel]);
                reset(reason)
            }
            Outcome::CarrierFailed {
                may_retry: true, ..
            } => return AttemptResult::Unused,
            Outcome::CarrierFailed { error, .. } => {
                tracing::debug!(to = %target.key.to, %error, "tunnel failed");
                if error.is_violation() {
                    self.worker.metrics().violated(Role::Client);
                    let reason = CloseReason::new(Reason::Protocol);
                    self.give_up(pooled.tunnel, stream, reason);
                    Close::Failed(Reason::Protocol)
                } else {
                    Close::Reset(ClosedBy::Remote)
                }
            }
        })
    }

    /// Keeps a tunnel for the next connection.
    fn keep(&self, mut pooled: Pooled, target: &Target) {
        pooled.tunnel.end_stream();
        if self.worker.draining.get() {
            self.worker.close(vec![pooled.tunnel]);
            return;
        }
        let rejected = self.worker.pool.put(&target.key, pooled, Instant::now());
        if let Some(tunnel) = rejected {
            self.worker.close(vec![tunnel]);
        }
    }

    /// Resets a stream, and closes its tunnel.
    fn give_up(&self, mut tunnel: Tunnel, stream: StreamId, reason: CloseReason) {
        tunnel.reset(stream, &reason);
        self.worker.close(vec![tunnel]);
    }
}

/// Keeps a refused connection open as if its destination did not exist: nothing more is read of it, and
/// it is reset when a connect() that meets silence would give up. The number of these is bounded per
/// pod; beyond the bound they are reset at once.
async fn hold(
    worker: &Worker,
    resources: &Arc<PodResources>,
    app: &Socket,
    entry: &ConnectionEntry,
) {
    let most = worker.timing.silent_per_pod;
    let slot = Slot::take(resources, |resources| &resources.silent, most);
    worker.metrics().silent(slot.is_some());
    if slot.is_none() {
        return;
    }
    tokio::select! {
        biased;
        _why = entry.terminated() => {}
        // A client that has closed in order cannot be told from one that only sends no more.
        _error = app.failed() => {}
        () = tokio::time::sleep(worker.timing.silence) => {}
    }
}

/// Returns the end of a connection that the peer refused.
pub(crate) fn refused(by_peer: CloseReason) -> Close {
    let reason = by_peer.reason.unwrap_or(Reason::Protocol);
    if reason.is_policy_or_missing() {
        Close::Refused(Verdict::deny(reason, by_peer.rule))
    } else {
        Close::Failed(reason)
    }
}

/// Whether a refusal concerns the endpoint and not the client: another endpoint may accept.
const fn is_about_the_endpoint(close: &Close) -> bool {
    matches!(
        close,
        Close::Failed(
            Reason::ConnectFailed
                | Reason::PodDeleted
                | Reason::AgentShutdown
                | Reason::LimitReached
                | Reason::NotTunnelled
        )
    )
}

/// Returns the end of a connection that the peer reset.
pub(crate) fn reset(by_peer: CloseReason) -> Close {
    match by_peer.reason {
        Some(reason @ Reason::PolicyChanged) => Close::Changed(Verdict::deny(reason, by_peer.rule)),
        Some(reason) => Close::Failed(reason),
        None => Close::Reset(ClosedBy::Remote),
    }
}

/// Formats an identity for records.
pub(crate) fn text(id: &SpiffeId) -> Arc<str> {
    id.to_string().into()
}
