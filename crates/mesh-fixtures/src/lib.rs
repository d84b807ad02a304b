// SPDX-License-Identifier: Apache-2.0
//! Test access to files of the repository: the committed fuzzing corpus in `fuzz/`, and generated documents.
//!
//! Each parser of untrusted input has a fuzz entry point that reports which branches an input takes ([`Seen`]), so
//! that a unit test can check that the committed corpus takes all branches.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The branches that an input takes, in order.
pub type Seen = Vec<&'static str>;

/// Encodes DER as PEM.
#[must_use]
pub fn pem(label: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, der))
}

/// Splits `data` into pieces, each prefixed with its length as two bytes in network byte order. The last piece may
/// be shorter than its length prefix.
#[must_use]
pub fn pieces(mut data: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (piece, remaining) = rest.split_at(length);
        pieces.push(piece);
        data = remaining;
    }
    pieces
}

/// Joins pieces into the format that [`pieces`] splits.
///
/// # Panics
/// A piece is longer than 65,535 bytes.
#[must_use]
pub fn join(pieces: &[&[u8]]) -> Vec<u8> {
    let mut all = Vec::new();
    for piece in pieces {
        let length = u16::try_from(piece.len()).expect("a short piece");
        all.extend(length.to_be_bytes());
        all.extend_from_slice(piece);
    }
    all
}

/// Runs a fuzz entry point over its committed corpus, `fuzz/corpus/TARGET`, and checks that the corpus takes
/// exactly the given `branches`. With `MESH_CORPUS=1`, writes `seeds` to the corpus first; their keys and
/// signatures differ each time.
///
/// # Panics
/// The corpus cannot be read, misses a branch, or takes one that is not in `branches`.
pub fn replay(
    target: &str,
    entry_point: impl Fn(&[u8]) -> Seen,
    branches: &[&'static str],
    seeds: impl FnOnce() -> Vec<(&'static str, Vec<u8>)>,
) {
    let dir = root().join("fuzz/corpus").join(target);
    if is_set("MESH_CORPUS") {
        fs::create_dir_all(&dir).expect("create the corpus directory");
        for (name, bytes) in seeds() {
            fs::write(dir.join(name), bytes).expect("write the corpus file");
        }
    }
    let mut taken = BTreeSet::new();
    for entry in fs::read_dir(&dir).expect("read the corpus directory") {
        let path = entry.expect("read the corpus directory").path();
        let bytes = fs::read(&path).expect("read the corpus file");
        taken.extend(entry_point(&bytes));
    }
    let branches = branches.iter().copied().collect::<BTreeSet<_>>();
    let missed: Vec<_> = branches.difference(&taken).collect();
    let unknown: Vec<_> = taken.difference(&branches).collect();
    assert!(
        missed.is_empty() && unknown.is_empty(),
        "{target}: missed branches {missed:?}, unknown branches {unknown:?}"
    );
}

/// Compares a generated file of the repository with its expected content. With `MESH_BLESS=1`, rewrites the file.
///
/// # Panics
/// The file differs.
pub fn golden(path: &str, expected: &str) {
    let file = root().join(path);
    if is_set("MESH_BLESS") {
        fs::write(&file, expected).expect("write the generated file");
        return;
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == expected,
        "{path} is out of date. Run: cargo xtask generate"
    );
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}
