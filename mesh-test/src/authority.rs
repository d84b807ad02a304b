// SPDX-License-Identifier: Apache-2.0
//! Certificates made with openssl, as `--ca files:` reads them: nothing of the agent's own code is
//! in them.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs openssl on the machine itself.
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

/// Writes `tls.crt`, `tls.key` and `ca.crt` in `DIR/default/ACCOUNT`, for the identity of `subject`,
/// signed by the authority in `ca`.
///
/// # Panics
/// openssl fails, or a file cannot be written.
pub fn certificate(dir: &Path, ca: &Path, account: &str, subject: &str) {
    let at = dir.join("default").join(account);
    fs::create_dir_all(&at).expect("directory");
    let path = |name: &str| at.join(name).display().to_string();
    let extensions = path("extensions");
    let text = format!(
        "subjectAltName=critical,URI:spiffe://cluster.local/ns/default/sa/{subject}\n\
         keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n\
         basicConstraints=critical,CA:false\n"
    );
    fs::write(&extensions, text).expect("extensions");
    let (key, request, chain) = (path("tls.key"), path("request"), path("tls.crt"));
    let curve = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    openssl(
        &[
            &["req", "-new"],
            &curve[..],
            &["-subj", "/", "-keyout", &key, "-out", &request],
        ]
        .concat(),
    );
    let (ca_key, ca_crt) = (ca.join("ca.key"), ca.join("ca.crt"));
    let (ca_key, ca_crt) = (ca_key.display().to_string(), ca_crt.display().to_string());
    openssl(&[
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        &ca_crt,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-days",
        "1",
        "-extfile",
        &extensions,
        "-out",
        &chain,
    ]);
    fs::copy(ca_crt, path("ca.crt")).expect("ca");
}

/// Writes the certificate and key of an authority.
///
/// # Panics
/// openssl fails, or a file cannot be written.
pub fn authority(dir: &Path) {
    fs::create_dir_all(dir).expect("directory");
    let path = |name: &str| dir.join(name).display().to_string();
    openssl(&[
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=test",
        "-keyout",
        &path("ca.key"),
        "-out",
        &path("ca.crt"),
        "-addext",
        "keyUsage=critical,keyCertSign",
    ]);
}
