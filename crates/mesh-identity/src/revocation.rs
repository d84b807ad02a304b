// SPDX-License-Identifier: Apache-2.0
//! Certificate revocation lists (RFC 5280, 5), read from files and reloaded on changes.
//!
//! A list applies only to certificates of the CA that signed it. An expired list still applies:
//! otherwise, withholding the next list would undo every revocation. When a file cannot be read, its
//! last valid lists stay in use.

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

/// Interval of checks for changes. Polling also sees swapped symbolic links and network mounts.
const POLL: Duration = Duration::from_secs(2);
/// Maximum size of a file. A list of a million certificates has 40 MB.
const MAX_BYTES: u64 = 64 << 20;

/// A failure to load a file of revocation lists.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CrlError {
    /// The file cannot be read.
    #[error("cannot read the revocation list {}", .path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file is not a revocation list in PEM or DER.
    #[error("{} is not a revocation list in PEM or DER: {why}", .path.display())]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Error of the parser.
        why: String,
    },
}

/// A list and its file.
struct List {
    path: Arc<Path>,
    list: CertRevocationList<'static>,
    next_update: Option<SystemTime>,
}

/// All lists at a point in time.
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
    /// Makes a set of the lists of one file.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of(path: &Path, lists: Lists) -> Self {
        combine(&[File {
            path: path.into(),
            version: 1,
            lists,
        }])
    }

    /// Returns a hash of all lists; 0 = no lists are configured.
    pub(super) const fn version(&self) -> u64 {
        self.version
    }

    /// Returns the promised time of the next update of each list, with its file.
    pub(super) fn next_updates(&self) -> impl Iterator<Item = (&Path, SystemTime)> {
        let all = self.lists.iter();
        all.filter_map(|list| Some((&*list.path, list.next_update?)))
    }

    /// Returns the lists that contain a certificate of this chain under its issuer's name. The caller
    /// must verify the signature of a list, since CAs may have the same name.
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

/// The last read version of a file.
struct File {
    path: Arc<Path>,
    version: u64,
    lists: Vec<(OwnedCertRevocationList, Option<SystemTime>)>,
}

/// Reads the files, and reloads them until all receivers are dropped.
///
/// # Errors
/// When a file cannot be loaded at the start: the agent does not run without a configured list.
pub(super) async fn follow(paths: Vec<PathBuf>) -> Result<watch::Receiver<Arc<Revoked>>, CrlError> {
    let mut files = Vec::new();
    for path in paths {
        files.push(read(path.into()).await?);
    }
    let (sender, receiver) = watch::channel(Arc::new(combine(&files)));
    if files.is_empty() {
        // The receiver keeps the value after the sender is dropped.
        return Ok(receiver);
    }
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(POLL) => {}
            }
            if reload(&mut files).await {
                tracing::info!(revoked = ?combine(&files), "revocation lists changed");
                sender.send_replace(Arc::new(combine(&files)));
            }
        }
    });
    Ok(receiver)
}

/// Reads all files again. Returns whether one has changed.
async fn reload(files: &mut [File]) -> bool {
    let mut changed = false;
    for file in files {
        match read(Arc::clone(&file.path)).await {
            Ok(now) => {
                changed |= now.version != file.version;
                *file = now;
            }
            Err(why) => tracing::warn!(
                why = &why as &dyn std::error::Error,
                "cannot reload a revocation list; the last valid one stays in use"
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
    if size > MAX_BYTES {
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

/// Parses the lists of a PEM file, or the list of a DER file. A file without a list is an error.
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
