// SPDX-License-Identifier: Apache-2.0
//! The manifests below a directory: read when they change, and kept when they cannot be read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mesh_api::Object;
use mesh_api::manifests::{Format, objects};
use mesh_plan::cluster::{ObjectRef, Rejection};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Larger files are not manifests that somebody wrote.
const MAX_FILE: u64 = 64 << 20;
/// Directories deeper than this are a loop of mounts.
const MAX_DEPTH: usize = 32;

/// The objects that each file had when it was last good, by path below the directory. What
/// survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Kept(BTreeMap<PathBuf, Vec<Value>>);

/// A directory of manifests.
pub(super) struct Files {
    root: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// What an earlier run had, for files that are broken now.
    before: Kept,
    /// Directories that cannot be listed.
    unreadable: BTreeSet<PathBuf>,
}

#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    content: u64,
    /// As of when it was last good; `None` = it never was.
    objects: Option<Vec<Value>>,
    error: Option<String>,
}

/// What changes when a file does.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// How thorough a scan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// Files whose stamp changed.
    Changed,
    /// The content of every file: for what a stamp does not show.
    Everything,
}

impl Files {
    pub(super) fn new(root: PathBuf, before: Kept) -> Self {
        Self {
            root,
            files: BTreeMap::new(),
            before,
            unreadable: BTreeSet::new(),
        }
    }

    /// Reads what changed; true = something did. Files below a directory that cannot be listed stay
    /// as they were.
    ///
    /// # Errors
    /// The directory itself cannot be listed; nothing has changed then.
    pub(super) fn scan(&mut self, scan: Scan) -> io::Result<bool> {
        let mut found = Found::default();
        found.walk(&self.root, Path::new(""), 0)?;
        let mut changed = self.unreadable != found.unreadable;
        let lost = |path: &Path| found.unreadable.iter().any(|dir| path.starts_with(dir));
        let before = self.files.len();
        self.files
            .retain(|path, _| found.files.contains_key(path) || lost(path));
        changed |= self.files.len() != before;
        for (path, format) in found.files {
            let known = self.files.entry(path.clone()).or_insert_with(|| {
                changed = true;
                File {
                    objects: self.before.0.remove(&path),
                    ..File::default()
                }
            });
            changed |= known.read(&self.root.join(&path), format, scan);
        }
        self.unreadable = found.unreadable;
        Ok(changed)
    }

    /// Every object, and where it is.
    pub(super) fn objects(&self) -> Vec<Object> {
        let objects = self.files.iter().flat_map(|(path, file)| {
            let origin = path.display().to_string();
            file.objects.iter().flatten().map(move |value| Object {
                origin: origin.clone(),
                value: value.clone(),
            })
        });
        objects.collect()
    }

    /// Files that are broken, and what holds instead.
    pub(super) fn rejections(&self) -> Vec<Rejection> {
        let broken = self.files.iter().filter_map(|(path, file)| {
            let why = file.error.clone()?;
            Some(Rejection {
                object: ObjectRef::new("File", "", path.display().to_string()),
                field: "content".to_owned(),
                why,
                consequence: match &file.objects {
                    Some(_) => "the objects that it had when it was last good stay in force",
                    None => "nothing in it is used",
                }
                .to_owned(),
            })
        });
        let lost = self.unreadable.iter().map(|path| Rejection {
            object: ObjectRef::new("Directory", "", path.display().to_string()),
            field: "content".to_owned(),
            why: "cannot be listed, or lies too deep".to_owned(),
            consequence: "what was read in it last stays in force".to_owned(),
        });
        broken.chain(lost).collect()
    }

    /// What is to survive a restart.
    pub(super) fn kept(&self) -> Kept {
        let files = self.files.iter();
        let good = files.filter_map(|(path, file)| Some((path.clone(), file.objects.clone()?)));
        Kept(good.collect())
    }
}

impl File {
    /// Reads the file if it changed; true = it did.
    fn read(&mut self, path: &Path, format: Format, scan: Scan) -> bool {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) => return self.fail(error.to_string()),
        };
        // Taken before the content: a change in between is seen by the next scan.
        let stamp = Stamp::of(&metadata);
        if self.stamp == Some(stamp) && scan == Scan::Changed {
            return false;
        }
        let text = match text_of(path) {
            Ok(text) => text,
            Err(error) => {
                self.stamp = None;
                return self.fail(error.to_string());
            }
        };
        let content = hash(&text);
        if self.stamp.is_some() && content == self.content {
            self.stamp = Some(stamp);
            return false;
        }
        self.stamp = Some(stamp);
        self.content = content;
        match objects(&text, format) {
            Ok(objects) => {
                let changed = self.error.is_some() || self.objects.as_ref() != Some(&objects);
                self.objects = Some(objects);
                self.error = None;
                changed
            }
            Err(error) => self.fail(error.to_string()),
        }
    }

    fn fail(&mut self, why: String) -> bool {
        let changed = self.error.as_ref() != Some(&why);
        self.error = Some(why);
        changed
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn text_of(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?
        .take(MAX_FILE + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::other("is larger than 64 MiB"));
    }
    Ok(text)
}

#[derive(Default)]
struct Found {
    files: BTreeMap<PathBuf, Format>,
    unreadable: BTreeSet<PathBuf>,
}

impl Found {
    /// Hidden files and directories are left out: editors and volume mounts put drafts there.
    fn walk(&mut self, root: &Path, below: &Path, depth: usize) -> io::Result<()> {
        for entry in fs::read_dir(root.join(below))? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(text) = name.to_str().filter(|name| !name.starts_with('.')) else {
                continue;
            };
            let path = below.join(&name);
            // Follows links: volume mounts consist of them.
            let Ok(metadata) = fs::metadata(root.join(&path)) else {
                continue;
            };
            if metadata.is_dir() {
                if depth >= MAX_DEPTH || self.walk(root, &path, depth + 1).is_err() {
                    self.unreadable.insert(path);
                }
            } else if let Some(format) = Format::of(text)
                && metadata.is_file()
            {
                self.files.insert(path, format);
            }
        }
        Ok(())
    }
}
