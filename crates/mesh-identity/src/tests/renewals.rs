// SPDX-License-Identifier: Apache-2.0
//! Days in the life of a certificate, on tokio's paused clock.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use tokio::time::{Instant, sleep, sleep_until};

use super::pki::{DAY, config, id, want};
use crate::{
    Ca, Clock, Error, Identities, SpiffeId,
    issuer::{BoxFuture, IssueError, Issued, Issuer, SelfSigned},
};

/// A wall clock that goes with tokio's.
fn clock() -> Clock {
    let start = Instant::now();
    Clock::new(move || UNIX_EPOCH + Duration::from_secs(1_800_000_000) + start.elapsed())
}

/// `self:`, with a switch.
struct Moody {
    good: SelfSigned,
    down: AtomicBool,
    silent: AtomicBool,
    asked: AtomicU32,
}

impl Issuer for Moody {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.silent.load(Ordering::SeqCst) {
            return Box::pin(std::future::pending());
        }
        if self.down.load(Ordering::SeqCst) {
            return Box::pin(std::future::ready(Err(IssueError::Empty)));
        }
        self.good.issue(id)
    }
}

struct Life {
    identities: Identities,
    issuer: Arc<Moody>,
    wanted: super::pki::Wanted,
    born: Instant,
    _dir: tempfile::TempDir,
}

impl Life {
    async fn begin(names: &[&str], down: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = clock();
        let good = SelfSigned::open(dir.path(), clock.clone()).await.unwrap();
        let issuer = Arc::new(Moody {
            good,
            down: down.into(),
            silent: false.into(),
            asked: 0.into(),
        });
        let (wanted, ids) = want(names);
        let config = config(Ca::SelfSigned(dir.path().to_owned()), clock);
        let shared: Arc<dyn Issuer> = Arc::<Moody>::clone(&issuer);
        let (_, revoked) = tokio::sync::watch::channel(Arc::default());
        let identities = Identities::with(shared, config, ids, revoked);
        Self {
            identities,
            issuer,
            wanted,
            born: Instant::now(),
            _dir: dir,
        }
    }

    fn asked(&self) -> u32 {
        self.issuer.asked.load(Ordering::SeqCst)
    }

    async fn at(&self, age: Duration) {
        sleep_until(self.born + age).await;
    }

    async fn next_change(&self) -> Duration {
        let mut changes = self.identities.subscribe();
        changes.mark_unchanged();
        changes.changed().await.unwrap();
        self.born.elapsed()
    }
}

#[tokio::test(start_paused = true)]
async fn certificates_are_renewed_about_half_way_and_not_all_at_once() {
    let life = Life::begin(&["web", "db", "cron"], false).await;
    for name in ["web", "db", "cron"] {
        life.identities.ready(&id(name)).await.unwrap();
    }
    assert!(
        life.born.elapsed() < Duration::from_secs(1),
        "asked for as soon as wanted"
    );
    assert_eq!(life.asked(), 3);
    let first = life.identities.certificate(&id("web")).unwrap();
    life.at(DAY.mul_f64(0.44)).await;
    assert_eq!(life.asked(), 3);
    let times = [
        life.next_change().await,
        life.next_change().await,
        life.next_change().await,
    ];
    assert!(times[2] < DAY.mul_f64(0.56), "{times:?}");
    assert!(times[0] < times[1] && times[1] < times[2], "{times:?}");
    let second = life.identities.certificate(&id("web")).unwrap();
    assert!(second.not_after() > first.not_after());
    life.at(10 * DAY).await;
    let rounds = life.asked() / 3;
    assert!((17..=25).contains(&rounds), "about twice a day: {rounds}");
    life.identities.server(&id("web")).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_ca_that_is_down_is_asked_again_ever_more_slowly() {
    let life = Life::begin(&["web"], true).await;
    life.at(Duration::from_secs(3)).await;
    assert!((3..=5).contains(&life.asked()), "{}", life.asked());
    assert!(matches!(
        life.identities.server(&id("web")),
        Err(Error::NotReady(_))
    ));
    life.at(Duration::from_secs(3600)).await;
    let asked = life.asked();
    assert!(
        (55..=80).contains(&asked),
        "at most once a minute then: {asked}"
    );
    life.issuer.down.store(false, Ordering::SeqCst);
    life.identities.ready(&id("web")).await.unwrap();
    assert!(life.born.elapsed() < Duration::from_secs(3600 + 70));
}

#[tokio::test(start_paused = true)]
async fn without_a_ca_the_old_certificate_is_used_until_its_end_and_not_after() {
    let life = Life::begin(&["web"], false).await;
    let first = life.identities.ready(&id("web")).await.unwrap();
    life.issuer.down.store(true, Ordering::SeqCst);
    life.at(DAY - Duration::from_secs(5)).await;
    life.identities.server(&id("web")).unwrap();
    life.identities.client(&id("web"), &id("db")).unwrap();
    assert!(life.asked() > 100, "it kept asking: {}", life.asked());
    life.at(DAY + Duration::from_secs(5)).await;
    assert!(matches!(
        life.identities.server(&id("web")),
        Err(Error::Expired(_))
    ));
    assert!(matches!(
        life.identities.client(&id("web"), &id("db")),
        Err(Error::Expired(_))
    ));
    assert_eq!(life.identities.expiries(), [(id("web"), first.not_after())]);
    life.issuer.down.store(false, Ordering::SeqCst);
    life.next_change().await;
    life.identities.server(&id("web")).unwrap();
    assert!(
        life.born.elapsed() < DAY + Duration::from_secs(75),
        "by itself, within a minute"
    );
}

#[tokio::test(start_paused = true)]
async fn a_ca_that_never_answers_is_given_up() {
    let life = Life::begin(&["web"], false).await;
    life.identities.ready(&id("web")).await.unwrap();
    life.issuer.silent.store(true, Ordering::SeqCst);
    life.at(DAY / 2 + DAY / 10).await;
    let asked = life.asked();
    assert!(asked > 10, "{asked}");
    life.issuer.silent.store(false, Ordering::SeqCst);
    life.next_change().await;
    assert!(life.born.elapsed() < DAY / 2 + DAY / 10 + Duration::from_secs(100));
}

#[tokio::test(start_paused = true)]
async fn certificates_come_and_go_with_what_is_wanted() {
    let life = Life::begin(&["web"], false).await;
    life.identities.ready(&id("web")).await.unwrap();
    life.wanted.send_replace(BTreeSet::from([id("db")]));
    life.identities.ready(&id("db")).await.unwrap();
    assert!(life.identities.certificate(&id("web")).is_none());
    assert_eq!(life.identities.expiries().len(), 1);
    let asked = life.asked();
    life.at(DAY / 3).await;
    assert_eq!(life.asked(), asked, "nobody asks for what is not wanted");
    life.wanted
        .send_replace(BTreeSet::from([id("db"), id("web")]));
    life.identities.ready(&id("web")).await.unwrap();
    assert_eq!(life.identities.expiries().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn nothing_runs_on_when_nobody_can_want_anything() {
    let Life {
        identities,
        issuer,
        wanted,
        ..
    } = Life::begin(&["web"], false).await;
    identities.ready(&id("web")).await.unwrap();
    drop(wanted);
    let mut changes = identities.subscribe();
    while changes.changed().await.is_ok() {}
    let asked = issuer.asked.load(Ordering::SeqCst);
    sleep(3 * DAY).await;
    assert_eq!(issuer.asked.load(Ordering::SeqCst), asked);
}
