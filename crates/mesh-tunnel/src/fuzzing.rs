// SPDX-License-Identifier: Apache-2.0
//! Entry points for `fuzz/`: each takes any bytes from outside, and checks what must hold for them.

pub use crate::frame::fuzz::frames;
pub use crate::records::fuzz::records;

/// The branches that an input took, in order.
pub(crate) type Seen = Vec<&'static str>;

/// Splits `data` into pieces. Each piece follows its length, two bytes in network order; the last piece
/// may be shorter than its length says.
pub(crate) fn pieces(mut data: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (piece, behind) = rest.split_at(length);
        pieces.push(piece);
        data = behind;
    }
    pieces
}

#[cfg(test)]
pub(crate) mod corpus {
    //! The committed corpus: `fuzz/corpus/TARGET/NAME`.

    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::Seen;

    /// Joins pieces into the form that [`super::pieces`] splits.
    pub(crate) fn join(pieces: &[&[u8]]) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in pieces {
            let length = u16::try_from(piece.len()).expect("a short piece");
            all.extend(length.to_be_bytes());
            all.extend_from_slice(piece);
        }
        all
    }

    /// Runs an entry point over its corpus, which must take all `branches` and no others.
    /// `MESH_CORPUS=1` writes `seeds` first.
    pub(crate) fn replay(
        target: &str,
        entry: impl Fn(&[u8]) -> Seen,
        branches: &[&'static str],
        seeds: impl FnOnce() -> Vec<(&'static str, Vec<u8>)>,
    ) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let dir = root.join("fuzz/corpus").join(target);
        if std::env::var_os("MESH_CORPUS").is_some_and(|value| value == "1") {
            fs::create_dir_all(&dir).expect("the corpus can be written");
            for (name, bytes) in seeds() {
                fs::write(dir.join(name), bytes).expect("the corpus can be written");
            }
        }
        let mut taken = BTreeSet::new();
        for entry_file in fs::read_dir(&dir).expect("the corpus exists") {
            let path = entry_file.expect("a directory entry").path();
            let bytes = fs::read(&path).expect("a readable file");
            taken.extend(entry(&bytes));
        }
        let branches = branches.iter().copied().collect::<BTreeSet<_>>();
        let missed: Vec<_> = branches.difference(&taken).collect();
        let unknown: Vec<_> = taken.difference(&branches).collect();
        assert!(
            missed.is_empty() && unknown.is_empty(),
            "{target}: missed {missed:?}, unknown {unknown:?}"
        );
    }
}
