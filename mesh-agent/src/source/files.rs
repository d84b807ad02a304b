// SPDX-License-Identifier: Apache-2.0
//! The manifest files below a directory: parsed when they change, and kept when they become invalid.
//!
//! Each document of a file stands alone. While one of them cannot be read, the last good version of every object
//! that the others do not have stays in force, because it may be the one that the document is about.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mesh_api::Object;
use mesh_api::manifests::{self, Format, Reading};
use mesh_plan::cluster::{ObjectRef, Rejection};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The largest manifest file, in bytes.
const MAX_FILE: u64 = 64 << 20;
/// The deepest directory: deeper ones are a loop of mounts.
const MAX_DEPTH: usize = 32;

/// The objects of the last valid version of each file, by path below the directory. They survive a
/// restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Kept(BTreeMap<PathBuf, Vec<Value>>);

/// A directory of manifests.
pub(super) struct Files {
    root: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// The objects of an earlier run, for files that are invalid now.
    before: Kept,
    /// The directories that cannot be listed.
    unreadable: BTreeSet<PathBuf>,
}

#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    content: u64,
    /// The objects of the documents that can be read; of the last good version if the file as a whole cannot.
    /// `None` if no version had any that could be read.
    objects: Option<Vec<Value>>,
    /// The last good versions of other objects, while a document cannot be read.
    earlier: Vec<Value>,
    error: Option<String>,
}

/// The metadata that changes when a file changes.
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

/// The files that a scan reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// The files whose stamp changed.
    Changed,
    /// Every file, for changes that a stamp does not show.
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

    /// Reads the files that changed, and returns whether any did. Files below a directory that cannot be
    /// listed stay unchanged.
    ///
    /// # Errors
    /// The root directory cannot be listed. Nothing changes in that case.
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

    /// Every object with its file. An earlier version is used only if no file has the object now.
    pub(super) fn objects(&self) -> Vec<Object> {
        let of_file = |path: &Path, value: &Value| Object {
            origin: path.display().to_string(),
            value: value.clone(),
        };
        let mut objects: Vec<Object> = self
            .files
            .iter()
            .flat_map(|(path, file)| file.objects.iter().flatten().map(|it| of_file(path, it)))
            .collect();
        if self.files.values().all(|file| file.earlier.is_empty()) {
            return objects;
        }
        let now: BTreeSet<_> = objects.iter().map(|it| identity(&it.value)).collect();
        let earlier = self
            .files
            .iter()
            .flat_map(|(path, file)| file.earlier.iter().map(|it| of_file(path, it)));
        objects.extend(earlier.filter(|it| !now.contains(&identity(&it.value))));
        objects
    }

    /// The invalid files and their consequences.
    pub(super) fn rejections(&self) -> Vec<Rejection> {
        let broken = self.files.iter().filter_map(|(path, file)| {
            let why = file.error.clone()?;
            Some(Rejection {
                object: ObjectRef::new("File", "", path.display().to_string()),
                field: "content".to_owned(),
                why,
                consequence: match (&file.objects, &*file.earlier) {
                    (None, []) => "its objects are ignored",
                    (Some(_), []) => "its other documents are in force",
                    (_, _) => {
                        "its other documents are in force, and the objects of its last good version that they \
                         do not have"
                    }
                }
                .to_owned(),
            })
        });
        let lost = self.unreadable.iter().map(|path| Rejection {
            object: ObjectRef::new("Directory", "", path.display().to_string()),
            field: "content".to_owned(),
            why: "cannot be listed, or is nested too deeply".to_owned(),
            consequence: "the objects read from it before stay in force".to_owned(),
        });
        broken.chain(lost).collect()
    }

    /// The objects that must survive a restart.
    pub(super) fn kept(&self) -> Kept {
        let files = self.files.iter();
        let good = files.filter_map(|(path, file)| {
            let objects: Vec<Value> = file.all().cloned().collect();
            (file.objects.is_some() || !objects.is_empty()).then(|| (path.clone(), objects))
        });
        Kept(good.collect())
    }
}

impl File {
    /// Reads the file if it changed, and returns whether it did.
    fn read(&mut self, path: &Path, format: Format, scan: Scan) -> bool {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) => {
                self.stamp = None;
                return self.fail(error.to_string());
            }
        };
        // The stamp is taken before the content, so the next scan sees a change in between.
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
        self.take(manifests::read(&text, format))
    }

    /// The objects of this and of earlier versions.
    fn all(&self) -> impl Iterator<Item = &Value> {
        self.objects.iter().flatten().chain(&self.earlier)
    }

    /// Puts a reading of the file in force, and returns whether anything changed.
    fn take(&mut self, reading: Reading) -> bool {
        let error = explain(&reading.errors);
        let mut earlier = Vec::new();
        if error.is_some() {
            let read: BTreeSet<_> = reading.objects.iter().map(identity).collect();
            let others = self.all().filter(|it| !read.contains(&identity(it)));
            earlier.extend(others.cloned());
        }
        let is_empty = error.is_some() && reading.objects.is_empty();
        let objects = (!is_empty).then_some(reading.objects);
        let changed = self.error != error || self.objects != objects || self.earlier != earlier;
        (self.objects, self.earlier, self.error) = (objects, earlier, error);
        changed
    }

    /// Keeps everything as it is while the file cannot be read at all.
    fn fail(&mut self, why: String) -> bool {
        self.earlier
            .extend(self.objects.take().into_iter().flatten());
        let changed = self.error.as_ref() != Some(&why);
        self.error = Some(why);
        changed
    }
}

/// The first error, and the number of others; `None` = no error.
fn explain(errors: &[manifests::Error]) -> Option<String> {
    let (first, others) = errors.split_first()?;
    Some(match others.len() {
        0 => first.to_string(),
        more => format!("{first}; {more} more of its documents cannot be read"),
    })
}

/// The group, kind, namespace and name of an object.
fn identity(object: &Value) -> [String; 4] {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = text(&object["apiVersion"]);
    let group = version.rsplit_once('/').map_or("", |(group, _)| group);
    let metadata = &object["metadata"];
    let namespace = Some(text(&metadata["namespace"])).filter(|it| !it.is_empty());
    [
        group.to_owned(),
        text(&object["kind"]),
        namespace.unwrap_or_else(|| "default".to_owned()),
        text(&metadata["name"]),
    ]
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
        return Err(io::Error::other("file is larger than 64 MiB"));
    }
    Ok(text)
}

#[derive(Default)]
struct Found {
    files: BTreeMap<PathBuf, Format>,
    unreadable: BTreeSet<PathBuf>,
}

impl Found {
    /// Finds the manifests below a directory. Skips hidden files and directories: editors and volume mounts
    /// keep drafts there.
    fn walk(&mut self, root: &Path, below: &Path, depth: usize) -> io::Result<()> {
        for entry in fs::read_dir(root.join(below))? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(text) = name.to_str().filter(|name| !name.starts_with('.')) else {
                continue;
            };
            let path = below.join(&name);
            // This follows links, because volume mounts consist of them.
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
