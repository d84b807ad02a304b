// SPDX-License-Identifier: Apache-2.0
//! Keeps a certificate for each identity that is wanted.
//!
//! A task per identity asks the issuer, checks what it gives, and asks again at half life or
//! when the issuer's sources change; one task owns the snapshot that all of them end up in.
//! A certificate is replaced, never taken away because a newer one cannot be had.

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

/// An issuer that has not answered by then is asked again.
const PATIENCE: Duration = Duration::from_secs(15);
/// The delay between a failed request for a certificate and the next one.
const RETRY: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(60),
    jitter: 0.9..=1.1,
};
/// Timers are monotonic and stand still while a machine sleeps: the wall clock is asked this
/// often whether it is time.
const GLANCE: Duration = Duration::from_secs(300);
/// However short-lived the certificates are that an issuer gives, it is not asked more often.
const RENEWAL_MIN: Duration = Duration::from_secs(5);
/// Certificates on their way to the snapshot.
const QUEUE: usize = 64;

/// What the task of each identity works with.
#[derive(Clone)]
pub(super) struct Keeper {
    pub(super) issuer: Arc<dyn Issuer>,
    pub(super) rules: Rules,
    pub(super) clock: Clock,
    pub(super) spread: Spread,
    /// What CAs have revoked.
    pub(super) revoked: watch::Receiver<Arc<Revoked>>,
}

/// Runs until nobody can want anything any more.
pub(super) async fn run(
    keeper: Keeper,
    mut wanted: watch::Receiver<BTreeSet<SpiffeId>>,
    writer: watch::Sender<Arc<Snapshot>>,
) {
    let (sender, mut fresh) = mpsc::channel::<Arc<Certificate>>(QUEUE);
    let mut tasks = Tasks::default();
    let mut revoked = keeper.revoked.clone();
    let mut present = Present {
        keeper: keeper.clone(),
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
                    tokio::spawn(keep(keeper.clone(), id, sender.clone(), writer.subscribe()))
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

/// The running tasks; they end with this.
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

/// What the next snapshot is made of.
struct Present {
    keeper: Keeper,
    served: BTreeMap<SpiffeId, Arc<Served>>,
    taken: u64,
    revoked: Arc<Revoked>,
}

impl Present {
    fn take(&mut self, certificate: Arc<Certificate>) {
        self.taken += 1;
        let epoch = Epoch {
            certificate: self.taken,
            bundle: self.keeper.rules.bundle.revision(),
        };
        self.serve(certificate, epoch);
    }

    fn serve(&mut self, certificate: Arc<Certificate>, epoch: Epoch) {
        let rules = self.keeper.rules.clone();
        match tls::server(&certificate, rules, &self.keeper.clock) {
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

    /// The roots are those of all certificates in use: when a new root comes, whoever learns of
    /// it first makes it known to all, and the last certificate that came with an old root
    /// takes it away.
    fn snapshot(&mut self) -> Snapshot {
        let roots = self
            .served
            .values()
            .flat_map(|s| s.certificate.roots.roots().iter().cloned());
        let (bundle, _counted_before) = Bundle::new(roots);
        let bundle = bundle.with(Arc::clone(&self.revoked));
        if bundle.revision() != self.keeper.rules.bundle.revision() {
            tracing::info!(?bundle, "new trust bundle");
            self.keeper.rules.bundle = Arc::new(bundle);
            let revision = self.keeper.rules.bundle.revision();
            for served in self.served.values().cloned().collect::<Vec<_>>() {
                let epoch = Epoch {
                    bundle: revision,
                    ..served.epoch
                };
                self.serve(Arc::clone(&served.certificate), epoch);
            }
        }
        Snapshot {
            bundle: Arc::clone(&self.keeper.rules.bundle),
            revoked: self.revoked(),
            served: self.served.clone(),
        }
    }

    /// Whose certificate every peer with the same lists refuses. It stays in use until there is
    /// another: where peers have no lists, it does what it did.
    fn revoked(&self) -> BTreeSet<SpiffeId> {
        let now = unix_time(self.keeper.clock.now());
        let rules = &self.keeper.rules;
        let served = self.served.iter();
        served
            .filter(|(_, served)| rules.is_revoked_now(&served.certificate.key.cert, now))
            .map(|(id, _)| id.clone())
            .collect()
    }
}

/// Keeps one identity's certificate, for ever.
async fn keep(
    keeper: Keeper,
    id: SpiffeId,
    fresh: mpsc::Sender<Arc<Certificate>>,
    mut present: watch::Receiver<Arc<Snapshot>>,
) {
    let mut failures = 0;
    let mut round = 0;
    loop {
        let (certificate, version) = match keeper.ask(&id).await {
            Ok(got) => got,
            Err(why) => {
                let pause = keeper.pause(&id, failures);
                failures += 1;
                tracing::warn!(
                    %id, failures, ?pause, why = &why as &dyn std::error::Error,
                    "no new certificate"
                );
                sleep(pause).await;
                continue;
            }
        };
        failures = 0;
        round += 1;
        let certificate = Arc::new(certificate);
        tracing::info!(?certificate, "certificate");
        let renew_at = keeper.renew_at(&certificate, round);
        if fresh.send(Arc::clone(&certificate)).await.is_err() {
            return;
        }
        let revoked = async {
            let is_revoked = |now: &Arc<Snapshot>| now.is_revoked(&certificate);
            if present.wait_for(is_revoked).await.is_err() {
                std::future::pending::<()>().await;
            }
            tracing::error!(%id, "our own certificate is revoked: peers refuse it; asking for another");
        };
        let due = async {
            if !keeper.issuer.renews() {
                keeper.until(renew_at).await;
                tracing::warn!(%id, "half of the certificate's life is over: renew its files");
                std::future::pending::<()>().await;
            }
            tokio::join!(sleep(RENEWAL_MIN), keeper.until(renew_at));
        };
        tokio::select! {
            () = due => {}
            () = keeper.issuer.changed(&id, version) => {}
            () = revoked => {}
        }
    }
}

impl Keeper {
    async fn ask(&self, id: &SpiffeId) -> Result<(Certificate, Version), IssueError> {
        let issued = timeout(PATIENCE, pin!(self.issuer.issue(id))).await;
        let issued = issued.map_err(|_elapsed| IssueError::Timeout)??;
        let version = issued.version;
        let revoked = Arc::clone(&self.revoked.borrow());
        let rules = (self.rules.clone(), revoked);
        let certificate = Certificate::check(id, issued, rules, self.clock.now())?;
        Ok((certificate, version))
    }

    fn pause(&self, id: &SpiffeId, failures: u32) -> Duration {
        RETRY.delay(failures, self.spread.fraction(id, failures))
    }

    /// Half way between now and the end, a tenth earlier or later.
    fn renew_at(&self, certificate: &Certificate, round: u32) -> SystemTime {
        let now = self.clock.now();
        let left = certificate
            .not_after()
            .duration_since(now)
            .unwrap_or_default();
        now + self.spread.around(left / 2, certificate.id(), round)
    }

    async fn until(&self, time: SystemTime) {
        while let Ok(left) = time.duration_since(self.clock.now())
            && !left.is_zero()
        {
            sleep(left.min(GLANCE)).await;
        }
    }
}
