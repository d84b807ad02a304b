// SPDX-License-Identifier: Apache-2.0
//! Test certificates in the layout that `--ca files:` reads, and certificate revocation lists. All
//! are made with openssl, independently of the agent's code.

use std::fs;
use std::path::Path;
use std::process::Command;

const KEY: [&str; 5] = [
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:P-256",
    "-nodes",
];

/// The `openssl ca` configuration of the authority in DIR.
const CONFIG: &str = "
[ca]
default_ca = own
[own]
database = DIR/index
new_certs_dir = DIR
certificate = DIR/ca.crt
private_key = DIR/ca.key
crlnumber = DIR/crlnumber
crl_extensions = list
rand_serial = yes
unique_subject = no
default_md = sha256
default_days = 1
default_crl_days = 1
policy = any
[any]
commonName = optional
[list]
authorityKeyIdentifier = keyid
";

/// Runs openssl on the test machine and panics if it fails.
fn openssl(args: &[&str]) {
    let output = Command::new("openssl")
        .args(args)
        .output()
        .expect("openssl is installed: run `cargo xtask setup`");
    assert!(
        output.status.success(),
        "openssl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// Writes `tls.crt`, `tls.key` and `ca.crt` to `DIR/default/ACCOUNT`, for the identity of the
/// service account `subject`, signed by the authority in `ca`.
///
/// # Panics
/// openssl fails, or a file cannot be written.
pub fn certificate(dir: &Path, ca: &Path, account: &str, subject: &str) {
    let name = format!("URI:spiffe://cluster.local/ns/default/sa/{subject}");
    issue(&dir.join("default").join(account), ca, &name, None);
}

/// Writes `tls.crt`, `tls.key` and `ca.crt` to `at`, signed by the authority in `ca`. `names` are
/// the subject alternative names in openssl's syntax, e.g. `URI:spiffe://x,DNS:y`. The certificate
/// is valid for one day from now, or between `dates` (e.g. `20200101000000Z`).
///
/// # Panics
/// openssl fails, or a file cannot be written.
pub fn issue(at: &Path, ca: &Path, names: &str, dates: Option<[&str; 2]>) {
    fs::create_dir_all(at).expect("directory");
    let extensions = path(at, "extensions");
    let text = format!(
        "subjectAltName=critical,{names}\n\
         keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n\
         basicConstraints=critical,CA:false\n"
    );
    fs::write(&extensions, text).expect("extensions");
    let [key, request, chain] = ["tls.key", "request", "tls.crt"].map(|name| path(at, name));
    let own = ["-subj", "/", "-keyout", &key, "-out", &request];
    openssl(&[&["req", "-new"], &KEY[..], &own].concat());
    let config = path(ca, "config");
    let mut sign = vec!["ca", "-batch", "-notext", "-config", &config];
    sign.extend(["-in", &request, "-out", &chain, "-extfile", &extensions]);
    if let Some([start, end]) = dates {
        sign.extend(["-startdate", start, "-enddate", end]);
    }
    openssl(&sign);
    fs::copy(ca.join("ca.crt"), at.join("ca.crt")).expect("ca");
}

/// Revokes the certificates that [`issue`] wrote to these directories, and atomically replaces
/// `list` with the current CRL of the authority in `ca`.
///
/// # Panics
/// openssl fails, or a file cannot be written.
pub fn revoke(ca: &Path, certificates: &[&Path], list: &Path) {
    let config = path(ca, "config");
    for at in certificates {
        openssl(&["ca", "-config", &config, "-revoke", &path(at, "tls.crt")]);
    }
    let next = list.with_extension("next");
    let out = next.display().to_string();
    openssl(&["ca", "-config", &config, "-gencrl", "-out", &out]);
    fs::rename(next, list).expect("list");
}

/// Writes the certificate and key of a CA, and the state files of `openssl ca`. All CAs have the
/// same subject name.
///
/// # Panics
/// openssl fails, or a file cannot be written.
pub fn authority(dir: &Path) {
    fs::create_dir_all(dir).expect("directory");
    let config = CONFIG.replace("DIR", &dir.display().to_string());
    for (name, text) in [("config", &*config), ("index", ""), ("crlnumber", "01\n")] {
        fs::write(dir.join(name), text).expect("state file of openssl ca");
    }
    let [key, certificate] = ["ca.key", "ca.crt"].map(|name| path(dir, name));
    let own = ["-subj", "/CN=test", "-keyout", &key, "-out", &certificate];
    let usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"];
    openssl(&[&["req", "-x509", "-days", "1"], &KEY[..], &own, &usage].concat());
}
