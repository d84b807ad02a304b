// SPDX-License-Identifier: Apache-2.0
//! A captured connection on its way out: decided again, given a tunnel to the destination's node,
//! and carried.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mesh_common::{Direction, Endpoint, Evidence, Reason, Verdict};

use self::target::Target;
use super::Counted;
use super::live::{Entry, Subject};
use super::pool::Pooled;
use super::relay::{End, Relay, Retained};
use super::socket::Socket;
use super::tunnel::Tunnel;
use super::tunnel::frame::{Cause, Control, Open, StreamId, Why};
use super::turns;
use super::worker::{Job, Load, Place, Share, Worker};
use mesh_datapath::pods::PodHandle;
use mesh_identity::SpiffeId;
use mesh_telemetry::metrics::Role;
use mesh_telemetry::record::{
    Close, ClosedBy, ConnectionOpen, ConnectionRecord, Reporter, Security,
};

pub(crate) use self::reach::Failure;

mod reach;
mod target;

/// Other endpoints that are tried when one cannot be connected to.
const OTHERS: usize = 2;

/// Carries a captured connection from its acceptance to its record.
pub(crate) async fn carry(worker: &Rc<Worker>, job: Job, app: Socket, load: &Load) {
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
    let decided = target::decide(worker, &worker.plan(), &pod, open);
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
        share: &share,
        app: &app,
        load,
    };
    let (close, silent) = connection.relay(target, &mut record, &entry).await;
    record.finish(close);
    if silent {
        hold(worker, &share, &app, &entry).await;
    }
}

/// One captured connection.
struct Connection<'a> {
    worker: &'a Rc<Worker>,
    pod: &'a PodHandle,
    share: &'a Share,
    app: &'a Socket,
    /// Its part of its worker's.
    load: &'a Load,
}

/// What came of a tunnel or an endpoint.
enum Outcome {
    /// The connection has ended.
    Ended(Close),
    /// The same, and the application is not to be told.
    Silent(Close),
    /// The peer closed the tunnel before it acted on OPEN: another tunnel may be tried.
    Unused,
    /// There is no connection to this endpoint, and nothing was given to an application: another
    /// one may be tried.
    NotMade(Close),
}

impl Connection<'_> {
    /// Relays to the endpoint, or where that cannot be connected to, to another of its service. Also
    /// returns whether the application is not to be told of the end.
    async fn relay(
        &self,
        mut target: Target,
        record: &mut ConnectionRecord,
        entry: &Entry,
    ) -> (Close, bool) {
        let mut retained = Retained::default();
        let mut tried = Vec::new();
        loop {
            let to = target.open.destination;
            entry.set_subject(Some(Subject::Outbound { to }));
            tried.push(to);
            let endpoint = Endpoints {
                connection: self,
                target: &target,
                tried: &tried,
            };
            let (close, next) = match endpoint.relay(&mut retained, record, entry).await {
                (Outcome::Ended(close), _) => return (close, false),
                (Outcome::Silent(close), _) => return (close, true),
                (Outcome::Unused, next) => (Close::Failed(Reason::PeerUnreachable), next),
                (Outcome::NotMade(close), next) => (close, next),
            };
            let Some(next) = next else {
                return (close, false);
            };
            tracing::debug!(%to, instead = %next.open.destination, why = close.label(), "tries another endpoint");
            self.worker.metrics().retried(&close);
            target = next;
            record.redirect(
                target.open.destination,
                target.verdict,
                text(&target.key.expected),
            );
        }
    }
}

/// Keeps a refused connection open as if its other end were not there: nothing is read of it any
/// more, and it is reset when a connect() that meets silence would give up. A pod has a bound of
/// them, beyond which they are reset at once.
async fn hold(worker: &Worker, share: &Arc<Share>, app: &Socket, entry: &Entry) {
    let most = worker.timing.silent_per_pod;
    let place = Place::take(share, |share| &share.silent, most);
    worker.metrics().silent(place.is_some());
    if place.is_none() {
        return;
    }
    tokio::select! {
        biased;
        _why = entry.ended() => {}
        // A client that has closed in order cannot be told from one that only sends no more.
        _error = app.failed() => {}
        () = tokio::time::sleep(worker.timing.silence) => {}
    }
}

/// A captured connection and one of its endpoints.
struct Endpoints<'a> {
    connection: &'a Connection<'a>,
    target: &'a Target,
    tried: &'a [Endpoint],
}

impl<'a> std::ops::Deref for Endpoints<'a> {
    type Target = Connection<'a>;

    fn deref(&self) -> &Connection<'a> {
        self.connection
    }
}

