// SPDX-License-Identifier: Apache-2.0
//! Who leads: a Lease of `coordination.k8s.io/v1`, as client-go uses it.
//!
//! Another's lease counts as ended when it did not change for its own duration by our clock, so that
//! clocks need not agree. A leader that cannot renew stops to lead before others may begin.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use mesh_log::warn_limited;

/// The name of the Lease.
const NAME: &str = "mesh-controller";

/// One replica's view of the lease.
pub(super) struct Candidate {
    api: Api<Lease>,
    replica: String,
    duration: Duration,
    /// What another holder wrote last, and when that was first seen.
    seen: Option<(Option<MicroTime>, Option<String>, Instant)>,
}

impl Candidate {
    pub(super) fn new(client: Client, namespace: &str, replica: &str, duration: Duration) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            replica: replica.to_owned(),
            duration,
            seen: None,
        }
    }

    /// Leads whenever it can, and says so, until `stop` turns true; then lets go of the lease.
    pub(super) async fn run(
        mut self,
        leads: watch::Sender<bool>,
        mut stop: watch::Receiver<bool>,
        now: fn() -> Timestamp,
    ) {
        let pause = self.duration / 5;
        let mut renewed = Instant::now();
        loop {
            let attempt = timeout(self.duration / 4, self.hold(now(), true)).await;
            let begun = Instant::now();
            let holds = match attempt {
                Ok(Ok(holds)) => {
                    if holds {
                        renewed = begun;
                    }
                    holds
                }
                Ok(Err(error)) => {
                    warn_limited!("lease", error, "the lease cannot be read or renewed");
                    *leads.borrow() && renewed.elapsed() < self.duration / 2
                }
                Err(_elapsed) => *leads.borrow() && renewed.elapsed() < self.duration / 2,
            };
            let changed = leads.send_if_modified(|leads| std::mem::replace(leads, holds) != holds);
            if changed {
                tracing::info!(leads = holds, replica = self.replica, "leadership changed");
            }
            tokio::select! {
                () = sleep(pause) => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
        }
        if leads.send_replace(false) {
            let release = timeout(self.duration / 4, self.hold(now(), false)).await;
            if !matches!(release, Ok(Ok(_))) {
                tracing::info!("the lease was not released; another replica leads when it ends");
            }
        }
    }

    /// Takes or renews the lease (or lets go of it, if it is ours); whether it is ours then.
    async fn hold(&mut self, now: Timestamp, want: bool) -> kube::Result<bool> {
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            if !want {
                return Ok(false);
            }
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.to_owned()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(now, 0)),
            };
            return self.write(self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.get_or_insert_default();
        let holder = spec.holder_identity.clone().filter(|name| !name.is_empty());
        let ours = holder.as_deref() == Some(&*self.replica);
        let transitions = spec.lease_transitions.unwrap_or(0);
        let next = match (ours, want) {
            (true, true) => {
                let acquired = spec.acquire_time.clone();
                let mut next = self.spec(now, transitions);
                next.acquire_time = acquired;
                next
            }
            (true, false) => {
                let mut next = self.spec(now, transitions);
                next.holder_identity = Some(String::new());
                next
            }
            (false, true) if holder.is_none() || self.has_ended(spec) => {
                self.spec(now, transitions.saturating_add(1))
            }
            (false, _) => return Ok(false),
        };
        lease.spec = Some(next);
        let written = self.api.replace(NAME, &PostParams::default(), &lease).await;
        self.write(written).map(|done| done && want)
    }

    fn spec(&self, now: Timestamp, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.replica.clone()),
            lease_duration_seconds: i32::try_from(self.duration.as_secs()).ok(),
            acquire_time: Some(MicroTime(now)),
            renew_time: Some(MicroTime(now)),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    /// Whether another's lease did not change for its whole duration.
    fn has_ended(&mut self, spec: &LeaseSpec) -> bool {
        let (renewed, holder) = (spec.renew_time.clone(), spec.holder_identity.clone());
        match &self.seen {
            Some((time, name, since)) if *time == renewed && *name == holder => {
                let seconds = spec
                    .lease_duration_seconds
                    .and_then(|s| u64::try_from(s).ok());
                since.elapsed() > seconds.map_or(self.duration, Duration::from_secs)
            }
            _ => {
                self.seen = Some((renewed, holder, Instant::now()));
                false
            }
        }
    }

    /// A conflict means that another replica was faster.
    fn write(&self, result: kube::Result<Lease>) -> kube::Result<bool> {
        match result {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }
}
