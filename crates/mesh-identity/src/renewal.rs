// SPDX-License-Identifier: Apache-2.0
//! Renewal of the certificates of all wanted identities.
//!
//! A task per identity requests a certificate, validates it, and requests a new one at half of its
//! lifetime or when the issuer's sources change. One task owns the snapshot with all certificates. A
//! certificate stays in use until it is replaced, even if renewals fail.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{sleep, timeout},
};

use super::{
    Bundle, Certificate, Clock, Epoch, Served, Snapshot, SpiffeId,
    clock::{Spread, unix_time},
    issuer::{IssueError, Issuer, Version},
    revocation::Revoked,
    tls,
    verify::Rules,
};
use mesh_backoff::Backoff;

/// The time that a request to the issuer may take.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(15);
/// The delay between a failed request for a certificate and the next one.
const RETRY: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(60),
    jitter: 0.9..=1.1,
};
/// Interval of checks of the wall clock: monotonic timers stand still while a machine sleeps.
const CLOCK_CHECK: Duration = Duration::from_secs(300);
/// Minimum time between two renewals of an identity, however short the lifetime.
const RENEWAL_MIN: Duration = Duration::from_secs(5);
/// Size of the queue of certificates for the snapshot.
const QUEUE: usize = 64;

/// The dependencies of the task of each identity.
#[derive(Clone)]
pub(super) struct Renewer {
    pub(super) issuer: Arc<dyn Issuer>,
    pub(super) rules: Rules,
    pub(super) clock: Clock,
    pub(super) spread: Spread,
    /// The revocation lists.
    pub(super) revoked: watch::Receiver<Arc<Revoked>>,
}

/// Maintains the certificates of the wanted identities until the sender of `wanted` is dropped.
pub(super) async fn run(
    renewer: Renewer,
    mut wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    writer: watch::Sender<Arc<Snapshot>>,
) {
    let (sender, mut fresh) = mpsc::channel::<Arc<Certificate>>(QUEUE);
    let mut tasks = Tasks::default();
    let mut revoked = renewer.revoked.clone();
    let mut present = Present {
        renewer: renewer.clone(),
        served: BTreeMap::new(),
        taken: 0,
        revoked: Arc::clone(&revoked.borrow_and_update()),
    };
    wanted.mark_changed();
    loop {
        tokio::select! {
            change = wanted.changed() => {
                if change.is_err() {
                    return;
                }
                let ids = wanted.borrow_and_update().clone();
                tasks.adjust(&ids, |id| {
                    tokio::spawn(maintain(renewer.clone(), id, sender.clone(), writer.subscribe()))
                });
                present.served.retain(|id, _| ids.contains(id));
            }
            certificate = fresh.recv() => {
                let Some(certificate) = certificate else { return };
                if !tasks.0.contains_key(certificate.id()) {
                    continue;
                }
                present.take(certificate);
            }
            Ok(()) = revoked.changed() => {
                present.revoked = Arc::clone(&revoked.borrow_and_update());
            }
        }
        writer.send_replace(Arc::new(present.snapshot()));
    }
}

/// The running tasks, aborted on drop.
#[derive(Default)]
struct Tasks(BTreeMap<SpiffeId, AbortHandle>);

impl Tasks {
    fn adjust(
        &mut self,
        ids: &BTreeSet<SpiffeId>,
        start: impl Fn(SpiffeId) -> tokio::task::JoinHandle<()>,
    ) {
        self.0.retain(|id, task| {
            let stays = ids.contains(id);
            if !stays {
                task.abort();
            }
            stays
        });
        for id in ids {
            if let btree_map::Entry::Vacant(place) = self.0.entry(id.clone()) {
                place.insert(start(id.clone()).abort_handle());
            }
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.values().for_each(AbortHandle::abort);
    }
}

/// The state from which snapshots are built.
struct Present {
    renewer: Renewer,
    served: BTreeMap<SpiffeId, Arc<Served>>,
    taken: u64,
    revoked: Arc<Revoked>,
}

impl Present {
    fn take(&mut self, certificate: Arc<Certificate>) {
        self.taken += 1;
        let epoch = Epoch {
            certificate: self.taken,
            bundle: self.renewer.rules.bundle.revision(),
        };
        self.serve(certificate, epoch);
    }

    fn serve(&mut self, certificate: Arc<Certificate>, epoch: Epoch) {
        let rules = self.renewer.rules.clone();
        match tls::server(&certificate, rules, &self.renewer.clock) {
            Ok(server) => {
                let id = certificate.id().clone();
                self.served.insert(
                    id,
                    Arc::new(Served {
                        certificate,
                        server,
                        epoch,
                    }),
                );
            }
            Err(why) => tracing::error!(id = %certificate.id(), %why, "cannot configure TLS"),
        }
    }

