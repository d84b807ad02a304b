// SPDX-License-Identifier: Apache-2.0
//! Certificate revocation lists (RFC 5280, 5): read from files, and again when these change.
//!
//! A list counts for the certificates of the CA that signed it, and for no others. One that has
//! expired still counts: who could have it forgotten by holding back the next one could take every
//! revocation back. A file that cannot be read leaves its last good lists in force.

use std::{
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject as _};
use tokio::sync::watch;
use webpki::{Cert, CertRevocationList, EndEntityCert, OwnedCertRevocationList};
use x509_parser::{
    prelude::FromDer as _, revocation_list::CertificateRevocationList as ParsedList,
};

use super::verify::system_time;

/// Polling sees what notification misses: symbolic links that are swapped, network mounts.
const POLL: Duration = Duration::from_secs(2);
/// Larger files are not read: a list of a million certificates has 40 MB.
const MOST_BYTES: u64 = 64 << 20;

/// Why a file of revocation lists is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CrlError {
    /// It cannot be read.
    #[error("cannot read the revocation list {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no revocation list in PEM or DER.
    #[error("{} holds no revocation list in PEM or DER: {why}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// A list and where it came from.
struct List {
    path: Arc<Path>,
    list: CertRevocationList<'static>,
    next_update: Option<SystemTime>,
}

/// All lists at one moment.
#[derive(Default)]
pub(super) struct Revoked {
    lists: Vec<List>,
    version: u64,
}

impl fmt::Debug for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lists", self.lists.len())
    }
}

impl Revoked {
    /// The lists of one file.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of(path: &Path, lists: Lists) -> Self {
        combine(&[File {
            path: path.into(),
            version: 1,
            lists,
        }])
    }

    /// Tells one state of all lists from another; 0 = there is none.
    pub(super) const fn version(&self) -> u64 {
        self.version
    }

    /// Until when each list promises to be the latest, by file.
    pub(super) fn next_updates(&self) -> impl Iterator<Item = (&Path, SystemTime)> {
        let all = self.lists.iter();
        all.filter_map(|list| Some((&*list.path, list.next_update?)))
    }

    /// The lists that name a certificate of this chain under its issuer's name. Whether the issuer
    /// has signed them is to be asked next: CAs may have the same name.
    pub(super) fn naming<'a>(
        &'a self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
    ) -> Vec<&'a CertRevocationList<'static>> {
        if self.lists.is_empty() {
            return Vec::new();
        }
        let chain = std::iter::once(leaf).chain(above);
        let chain: Vec<_> = chain
            .filter_map(|der| EndEntityCert::try_from(der).ok())
            .collect();
        let names = |list: &CertRevocationList<'_>, certificate: &Cert<'_>| {
            list.issuer() == certificate.issuer()
                && matches!(list.find_serial(certificate.serial()), Ok(Some(_)))
        };
        let lists = self.lists.iter().map(|list| &list.list);
        lists
            .filter(|list| chain.iter().any(|certificate| names(list, certificate)))
            .collect()
    }
}

/// One file as it was last read.
struct File {
    path: Arc<Path>,
    version: u64,
    lists: Vec<(OwnedCertRevocationList, Option<SystemTime>)>,
}

/// Reads the files, and goes on doing so for as long as somebody wants to know.
///
/// # Errors
/// A file that cannot be used at the start: the agent does not run without what it was told to ask.
pub(super) async fn follow(paths: Vec<PathBuf>) -> Result<watch::Receiver<Arc<Revoked>>, CrlError> {
    let mut files = Vec::new();
    for path in paths {
        files.push(read(path.into()).await?);
    }
    let (sender, receiver) = watch::channel(Arc::new(combine(&files)));
    if files.is_empty() {
        // Nobody changes it: the receiver keeps what it has.
        return Ok(receiver);
    }
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            if again(&mut files).await {
                tracing::info!(revoked = ?combine(&files), "new revocation lists");
                sender.send_replace(Arc::new(combine(&files)));
            }
        }
    });
    Ok(receiver)
}

/// Reads all files again; whether one has changed.
async fn again(files: &mut [File]) -> bool {
    let mut changed = false;
    for file in files {
        match read(Arc::clone(&file.path)).await {
            Ok(now) => {
                changed |= now.version != file.version;
                *file = now;
            }
            Err(why) => tracing::warn!(
                why = &why as &dyn std::error::Error,
                "the last good revocation list stays in force"
            ),
        }
    }
    changed
}

fn combine(files: &[File]) -> Revoked {
    let mut hasher = DefaultHasher::new();
    let mut lists = Vec::new();
    for file in files {
        file.version.hash(&mut hasher);
        lists.extend(file.lists.iter().map(|(list, next_update)| List {
            path: Arc::clone(&file.path),
            list: list.clone().into(),
            next_update: *next_update,
        }));
    }
    let version = if files.is_empty() {
        0
    } else {
        hasher.finish() | 1
    };
    Revoked { lists, version }
}

async fn read(path: Arc<Path>) -> Result<File, CrlError> {
    let failed = |source| CrlError::Read {
        path: path.to_path_buf(),
        source,
    };
    let size = tokio::fs::metadata(&path).await.map_err(failed)?.len();
    if size > MOST_BYTES {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    let bytes = tokio::fs::read(&path).await.map_err(failed)?;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let lists = parse(&bytes).map_err(|why| CrlError::Syntax {
        path: path.to_path_buf(),
        why,
    })?;
    Ok(File {
        path,
        version: hasher.finish(),
        lists,
    })
}

pub(super) type Lists = Vec<(OwnedCertRevocationList, Option<SystemTime>)>;

/// All lists of a PEM file, or the one of a DER file. None is as wrong as a broken one.
pub(super) fn parse(bytes: &[u8]) -> Result<Lists, String> {
    let pem: Vec<_> = CertificateRevocationListDer::pem_slice_iter(bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())?;
    let ders = if pem.is_empty() {
        vec![CertificateRevocationListDer::from(bytes)]
    } else {
        pem
    };
    ders.iter()
        .map(|der| {
            let list = OwnedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
            let next = ParsedList::from_der(der).ok();
            let next = next.and_then(|(_, parsed)| parsed.next_update());
            Ok((list, next.map(|time| system_time(time.timestamp()))))
        })
        .collect()
}
