// SPDX-License-Identifier: Apache-2.0
//! Leader election by a Lease of `coordination.k8s.io/v1`, compatible with client-go.
//!
//! The lease of another replica has expired if this replica has seen no change of it for its duration;
//! the clocks of the replicas need not agree. A leader that cannot renew the lease stops leading
//! before another replica may start.

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

/// The lease of another replica.
struct Observed {
    renew_time: Option<MicroTime>,
    holder: Option<String>,
    /// The time at which this version was first observed.
    since: Instant,
}

/// The use of the lease that a replica wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Hold,
    Release,
}

/// A replica that takes part in the election.
pub(super) struct Candidate {
    api: Api<Lease>,
    replica: String,
    duration: Duration,
    /// The last observed lease of another replica.
    observed: Option<Observed>,
}

impl Candidate {
    pub(super) fn new(client: Client, namespace: &str, replica: &str, duration: Duration) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            replica: replica.to_owned(),
            duration,
            observed: None,
        }
    }

    /// Acquires and renews the lease, and reports leadership in `leads`, until `stop` turns true. Then
    /// releases the lease.
    pub(super) async fn run(
        mut self,
        leads: watch::Sender<bool>,
        mut stop: watch::Receiver<bool>,
        now: fn() -> Timestamp,
    ) {
        let pause = self.duration / 5;
        let mut renewed = Instant::now();
        loop {
            let attempt = timeout(self.duration / 4, self.update(now(), Goal::Hold)).await;
            let begun = Instant::now();
            let holds = match attempt {
                Ok(Ok(holds)) => {
                    if holds {
                        renewed = begun;
                    }
                    holds
                }
                Ok(Err(error)) => {
                    warn_limited!("lease", error, "cannot read or renew the lease");
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
            let release = timeout(self.duration / 4, self.update(now(), Goal::Release)).await;
            if !matches!(release, Ok(Ok(_))) {
                tracing::info!("lease not released; another replica leads once it expires");
            }
        }
    }

    /// Acquires, renews or releases the lease. Returns whether this replica holds it afterwards.
    async fn update(&mut self, now: Timestamp, goal: Goal) -> kube::Result<bool> {
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            if goal == Goal::Release {
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
        let next = match (ours, goal) {
            (true, Goal::Hold) => {
                let acquired = spec.acquire_time.clone();
                let mut next = self.spec(now, transitions);
                next.acquire_time = acquired;
                next
            }
            (true, Goal::Release) => {
                let mut next = self.spec(now, transitions);
                next.holder_identity = Some(String::new());
                next
            }
            (false, Goal::Hold) if holder.is_none() || self.has_expired(spec) => {
                self.spec(now, transitions.saturating_add(1))
            }
            (false, _) => return Ok(false),
        };
        lease.spec = Some(next);
        let written = self.api.replace(NAME, &PostParams::default(), &lease).await;
        self.write(written).map(|done| done && goal == Goal::Hold)
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

    /// Tells whether the lease of another replica has not changed for its duration.
    fn has_expired(&mut self, spec: &LeaseSpec) -> bool {
        match &self.observed {
            Some(seen)
                if seen.renew_time == spec.renew_time && seen.holder == spec.holder_identity =>
            {
                let seconds = spec
                    .lease_duration_seconds
                    .and_then(|s| u64::try_from(s).ok());
                seen.since.elapsed() > seconds.map_or(self.duration, Duration::from_secs)
            }
            _ => {
                self.observed = Some(Observed {
                    renew_time: spec.renew_time.clone(),
                    holder: spec.holder_identity.clone(),
                    since: Instant::now(),
                });
                false
            }
        }
    }

    /// Evaluates a write. On a conflict, another replica was faster.
    fn write(&self, result: kube::Result<Lease>) -> kube::Result<bool> {
        match result {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }
}
