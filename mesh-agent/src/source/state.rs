// SPDX-License-Identifier: Apache-2.0
//! Last good versions over a restart: one file, replaced as a whole.

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
/// Last good versions are written at most this often.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// What is kept. Unknown fields are ignored and missing ones empty, so that agents of neighbouring
/// versions read each other's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct State {
    pub(super) last_good: LastGood,
    pub(super) files: Kept,
}

/// Keeps the last good versions on disk: what changed is written at most once a second.
pub(super) struct Keeper {
    store: Store,
    /// Something is to be written.
    changed: bool,
    /// What the file holds.
    kept: State,
    saved: Option<Instant>,
}

impl Keeper {
    /// Opens what an earlier run kept.
    pub(super) fn open(dir: &Path) -> (Self, State) {
        let store = Store::new(dir.to_owned());
        let (kept, not_read) = store.load();
        if let Some(why) = not_read {
            tracing::warn!(why, "last good versions of an earlier run cannot be read");
        }
        let keeper = Self {
            store,
            changed: false,
            kept: kept.clone(),
            saved: None,
        };
        (keeper, kept)
    }

    /// What is to be kept may have changed.
    pub(super) fn mark(&mut self) {
        self.changed = true;
    }

    /// When to write next; `None` = there is nothing to write.
    pub(super) fn due(&self) -> Option<Instant> {
        let due = self
            .saved
            .map_or_else(Instant::now, |saved| saved + SAVE_INTERVAL);
        self.changed.then_some(due)
    }

    /// Writes it, and says in the report if that fails; then it is tried again.
    pub(super) fn save(&mut self, state: State, report: &watch::Sender<Arc<Report>>) {
        if let Some(draft) = self.draft(state) {
            self.saved(draft.write(), report);
        }
    }

    /// What is to be written now, if anything, for who cannot wait for a disk.
    pub(super) fn draft(&mut self, state: State) -> Option<Draft> {
        self.saved = Some(Instant::now());
        self.changed = false;
        let store = self.store.clone();
        (state != self.kept).then_some(Draft { store, state })
    }

    /// Takes note of what was written, and says in the report if that failed; then it is tried again.
    pub(super) fn saved(&mut self, written: Written, report: &watch::Sender<Arc<Report>>) {
        let not_kept = written.failed;
        match &not_kept {
            Some(why) => {
                if report.borrow().not_kept.as_ref() != Some(why) {
                    tracing::warn!(why, "last good versions cannot be kept over a restart");
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

/// What is to be written.
pub(super) struct Draft {
    store: Store,
    state: State,
}

/// What was written, or why not.
pub(super) struct Written {
    state: State,
    failed: Option<String>,
}

impl Draft {
    /// Waits for the disk.
    pub(super) fn write(self) -> Written {
        let failed = self.store.save(&self.state).err();
        Written {
            state: self.state,
            failed,
        }
    }
}

/// Removes what is kept in a directory; nothing there is no error.
///
/// # Errors
/// When a file stays; its path comes with it.
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

/// The file.
#[derive(Clone)]
struct Store {
    dir: PathBuf,
}

impl Store {
    fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// What was kept; nothing, with a reason, where that cannot be read.
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

    /// Replaces what is kept; after a crash it is the old or the new.
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
