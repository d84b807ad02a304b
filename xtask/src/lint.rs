// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask lint`: checks the format, clippy for the host and for the kernel target in every
//! feature set, tidy, generated files and the lock files.
//!
//! A failed part does not stop the others.

use anyhow::{Result, bail};

use crate::{generate, run, tidy};

/// Name of a part, and the function that checks it.
type Part = (&'static str, fn() -> Result<()>);

pub(crate) fn run() -> Result<()> {
    let parts: [Part; 10] = [
        ("lock file", || {
            cargo(
                &["metadata", "--locked", "--format-version=1", "--quiet"],
                true,
            )
        }),
        ("lock file, fuzz", || {
            cargo(
                &[
                    "metadata",
                    "--locked",
                    "--format-version=1",
                    "--quiet",
                    "--manifest-path=fuzz/Cargo.toml",
                ],
                true,
            )
        }),
        ("format, fuzz", || {
            cargo(
                &["fmt", "--check", "--manifest-path=fuzz/Cargo.toml"],
                false,
            )
        }),
        ("format", || cargo(&["fmt", "--all", "--check"], false)),
        ("clippy", || clippy(&["--workspace"])),
        ("clippy, trace", || {
            clippy(&["--package", "mesh-agent", "--all-features"])
        }),
        ("clippy, kernel target", || kernel_clippy(&[])),
        ("clippy, kernel target, trace", || {
            kernel_clippy(&["--features", "trace"])
        }),
        ("tidy", tidy::run),
        ("generated files", || {
            generate::run(&generate::Args { check: true })
        }),
    ];
    let mut failed = Vec::new();
    for (name, part) in parts {
        if let Err(err) = run::timed(&format!("lint: {name}"), part) {
            println!("{err:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join("; "));
    }
    Ok(())
}

fn cargo(args: &[&str], quiet: bool) -> Result<()> {
    let mut cargo = run::cargo(args);
    if quiet {
        run::capture(&mut cargo).map(drop)
    } else {
        run::show(&mut cargo)
    }
}

fn clippy(more: &[&str]) -> Result<()> {
    let mut cargo = run::cargo(["clippy", "--quiet", "--all-targets"]);
    cargo.args(more).args(["--", "-D", "warnings"]);
    run::show(&mut cargo)
}

/// Checks mesh-ebpf for the kernel target; its host build is an empty program.
fn kernel_clippy(more: &[&str]) -> Result<()> {
    let mut cargo = run::cargo(["clippy", "--quiet", "--package", "mesh-ebpf", "--bins"]);
    cargo
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .args(["--target-dir", "target/bpf-lint"])
        .args(more)
        .args(["--", "-D", "warnings"])
        .env("RUSTC_BOOTSTRAP", "1");
    run::show(&mut cargo)
}