impl Endpoints<'_> {
    /// Another endpoint, if one more may be tried.
    fn another(&self) -> Option<Target> {
        if self.tried.len() > OTHERS {
            return None;
        }
        target::another(self.worker, self.pod, self.target.open, self.tried)
    }

    /// Relays through a tunnel that waits, or a new one. A tunnel that the peer closed before it
    /// acted on OPEN is replaced by a new one, once. Also returns where to try instead.
    async fn relay(
        &self,
        retained: &mut Retained,
        record: &mut ConnectionRecord,
        entry: &Entry,
    ) -> (Outcome, Option<Target>) {
        let key = &self.target.key;
        let epoch = self.worker.identities.epoch(&key.own);
        let waiting = epoch.and_then(|now| self.worker.pool.take(key, now, Instant::now()));
        let stands = |it: &Pooled| self.worker.identities.stands(&key.own, &it.proof);
        let waiting = waiting.filter(stands);
        if let Some(pooled) = waiting {
            match self.attempt(pooled, retained, record, entry).await {
                Outcome::Unused => {}
                ended @ (Outcome::Ended(_) | Outcome::Silent(_)) => return (ended, None),
                not_made @ Outcome::NotMade(_) => return (not_made, self.another()),
            }
        }
        let next = self.another();
        let made = tokio::select! {
            biased;
            why = entry.ended() => return (Outcome::Ended(why.close()), None),
            made = reach::tunnel(self.worker, (self.pod, self.share), self.target, next.is_some()) => made,
        };
        let outcome = match made {
            Ok(pooled) => self.attempt(pooled, retained, record, entry).await,
            Err(reason @ (Reason::PeerUnreachable | Reason::TlsFailed)) => {
                Outcome::NotMade(Close::Failed(reason))
            }
            Err(reason) => Outcome::Ended(Close::Failed(reason)),
        };
        (outcome, next)
    }

    /// Relays through one tunnel.
    async fn attempt(
        &self,
        mut pooled: Pooled,
        retained: &mut Retained,
        record: &mut ConnectionRecord,
        entry: &Entry,
    ) -> Outcome {
        let tunnel = &mut pooled.tunnel;
        let Some(stream) = tunnel.begin() else {
            return Outcome::Unused;
        };
        tunnel.queue(stream, &Control::Open(self.target.open));
        entry.set_proof(&pooled.proof);
        let end = {
            let count = Counted::source(record.bytes(), self.load);
            let relay = Relay::opener(self.app, tunnel, stream, &count, retained);
            let pod = turns::number(&self.share.uid);
            tokio::select! {
                biased;
                end = self.worker.fair.carry(pod, relay.run()) => Ok(end),
                why = entry.ended() => Err(why),
            }
        };
        let (rtt, retransmits) = tunnel.transport();
        record.set_transport(rtt, retransmits);
        if let Ok(End::Refused(why)) = &end {
            record.set_cause(why.cause.label());
        }
        // What policy refuses is ended at the application's socket too, once the plan is published:
        // that may be noticed here first.
        let end = match end {
            Ok(End::AppReset(error)) => match entry.refused(&self.worker.plan()) {
                Some(why) => Err(why),
                None => Ok(End::AppReset(error)),
            },
            end => end,
        };
        match end {
            Ok(end) => self.conclude(pooled, stream, end),
            Err(why) => {
                self.give_up(pooled.tunnel, stream, why.why());
                Outcome::Ended(why.close())
            }
        }
    }

    /// What becomes of the tunnel, and how the connection ended.
    fn conclude(&self, mut pooled: Pooled, stream: StreamId, end: End) -> Outcome {
        Outcome::Ended(match end {
            End::Finished { local_first } => {
                self.app.close_on_drop();
                self.keep(pooled);
                Close::Finished(if local_first {
                    ClosedBy::Local
                } else {
                    ClosedBy::Remote
                })
            }
            End::Refused(why) => {
                pooled.tunnel.end();
                self.keep(pooled);
                let close = refused(why);
                if is_about_the_endpoint(&close) {
                    return Outcome::NotMade(close);
                }
                if why.cause == Cause::Silent {
                    return Outcome::Silent(close);
                }
                close
            }
            End::AppReset(error) => {
                tracing::trace!(%error, "an application reset its connection");
                self.give_up(pooled.tunnel, stream, Why::APPLICATION);
                Close::Reset(ClosedBy::Local)
            }
            End::PeerReset(why) => {
                self.worker.close(vec![pooled.tunnel]);
                reset(why)
            }
            End::Tunnel { unused: true, .. } => return Outcome::Unused,
            End::Tunnel { error, .. } => {
                tracing::debug!(to = %self.target.key.to, error = %error, "a tunnel failed");
                if error.is_violation() {
                    self.worker.metrics().violated(Role::Client);
                    self.give_up(pooled.tunnel, stream, Why::new(Reason::Protocol));
                    Close::Failed(Reason::Protocol)
                } else {
                    Close::Reset(ClosedBy::Remote)
                }
            }
        })
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
}

/// How a connection ended that the other end refused.
pub(crate) fn refused(why: Why) -> Close {
    let reason = why.reason.unwrap_or(Reason::Protocol);
    if reason.is_policy_or_missing() {
        Close::Refused(Verdict::deny(reason, why.rule))
    } else {
        Close::Failed(reason)
    }
}

/// Whether a refusal says nothing about who asks: another endpoint may answer otherwise.
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

/// How a connection ended that the other end reset.
pub(crate) fn reset(why: Why) -> Close {
    match why.reason {
        Some(reason @ Reason::PolicyChanged) => Close::Changed(Verdict::deny(reason, why.rule)),
        Some(reason) => Close::Failed(reason),
        None => Close::Reset(ClosedBy::Remote),
    }
}

/// An `Arc<str>` of an identity, for records.
pub(crate) fn text(id: &SpiffeId) -> Arc<str> {
    id.to_string().into()
}
