// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask setup`: a Debian 12 machine with Rust becomes one where everything builds and runs.
//!
//! Each part looks first and does nothing when all is there, so that `test`, `demo` and `bench`
//! call it every time. It names no server: packages come from where the machine's own apt and
//! cargo get theirs. It starts no service and changes nothing outside the parts listed here.

mod linker;
mod machine;
mod packages;
mod rust_src;
mod servers;

use std::{env, path::PathBuf, time::Instant};

use anyhow::{Result, bail};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Sources of the Rust library of exactly rustc's version: a directory `library` (or one
    /// that contains it), or a tar archive of one
    #[arg(long, value_name = "PATH", env = RUST_SRC)]
    rust_src: Option<PathBuf>,
}

const RUST_SRC: &str = "MESH_RUST_SRC";

impl Default for Args {
    fn default() -> Self {
        Self {
            rust_src: env::var_os(RUST_SRC).map(PathBuf::from),
        }
    }
}

/// The result of a part of the setup.
enum Outcome {
    /// Nothing was missing.
    Present,
    /// The installed item and its source.
    Done(String),
}

/// One part: its name, and what looks and brings.
type Part<'a> = (&'a str, &'a dyn Fn() -> Result<Outcome>);

pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let parts: [Part<'_>; 5] = [
        ("Debian packages", &packages::ensure),
        ("bpf-linker", &linker::ensure),
        ("rust-src", &|| rust_src::ensure(args.rust_src.as_deref())),
        ("kernel", &machine::ensure),
        ("Kubernetes servers", &servers::ensure),
    ];
    let mut failed = Vec::new();
    for (name, ensure) in parts {
        let start = Instant::now();
        let text = match ensure() {
            Ok(Outcome::Present) => "there".to_owned(),
            Ok(Outcome::Done(what)) => what,
            Err(err) => {
                failed.push(name);
                format!("FAILED: {err:#}")
            }
        };
        println!(
            "setup: {name}: {text} ({:.2} s)",
            start.elapsed().as_secs_f64()
        );
    }
    if !failed.is_empty() {
        bail!(
            "setup is not complete: {}; see above what to do",
            failed.join(", ")
        );
    }
    println!(
        "setup: everything is there ({:.2} s)",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
