// SPDX-License-Identifier: Apache-2.0
//! Compiles `mesh-ebpf` for the BPF target and writes the object to `$OUT_DIR/mesh-bpf`.
//!
//! The script runs in every cargo build, also an editor's. It sets up what the BPF target needs beyond a
//! plain `cargo build`: build-std, bpf-linker and the right toolchain. It never downloads or installs:
//! an error names what is missing and the command that installs it.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use aya_build::{Package, Toolchain};

const OBJECT: &str = "mesh-bpf";
const LINKER: &str = "bpf-linker";

#[expect(
    clippy::print_stderr,
    reason = "standard error is what cargo shows of a failed script"
)]
fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    watch();
    let sysroot = sysroot()?;
    check_rust_src(&sysroot)?;
    let path = path_with_linker()?;
    let trace = env::var_os("CARGO_FEATURE_TRACE").is_some();
    let out = required("OUT_DIR").map(PathBuf::from)?;
    let shared = shared_dir(&out, trace)?;

    // Builds of several profiles share the directory. The lock keeps one from copying the object while
    // another writes it.
    let lock = File::create(shared.join("lock")).context("cannot create the lock file")?;
    lock.lock()
        .context("cannot take the lock of the eBPF build")?;

    set_env("PATH", &path);
    set_env("OUT_DIR", shared.as_os_str());
    // The BPF target has no precompiled core, and build-std is not stable. Only the nested cargo sees
    // this variable: the rest of the workspace uses stable features.
    set_env("RUSTC_BOOTSTRAP", "1".as_ref());
    // The object is the same on every machine: its line info has no local directories.
    set_env("CARGO_UNSTABLE_TRIM_PATHS", "true".as_ref());
    set_env("CARGO_PROFILE_RELEASE_TRIM_PATHS", "all".as_ref());
    // Cargo's status lines would be shown as warnings of this build.
    set_env("CARGO_TERM_QUIET", "true".as_ref());
    // Incremental builds have many small codegen units, from which the linker makes functions with
    // small stack frames. In one unit, the gate needs more than the kernel's 512 bytes of stack for a
    // chain of calls.
    set_env("CARGO_INCREMENTAL", "1".as_ref());
    let features: &[&str] = if trace { &["trace"] } else { &[] };
    aya_build::build_ebpf(
        [Package {
            name: "mesh-ebpf",
            root_dir: "../../mesh-ebpf",
            no_default_features: false,
            features,
        }],
        Toolchain::Custom(&toolchain(&sysroot)),
    )?;

    let built = shared.join(OBJECT);
    let object = out.join(OBJECT);
    fs::copy(&built, &object)
        .map(|_| ())
        .with_context(|| format!("cannot copy {} to {}", built.display(), object.display()))
}

/// Tells cargo which files the object depends on; `aya_build` adds the sources of mesh-ebpf.
fn watch() {
    for path in [
        "build.rs",
        "../../mesh-common/src",
        "../../mesh-common/Cargo.toml",
        "../../Cargo.toml",
        "../../Cargo.lock",
    ] {
        say(&format!("cargo:rerun-if-changed={path}"));
    }
    say("cargo:rerun-if-env-changed=RUSTUP_TOOLCHAIN");
}

/// Returns the target directory of the nested build, which all profiles of the agent share: the object is
/// the same in each, and core is compiled once.
fn shared_dir(out: &Path, trace: bool) -> Result<PathBuf> {
    // Only the root of a target directory has this file, also with `--target`.
    let target = out
        .ancestors()
        .filter(|dir| dir.join("CACHEDIR.TAG").is_file())
        .last()
        .unwrap_or(out);
    let shared = target.join(if trace { "bpf-trace" } else { "bpf" });
    fs::create_dir_all(&shared).with_context(|| format!("cannot create {}", shared.display()))?;
    Ok(shared)
}

fn sysroot() -> Result<PathBuf> {
    let rustc = required("RUSTC")?;
    let output = Command::new(&rustc)
        .args(["--print", "sysroot"])
        .output()
        .with_context(|| format!("cannot run {}", rustc.display()))?;
    let text = String::from_utf8(output.stdout).context("the sysroot is not UTF-8")?;
    let sysroot = text.trim();
    if !output.status.success() || sysroot.is_empty() {
        bail!(
            "{} --print sysroot failed: {}",
            rustc.display(),
            output.status
        );
    }
    Ok(PathBuf::from(sysroot))
}

fn check_rust_src(sysroot: &Path) -> Result<()> {
    let library = sysroot.join("lib/rustlib/src/rust/library");
    say(&format!(
        "cargo:rerun-if-changed={}",
        library.join("Cargo.lock").display()
    ));
    if library.join("Cargo.lock").is_file() && library.join("core/src/lib.rs").is_file() {
        return Ok(());
    }
    bail!(
        "the kernel programs need the sources of the Rust library, and {} does not have them.\n\
         Run: cargo xtask setup",
        library.display()
    )
}

/// Returns the search path, with cargo's own directory added if an editor's environment lacks it.
fn path_with_linker() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&path).any(|dir| dir.join(LINKER).is_file()) {
        return Ok(path);
    }
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let Some(bin) = home
        .map(|home| home.join("bin"))
        .filter(|bin| bin.join(LINKER).is_file())
    else {
        bail!("the kernel programs need {LINKER}, which is not in PATH.\nRun: cargo xtask setup");
    };
    let paths = env::split_paths(&path).chain([bin]);
    env::join_paths(paths).context("PATH cannot take cargo's directory")
}

/// Returns the toolchain argument of `rustup run`: the toolchain's name, or its directory if cargo was
/// started without rustup. It is not used on a machine without rustup.
fn toolchain(sysroot: &Path) -> String {
    env::var_os("RUSTUP_TOOLCHAIN")
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| sysroot.display().to_string())
}

fn required(name: &str) -> Result<OsString> {
    env::var_os(name).with_context(|| format!("cargo did not set {name}"))
}

#[expect(
    unsafe_code,
    reason = "aya-build takes its settings from the environment only"
)]
fn set_env(name: &str, value: &std::ffi::OsStr) {
    // SAFETY: this program has one thread, and aya-build starts its own only afterwards.
    unsafe { env::set_var(name, value) };
}

/// Writes a line to standard output, which cargo reads.
fn say(line: &str) {
    println!("{line}");
}
