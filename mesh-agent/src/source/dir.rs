// SPDX-License-Identifier: Apache-2.0
//! Manifests in a directory, for machines without a control plane, and for tests.
//!
//! One thread owns everything here and does all the file work; it reads 50 ms after something
//! changed, and in any case now and then. It ends when nobody listens any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use mesh_api::{LastGood, Options, convert};
use mesh_plan::cluster::Cluster;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{oneshot, watch};

use super::files::{Files, Scan};
use super::state::{Keeper, State};
use super::{Error, Report, Settings, Watched, announce, replace};

/// From a change to the scan: files that belong together are written one after the other.
const SETTLE: Duration = Duration::from_millis(50);
/// How often everything is read again though nothing was heard of, and listeners are looked for.
const RESCAN: Duration = Duration::from_secs(10);
/// How often listeners are looked for.
const TICK: Duration = Duration::from_secs(1);

const STANDALONE: Options = Options { standalone: true };

/// Starts the thread, and waits for its first facts.
pub(super) async fn watch(path: PathBuf, settings: Settings) -> Result<Watched, Error> {
    let (started, first) = oneshot::channel();
    thread::Builder::new()
        .name("source-dir".to_owned())
        .spawn(move || match Room::open(path, settings) {
            Ok((mut room, watched)) => {
                // A caller that is gone has dropped the receivers too: the room ends by itself.
                let _gone = started.send(Ok(watched));
                room.run();
            }
            Err(error) => {
                let _gone = started.send(Err(error));
            }
        })
        .map_err(Error::Thread)?;
    first
        .await
        .map_err(|ended| Error::Thread(std::io::Error::other(ended)))?
}

struct Room {
    path: PathBuf,
    settings: Settings,
    files: Files,
    last_good: LastGood,
    keeper: Keeper,
    cluster: watch::Sender<Arc<Cluster>>,
    report: watch::Sender<Arc<Report>>,
}

impl Room {
    fn open(path: PathBuf, settings: Settings) -> Result<(Self, Watched), Error> {
        let (keeper, kept) = Keeper::open(&settings.state_dir);
        let mut files = Files::new(path.clone(), kept.files);
        files.scan(Scan::Everything).map_err(|source| Error::Read {
            path: path.clone(),
            source,
        })?;
        let (cluster, clusters) = watch::channel(Arc::default());
        let (report, reports) = watch::channel(Arc::default());
        let mut room = Self {
            path,
            settings,
            files,
            last_good: kept.last_good,
            keeper,
            cluster,
            report,
        };
        room.publish(None);
        room.save();
        let watched = Watched {
            cluster: clusters,
            report: reports,
            complete: watch::channel(true).1,
        };
        Ok((room, watched))
    }

    fn run(&mut self) {
        let (wake, woken) = sync_channel(1);
        let mut listener = listen(&self.path, wake.clone());
        if let Err(error) = &listener {
            tracing::warn!(path = %self.path.display(), %error,
                "no news of manifests; they are read every {} s", RESCAN.as_secs());
        }
        // What changed between the first scan and the watch.
        let mut scan = Some(Scan::Changed);
        let mut scanned = Instant::now();
        while self.is_wanted() {
            if let Some(scan) = scan.take() {
                self.scan(scan);
                scanned = Instant::now();
            }
            if self
                .keeper
                .due()
                .is_some_and(|due| due <= tokio::time::Instant::now())
            {
                self.save();
            }
            match wait(&woken, TICK) {
                Ok(()) => scan = Some(Scan::Changed),
                Err(RecvTimeoutError::Timeout) if scanned.elapsed() >= RESCAN => {
                    // A directory that was replaced has a watch no more.
                    listener = listen(&self.path, wake.clone());
                    scan = Some(Scan::Everything);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        drop(listener);
    }

    fn is_wanted(&self) -> bool {
        !self.cluster.is_closed() || !self.report.is_closed()
    }

    fn scan(&mut self, scan: Scan) {
        match self.files.scan(scan) {
            Ok(true) => self.publish(None),
            Ok(false) if self.report.borrow().stale.is_some() => self.publish(None),
            Ok(false) => {}
            Err(error) => {
                let why = format!("{}: {error}", self.path.display());
                if self.report.borrow().stale.as_ref() != Some(&why) {
                    tracing::warn!(why, "manifests cannot be read; the last ones stay in force");
                    self.publish(Some(why));
                }
            }
        }
    }

    fn publish(&mut self, stale: Option<String>) {
        let mut outcome = convert(&self.files.objects(), &self.last_good, STANDALONE);
        outcome
            .cluster
            .pod_cidrs
            .extend(self.settings.pod_cidrs.iter().copied());
        let mut rejections = self.files.rejections();
        rejections.append(&mut outcome.rejections);
        let report = Report {
            rejections,
            warnings: outcome.warnings,
            stale,
            not_kept: self.report.borrow().not_kept.clone(),
            ..Report::default()
        };
        self.last_good = outcome.last_good;
        self.keeper.mark();
        announce(&self.report.borrow(), &report);
        replace(&self.report, report);
        replace(&self.cluster, outcome.cluster);
    }

    fn save(&mut self) {
        let state = State {
            last_good: self.last_good.clone(),
            files: self.files.kept(),
        };
        self.keeper.save(state, &self.report);
    }
}

/// Waits for a change, and for what belongs to it.
fn wait(woken: &Receiver<()>, pause: Duration) -> Result<(), RecvTimeoutError> {
    woken.recv_timeout(pause)?;
    thread::sleep(SETTLE);
    // Later changes wake again; those until now are part of the scan that follows.
    while woken.try_recv().is_ok() {}
    Ok(())
}

/// The kernel's news of a directory. Where they cannot be had, scans alone must do.
fn listen(path: &Path, wake: SyncSender<()>) -> notify::Result<RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| is_read(event.kind)) {
            return;
        }
        // Full = the scan is yet to come.
        let _pending = wake.try_send(());
    };
    let mut watcher = notify::recommended_watcher(handler)?;
    watcher.watch(path, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Reading is no change, and the scans read.
fn is_read(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
mod tests;
