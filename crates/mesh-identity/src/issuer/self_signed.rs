// SPDX-License-Identifier: Apache-2.0
//! `self:DIR`: a CA whose key lies on the node, for demos and tests.
//!
//! `DIR/ca.pem` (mode 600) holds the CA's key and certificate, `DIR/ca.crt` the certificate for
//! other programs to read. All agents of a machine that are given the same directory get the
//! same CA, whichever comes first.

use std::{
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use time::OffsetDateTime;
use zeroize::{Zeroize as _, Zeroizing};

use super::{BoxFuture, IssueError, Issued, Issuer, VALIDITY, Version};
use crate::{Clock, SpiffeId, key::Key};

/// Keeps certificates valid where clocks differ a little.
const BACKDATED: Duration = Duration::from_secs(600);
const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";
const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A CA of the node's own.
#[derive(Debug)]
pub(crate) struct SelfSigned {
    root: CertificateDer<'static>,
    key: Key,
    clock: Clock,
}

impl SelfSigned {
    /// Reads the CA of `dir`, or makes it first.
    pub(crate) async fn open(dir: &Path, clock: Clock) -> Result<Self, IssueError> {
        let (dir, now) = (dir.to_owned(), clock.now());
        let work = tokio::task::spawn_blocking(move || open(&dir, now));
        let Authority { root, key, .. } = work.await.map_err(|gone| IssueError::File {
            op: "open",
            path: PathBuf::new(),
            source: io::Error::other(gone),
        })??;
        Ok(Self { root, key, clock })
    }

    fn sign(&self, id: &SpiffeId) -> Result<Issued, IssueError> {
        let key = Key::generate()?;
        let now = self.clock.now();
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = DistinguishedName::new();
        leaf.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        leaf.use_authority_key_identifier_extension = true;
        leaf.not_before = OffsetDateTime::from(now - BACKDATED);
        leaf.not_after = OffsetDateTime::from(now + VALIDITY);
        let issuer = rcgen::Issuer::new(ca_params(now), self.key.clone());
        let leaf = leaf.signed_by(&key, &issuer)?;
        Ok(Issued {
            chain: vec![leaf.der().clone()],
            key: Arc::new(key),
            roots: vec![self.root.clone()],
            version: Version(0),
        })
    }
}

impl Issuer for SelfSigned {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(async move { self.sign(id) })
    }
}

// What an issuer says of itself in a leaf depends on its name and usages alone, and these never
// change: the validity here matters only when the CA is made.
fn ca_params(now: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, "mesh-agent self: CA, for tests only");
    params.not_before = OffsetDateTime::from(now - BACKDATED);
    params.not_after = OffsetDateTime::from(now + CA_VALIDITY);
    params
}

struct Authority {
    root: CertificateDer<'static>,
    key: Key,
    /// The certificate as it stands in the file.
    text: String,
}

fn open(dir: &Path, now: SystemTime) -> Result<Authority, IssueError> {
    let both = dir.join("ca.pem");
    let authority = match load(&both)? {
        Some(found) => found,
        None => {
            make(dir, &both, now)?;
            // Not what was just made: another agent may have been first.
            load(&both)?
                .ok_or_else(|| file("read", &both)(io::Error::from(io::ErrorKind::NotFound)))?
        }
    };
    publish(dir, &authority)?;
    tracing::warn!(
        dir = %dir.display(),
        "--ca self: is for demos and tests: whoever reads this directory can be every workload"
    );
    Ok(authority)
}

fn file<'a>(op: &'static str, path: &'a Path) -> impl Fn(io::Error) -> IssueError + 'a {
    move |source| IssueError::File {
        op,
        path: path.to_owned(),
        source,
    }
}

fn load(path: &Path) -> Result<Option<Authority>, IssueError> {
    let pem = match std::fs::read(path) {
        Ok(pem) => Zeroizing::new(pem),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(file("read", path)(error)),
    };
    let mode = std::fs::metadata(path)
        .map_err(file("read", path))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(IssueError::Exposed {
            path: path.to_owned(),
        });
    }
    let without = |what| IssueError::Pem {
        what,
        path: path.to_owned(),
    };
    let root = CertificateDer::from_pem_slice(&pem).map_err(|_none| without("certificate"))?;
    let mut der = PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_none| without("key"))?;
    let key = Key::from_pkcs8(der.secret_pkcs8_der());
    der.zeroize();
    let start = pem
        .windows(CERTIFICATE.len())
        .position(|window| window == CERTIFICATE);
    let text = start
        .and_then(|start| pem.get(start..))
        .ok_or_else(|| without("certificate"))?;
    let text = String::from_utf8_lossy(text).into_owned();
    Ok(Some(Authority {
        root,
        key: key?,
        text,
    }))
}

/// Makes a CA, unless another process does so first: the complete file appears at once, and
/// never over another.
fn make(dir: &Path, both: &Path, now: SystemTime) -> Result<(), IssueError> {
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(file("make", dir))?;
    let mut key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let root = ca_params(now).self_signed(&key)?;
    let pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    let mut temporary = tempfile::Builder::new()
        .prefix(".ca.")
        .tempfile_in(dir)
        .map_err(file("write", both))?;
    temporary
        .write_all(pem.as_bytes())
        .and_then(|()| temporary.write_all(root.pem().as_bytes()))
        .and_then(|()| temporary.as_file().sync_all())
        .map_err(file("write", both))?;
    match temporary.persist_noclobber(both) {
        Ok(_) => Ok(()),
        Err(first) if first.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(failed) => Err(file("write", both)(failed.error)),
    }
}

/// Leaves the certificate where other programs find it.
fn publish(dir: &Path, authority: &Authority) -> Result<(), IssueError> {
    let path = dir.join("ca.crt");
    if CertificateDer::from_pem_file(&path).is_ok_and(|there| there == authority.root) {
        return Ok(());
    }
    let failed = file("write", &path);
    let mut temporary = tempfile::Builder::new()
        .prefix(".crt.")
        .permissions(std::fs::Permissions::from_mode(0o644))
        .tempfile_in(dir)
        .map_err(&failed)?;
    temporary
        .write_all(authority.text.as_bytes())
        .map_err(&failed)?;
    temporary
        .persist(&path)
        .map_err(|error| failed(error.error))?;
    Ok(())
}
