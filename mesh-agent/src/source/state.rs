// SPDX-License-Identifier: Apache-2.0
//! Last good versions over a restart: one file, replaced as a whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mesh_api::LastGood;
use serde::{Deserialize, Serialize};

use super::files::Kept;

const NAME: &str = "last-good.json";
const DRAFT: &str = ".last-good.json.draft";

/// What is kept. Unknown fields are ignored and missing ones empty, so that agents of neighbouring
/// versions read each other's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct State {
    pub(super) last_good: LastGood,
    pub(super) files: Kept,
}

/// The file.
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// What was kept; nothing, with a reason, where that cannot be read.
    pub(super) fn load(&self) -> (State, Option<String>) {
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
    pub(super) fn save(&self, state: &State) -> Result<(), String> {
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
