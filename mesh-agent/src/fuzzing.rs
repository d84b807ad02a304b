// SPDX-License-Identifier: Apache-2.0
//! Doors for `fuzz/`: whatever parses bytes from outside, each with what must hold for any bytes.
//!
//! A door says which of its parser's ways the bytes went, so that a plain test can tell whether the
//! committed corpus goes all of them. Compiled for tests and by `cargo xtask fuzz` only.

/// The ways that some bytes went, in order.
pub type Seen = Vec<&'static str>;

/// A peer's chain, with a root and a revocation list.
pub fn certificate(data: &[u8]) -> Seen {
    crate::identity::fuzz::certificate(data)
}

/// A file of revocation lists.
pub fn crl(data: &[u8]) -> Seen {
    crate::identity::fuzz::crl(data)
}

/// What a CA answers.
pub fn answer(data: &[u8]) -> Seen {
    crate::identity::fuzz::answer(data)
}

/// What the controller's CA is asked for.
pub fn csr(data: &[u8]) -> Seen {
    crate::controller::fuzz::csr(data)
}

/// DER as PEM.
pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, der))
}

/// Cuts `data` into pieces: two bytes of length before each, in network order; the last may be
/// shorter than it says.
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

    /// What [`super::pieces`] takes apart.
    pub(crate) fn join(pieces: &[&[u8]]) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in pieces {
            let length = u16::try_from(piece.len()).expect("a short piece");
            all.extend(length.to_be_bytes());
            all.extend_from_slice(piece);
        }
        all
    }

    /// Runs a door over its corpus, which must go all `ways` and no others. `MESH_CORPUS=1` writes
    /// `seeds` first; keys and signatures in them are other ones each time.
    pub(crate) fn replay(
        target: &str,
        door: impl Fn(&[u8]) -> Seen,
        ways: &[&'static str],
        seeds: impl FnOnce() -> Vec<(&'static str, Vec<u8>)>,
    ) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let dir = root.join("fuzz/corpus").join(target);
        if std::env::var_os("MESH_CORPUS").is_some_and(|value| value == "1") {
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
}