    /// Builds the snapshot. The bundle holds the roots of all certificates in use: a new root is trusted
    /// once the first certificate brings it, and an old root until the last certificate that brought
    /// it is replaced.
    fn snapshot(&mut self) -> Snapshot {
        let roots = self
            .served
            .values()
            .flat_map(|s| s.certificate.roots.roots().iter().cloned());
        let (bundle, _unreadable) = Bundle::new(roots);
        let bundle = bundle.with(Arc::clone(&self.revoked));
        if bundle.revision() != self.renewer.rules.bundle.revision() {
            tracing::info!(?bundle, "trust bundle changed");
            self.renewer.rules.bundle = Arc::new(bundle);
            let revision = self.renewer.rules.bundle.revision();
            for served in self.served.values().cloned().collect::<Vec<_>>() {
                let epoch = Epoch {
                    bundle: revision,
                    ..served.epoch
                };
                self.serve(Arc::clone(&served.certificate), epoch);
            }
        }
        Snapshot {
            bundle: Arc::clone(&self.renewer.rules.bundle),
            revoked: self.revoked(),
            served: self.served.clone(),
        }
    }

    /// Returns the identities whose certificate is revoked. The certificate stays in use until it is
    /// replaced: peers without these lists still accept it.
    fn revoked(&self) -> BTreeSet<SpiffeId> {
        let now = unix_time(self.renewer.clock.now());
        let rules = &self.renewer.rules;
        let served = self.served.iter();
        served
            .filter(|(_, served)| rules.is_revoked_now(&served.certificate.key.cert, now))
            .map(|(id, _)| id.clone())
            .collect()
    }
}

/// Maintains the certificate of an identity until it is aborted.
async fn maintain(
    renewer: Renewer,
    id: SpiffeId,
    fresh: mpsc::Sender<Arc<Certificate>>,
    mut present: watch::Receiver<Arc<Snapshot>>,
) {
    let mut failures = 0;
    let mut round = 0;
    loop {
        let (certificate, version) = match renewer.request(&id).await {
            Ok(got) => got,
            Err(why) => {
                let pause = renewer.pause(&id, failures);
                failures += 1;
                tracing::warn!(
                    %id, failures, ?pause, why = &why as &dyn std::error::Error,
                    "cannot obtain a certificate; retrying"
                );
                sleep(pause).await;
                continue;
            }
        };
        failures = 0;
        round += 1;
        let certificate = Arc::new(certificate);
        tracing::info!(?certificate, "certificate obtained");
        let renew_at = renewer.renew_at(&certificate, round);
        if fresh.send(Arc::clone(&certificate)).await.is_err() {
            return;
        }
        let revoked = async {
            let is_revoked = |now: &Arc<Snapshot>| now.is_revoked(&certificate);
            if present.wait_for(is_revoked).await.is_err() {
                std::future::pending::<()>().await;
            }
            tracing::error!(%id, "certificate revoked: peers refuse it; requesting another");
        };
        let due = async {
            if !renewer.issuer.renews() {
                renewer.until(renew_at).await;
                tracing::warn!(%id, "half of the certificate's lifetime has passed: renew its files");
                std::future::pending::<()>().await;
            }
            tokio::join!(sleep(RENEWAL_MIN), renewer.until(renew_at));
        };
        tokio::select! {
            () = due => {}
            () = renewer.issuer.changed(&id, version) => {}
            () = revoked => {}
        }
    }
}

impl Renewer {
    /// Requests a certificate, and validates it.
    async fn request(&self, id: &SpiffeId) -> Result<(Certificate, Version), IssueError> {
        let issued = timeout(ISSUE_TIMEOUT, pin!(self.issuer.issue(id))).await;
        let issued = issued.map_err(|_elapsed| IssueError::Timeout)??;
        let version = issued.version;
        let revoked = Arc::clone(&self.revoked.borrow());
        let rules = (self.rules.clone(), revoked);
        let certificate = Certificate::check(id, issued, rules, self.clock.now())?;
        Ok((certificate, version))
    }

    /// Returns the delay before the next request.
    fn pause(&self, id: &SpiffeId, failures: u32) -> Duration {
        RETRY.delay(failures, self.spread.fraction(id, failures))
    }

    /// Returns half of the remaining lifetime, give or take a tenth.
    fn renew_at(&self, certificate: &Certificate, round: u32) -> SystemTime {
        let now = self.clock.now();
        let left = certificate
            .not_after()
            .duration_since(now)
            .unwrap_or_default();
        now + self.spread.around(left / 2, certificate.id(), round)
    }

    /// Waits for a time of the wall clock.
    async fn until(&self, time: SystemTime) {
        while let Ok(left) = time.duration_since(self.clock.now())
            && !left.is_zero()
        {
            sleep(left.min(CLOCK_CHECK)).await;
        }
    }
}
