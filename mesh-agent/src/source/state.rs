// SPDX-License-Identifier: Apache-2.0
//! Saves the last good versions across restarts, in one file that is replaced atomically.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::LastGood;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Report;
use super::files::Kept;

const NAME: &str = "last-good.json";
const DRAFT: &str = ".last-good.json.draft";
/// The shortest interval between two writes.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// The content of the file. Unknown fields are ignored and absent ones empty, so that agents of adjacent
/// versions can read each other's files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct State {
    pub(super) last_good: LastGood,
    pub(super) files: Kept,
}

/// The file with the last good versions. Changes are written at most once per second.
pub(super) struct LastGoodFile {
    store: Store,
    /// Whether there may be a change to write.
    changed: bool,
    /// The content of the file on disk.
    kept: State,
    saved: Option<Instant>,
}

impl LastGoodFile {
    /// Reads the file of an earlier run.
    pub(super) fn open(dir: &Path) -> (Self, State) {
        let store = Store::new(dir.to_owned());
        let (kept, not_read) = store.load();
        if let Some(why) = not_read {
            tracing::warn!(why, "cannot read the last good versions of an earlier run");
        }
        let file = Self {
            store,
            changed: false,
            kept: kept.clone(),
            saved: None,
        };
        (file, kept)
    }

    /// Records that the content may have changed.
    pub(super) fn mark(&mut self) {
        self.changed = true;
    }

    /// The time of the next write; `None` if there is nothing to write.
    pub(super) fn due(&self) -> Option<Instant> {
        let due = self
            .saved
            .map_or_else(Instant::now, |saved| saved + SAVE_INTERVAL);
        self.changed.then_some(due)
    }

    /// Writes the file. A failure is reported, and the write is retried.
    pub(super) fn save(&mut self, state: State, report: &watch::Sender<Arc<Report>>) {
        if let Some(draft) = self.draft(state) {
            self.saved(draft.write(), report);
        }
    }

    /// The draft to write now, if the content changed. The caller can write it on another thread.
    pub(super) fn draft(&mut self, state: State) -> Option<Draft> {
        self.saved = Some(Instant::now());
        self.changed = false;
        let store = self.store.clone();
        (state != self.kept).then_some(Draft { store, state })
    }

    /// Records the result of a write. A failure is reported, and the write is retried.
    pub(super) fn saved(&mut self, written: Written, report: &watch::Sender<Arc<Report>>) {
        let not_kept = written.failed;
        match &not_kept {
            Some(why) => {
                if report.borrow().not_kept.as_ref() != Some(why) {
                    tracing::warn!(
                        why,
                        "cannot save the last good versions; a restart would lose them"
                    );
                }
                self.changed = true;
            }
            None => self.kept = written.state,
        }
        report.send_if_modified(|report| {
            let changed = report.not_kept != not_kept;
            if changed {
                Arc::make_mut(report).not_kept = not_kept;
            }
            changed
        });
    }
}

/// Content that must be written.
pub(super) struct Draft {
    store: Store,
    state: State,
}

/// The result of a write.
pub(super) struct Written {
    state: State,
    failed: Option<String>,
}

impl Draft {
    /// Writes the file and waits for the disk.
    pub(super) fn write(self) -> Written {
        let failed = self.store.save(&self.state).err();
        Written {
            state: self.state,
            failed,
        }
    }
}

/// Removes the file from a directory. An absent file is not an error.
///
/// # Errors
/// A file cannot be removed. The error has its path.
pub(crate) fn remove(dir: &Path) -> Result<(), (PathBuf, io::Error)> {
    for name in [NAME, DRAFT] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err((path, error)),
            _ => {}
        }
    }
    Ok(())
}

/// The place of the file.
#[derive(Clone)]
struct Store {
    dir: PathBuf,
}

impl Store {
    fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Reads the state; an empty state with the reason if the file cannot be read.
    fn load(&self) -> (State, Option<String>) {
        let path = self.dir.join(NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Default::default(),
            Err(error) => return (State::default(), Some(describe(&path, &error))),
        };
        match serde_json::from_slice(&text) {
            Ok(state) => (state, None),
            Err(error) => (State::default(), Some(describe(&path, &error))),
        }
    }

    /// Replaces the file atomically: after a crash, it has the old or the new state.
    fn save(&self, state: &State) -> Result<(), String> {
        let path = self.dir.join(NAME);
        self.replace(&path, state)
            .map_err(|error| describe(&path, &error))
    }

    fn replace(&self, path: &Path, state: &State) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let draft = self.dir.join(DRAFT);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(&serde_json::to_vec(state)?)?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        File::open(&self.dir)?.sync_all()
    }
}

fn describe(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}
