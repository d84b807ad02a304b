// SPDX-License-Identifier: Apache-2.0
//! Container images for tests, built locally without a registry.
//!
//! The base image has only directories and links: containers use the machine's /usr, which the pod
//! mounts. That gives real applications without copying Debian.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

/// The image of sandboxes and of all test applications. Its tag is not `latest`, so the kubelet
/// does not try to pull it.
pub const BASE: &str = "localhost/base:1";

const DIRS: &[&str] = &[
    "data", "dev", "etc", "opt", "proc", "run", "sys", "tmp", "usr", "var/tmp",
];

/// Source of the sandbox program, which waits for a signal to exit.
const PAUSE: &str = "#include <signal.h>\n#include <unistd.h>\n\
    static void end(int signal) { _exit(signal == 0); }\n\
    int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }\n";

const PASSWD: &str = "root:x:0:0:root:/:/bin/sh\npostgres:x:100:100::/data:/bin/sh\n\
    nobody:x:65534:65534:nobody:/:/bin/sh\n";
const GROUP: &str = "root:x:0:\npostgres:x:100:\nnogroup:x:65534:\n";

/// Writes the base image and returns the path of its archive.
pub(super) fn base(dir: &Path) -> Result<PathBuf> {
    let (dir, root) = (dir.join("image"), dir.join("image/root"));
    for name in DIRS {
        fs::create_dir_all(root.join(name))?;
    }
    for name in ["bin", "lib", "lib64", "sbin"] {
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    fs::write(root.join("etc/passwd"), PASSWD)?;
    fs::write(root.join("etc/group"), GROUP)?;
    let source = dir.join("pause.c");
    fs::write(&source, PAUSE)?;
    let mut compile = Command::new("cc");
    compile
        .args(["-Os", "-static", "-o"])
        .arg(root.join("pause"));
    said(compile.arg(&source))?;
    archive(&dir, &root)
}

/// Writes an archive with one layer in the format of `docker save`.
fn archive(dir: &Path, root: &Path) -> Result<PathBuf> {
    let layer = dir.join("layer.tar");
    said(tar(&layer, root).arg("."))?;
    let sum = said(Command::new("sha256sum").arg(&layer))?;
    let digest = sum.split(' ').next().context("sha256sum printed nothing")?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Entrypoint": ["/pause"], "Env": ["PATH=/usr/sbin:/usr/bin"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [BASE], "Layers": ["layer.tar"] }]);
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    let image = dir.join("base.tar");
    said(tar(&image, dir).args(["config.json", "layer.tar", "manifest.json"]))?;
    Ok(image)
}

fn tar(file: &Path, dir: &Path) -> Command {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--numeric-owner", "--file"])
        .arg(file);
    tar.arg("--directory").arg(dir);
    tar
}

fn said(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {error}");
    Ok(String::from_utf8(output.stdout)?)
}
