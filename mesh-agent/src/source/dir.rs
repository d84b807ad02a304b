// SPDX-License-Identifier: Apache-2.0
//! Reads manifests in a directory, for machines without a control plane and for tests.
//!
//! One thread does all the file I/O. It scans the directory 50 ms after a change, and periodically
//! without one. It ends when the subscription is dropped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use mesh_api::{LastGood, Options, convert};
use mesh_plan::cluster::ClusterSnapshot;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{oneshot, watch};

use super::files::{Files, Scan};
use super::state::{LastGoodFile, State};
use super::{Error, Report, Settings, Watched, log_new_messages, replace};

/// The delay from a change to the scan: related files are often written one after the other.
const SETTLE: Duration = Duration::from_millis(50);
/// The interval of full scans without a notification.
const RESCAN: Duration = Duration::from_secs(10);
/// The interval at which the subscription is checked.
const TICK: Duration = Duration::from_secs(1);

const STANDALONE: Options = Options { standalone: true };

/// Starts the thread, and waits for the first snapshot.
pub(super) async fn watch(path: PathBuf, settings: Settings) -> Result<Watched, Error> {
    let (started, first) = oneshot::channel();
    thread::Builder::new()
        .name("source-dir".to_owned())
        .spawn(move || match DirSource::open(path, settings) {
            Ok((mut source, watched)) => {
                // A caller that is gone has dropped the receivers too, which ends the thread.
                let _gone = started.send(Ok(watched));
                source.run();
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

struct DirSource {
    path: PathBuf,
    settings: Settings,
    files: Files,
    last_good: LastGood,
    saved: LastGoodFile,
    cluster: watch::Sender<Arc<ClusterSnapshot>>,
    report: watch::Sender<Arc<Report>>,
}

impl DirSource {
    fn open(path: PathBuf, settings: Settings) -> Result<(Self, Watched), Error> {
        let (saved, kept) = LastGoodFile::open(&settings.state_dir);
        let mut files = Files::new(path.clone(), kept.files);
        files.scan(Scan::Everything).map_err(|source| Error::Read {
            path: path.clone(),
            source,
        })?;
        let (cluster, clusters) = watch::channel(Arc::default());
        let (report, reports) = watch::channel(Arc::default());
        let mut source = Self {
            path,
            settings,
            files,
            last_good: kept.last_good,
            saved,
            cluster,
            report,
        };
        source.publish(None);
        source.save();
        let watched = Watched {
            cluster: clusters,
            report: reports,
            complete: watch::channel(true).1,
        };
        Ok((source, watched))
    }

    fn run(&mut self) {
        let (wake, woken) = sync_channel(1);
        let mut listener = listen(&self.path, wake.clone());
        if let Err(error) = &listener {
            tracing::warn!(path = %self.path.display(), %error,
                "cannot watch manifests for changes; scanning every {} s", RESCAN.as_secs());
        }
        // Files may have changed between the first scan and the watch.
        let mut scan = Some(Scan::Changed);
        let mut scanned = Instant::now();
        while self.is_wanted() {
            if let Some(scan) = scan.take() {
                self.scan(scan);
                scanned = Instant::now();
            }
            if self
                .saved
                .due()
                .is_some_and(|due| due <= tokio::time::Instant::now())
            {
                self.save();
            }
            match wait(&woken, TICK) {
                Ok(()) => scan = Some(Scan::Changed),
                Err(RecvTimeoutError::Timeout) if scanned.elapsed() >= RESCAN => {
                    // A directory that was replaced is not watched any more.
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
                    tracing::warn!(
                        why,
                        "cannot read manifests; the last snapshot stays in force"
                    );
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
        self.saved.mark();
        log_new_messages(&self.report.borrow(), &report);
        replace(&self.report, report);
        replace(&self.cluster, outcome.cluster);
    }

    fn save(&mut self) {
        let state = State {
            last_good: self.last_good.clone(),
            files: self.files.kept(),
        };
        self.saved.save(state, &self.report);
    }
}

/// Waits for a change, and for related changes shortly after it.
fn wait(woken: &Receiver<()>, pause: Duration) -> Result<(), RecvTimeoutError> {
    woken.recv_timeout(pause)?;
    thread::sleep(SETTLE);
    // The next scan covers the changes until now; a later change wakes again.
    while woken.try_recv().is_ok() {}
    Ok(())
}

/// Watches a directory for changes. Without a watch, the periodic scans remain.
fn listen(path: &Path, wake: SyncSender<()>) -> notify::Result<RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| is_read(event.kind)) {
            return;
        }
        // A full channel means that a scan is already due.
        let _pending = wake.try_send(());
    };
    let mut watcher = notify::recommended_watcher(handler)?;
    watcher.watch(path, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Whether an event is a read. The scans read files, and that is not a change.
fn is_read(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
mod tests;
