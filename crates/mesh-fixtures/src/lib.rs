// SPDX-License-Identifier: Apache-2.0
//! Files of the repository that tests compare with: the committed corpus of `fuzz/`, and generated
//! documents.
//!
//! Each parser of bytes from outside has a fuzz entry point that reports which branches its input took
//! ([`Seen`]), so that a plain test can tell whether the committed corpus takes all of them.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The branches that an input took, in order.
pub type Seen = Vec<&'static str>;

/// Encodes DER as PEM.
#[must_use]
pub fn pem(label: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, der))
}

/// Splits `data` into pieces. Each piece follows its length, two bytes in network order; the last piece
/// may be shorter than its length says.
#[must_use]
pub fn pieces(mut data: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (piece, behind) = rest.split_at(length);
        pieces.push(piece);
        data = behind;
    }
    pieces
}

/// Joins pieces into the form that [`pieces`] splits.
///
/// # Panics
/// If a piece is longer than 65,535 bytes.
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

/// Runs a fuzz entry point over its committed corpus, `fuzz/corpus/TARGET`, and checks that the corpus
/// takes all `ways` and no others. `MESH_CORPUS=1` writes `seeds` first; their keys and signatures
/// differ each time.
///
/// # Panics
/// If the corpus cannot be read, misses a branch, or takes one that is not in `ways`.
pub fn replay(
    target: &str,
    door: impl Fn(&[u8]) -> Seen,
    ways: &[&'static str],
    seeds: impl FnOnce() -> Vec<(&'static str, Vec<u8>)>,
) {
    let dir = root().join("fuzz/corpus").join(target);
    if is_set("MESH_CORPUS") {
        fs::create_dir_all(&dir).expect("the corpus can be written");
        for (name, bytes) in seeds() {
            fs::write(dir.join(name), bytes).expect("the corpus can be written");
        }
    }
    let mut gone = BTreeSet::new();
    for entry in fs::read_dir(&dir).expect("the corpus is there") {
        let path = entry.expect("it can be listed").path();
        let bytes = fs::read(&path).expect("it can be read");
        gone.extend(door(&bytes));
    }
    let ways = ways.iter().copied().collect::<BTreeSet<_>>();
    let never: Vec<_> = ways.difference(&gone).collect();
    let unknown: Vec<_> = gone.difference(&ways).collect();
    assert!(
        never.is_empty() && unknown.is_empty(),
        "{target}: never {never:?}, unknown {unknown:?}"
    );
}

/// Compares a generated file of the repository with its expected content; `MESH_BLESS=1` rewrites it.
///
/// # Panics
/// If the file differs.
pub fn golden(path: &str, expected: &str) {
    let file = root().join(path);
    if is_set("MESH_BLESS") {
        fs::write(&file, expected).expect("the generated file can be written");
        return;
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == expected,
        "{path} is not what the code says. Run: cargo xtask generate"
    );
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}
