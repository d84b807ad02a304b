// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask e2e`: the mesh installed on a real cluster of two nodes, by the chart and by the
//! kustomize base, with evidence for each promise. Exits with 1 if a line fails.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use mesh_test::e2e::{CHANGES, DEMO, Installed, Installer, Line};
use mesh_test::remove_on_interrupt;

#[derive(Parser)]
#[command(about = "Installs the mesh on a real cluster of two nodes and checks it")]
struct Cli {
    /// The image (an OCI archive)
    #[arg(long, default_value = "target/image/image.tar")]
    image: PathBuf,
    /// Install in this way only (default: both, one after the other)
    #[arg(long)]
    only: Option<Way>,
    /// Run only the lines that show the mesh, not those that change its installation
    #[arg(long)]
    demo: bool,
    /// Run only lines whose title contains this
    #[arg(long, value_name = "TEXT")]
    line: Option<String>,
    /// Run each line this many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Keep the last cluster running until Ctrl-C and print commands to look around
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    Helm,
    Kustomize,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            say(&format_args!("e2e could not be run: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "a program for people")]
fn say(what: &impl std::fmt::Display) {
    println!("{what}");
}

/// The number of lines that failed.
fn run(cli: &Cli) -> Result<usize> {
    remove_on_interrupt()?;
    let changes = if cli.demo { &[] } else { CHANGES };
    let wanted = |line: &&Line| match &cli.line {
        Some(text) => line.title.contains(text),
        None => true,
    };
    let lines: Vec<&Line> = DEMO.iter().chain(changes).filter(wanted).collect();
    let lines: Vec<&Line> = lines
        .into_iter()
        .flat_map(|line| std::iter::repeat_n(line, cli.repeat))
        .collect();
    ensure!(!lines.is_empty(), "no line has {:?} in its title", cli.line);
    let ways = match cli.only {
        Some(Way::Helm) => vec![Installer::Helm],
        Some(Way::Kustomize) => vec![Installer::Kustomize],
        None if cli.demo => vec![Installer::Kustomize],
        None => vec![Installer::Helm, Installer::Kustomize],
    };
    let begun = Instant::now();
    let mut failed = 0;
    let last = ways.len() - 1;
    for (index, way) in ways.into_iter().enumerate() {
        let seconds = || begun.elapsed().as_secs_f64();
        let on = Installed::start(way, &cli.image, |what| {
            say(&format_args!("{:5.1} s  {what}", seconds()));
        })?;
        for line in &lines {
            match (line.check)(&on) {
                Ok(evidence) => {
                    say(&format_args!("\n{:5.1} s  ok    {}", seconds(), line.title));
                    for sentence in evidence {
                        say(&format_args!("               {sentence}"));
                    }
                }
                Err(error) => {
                    failed += 1;
                    let title = line.title;
                    say(&format_args!(
                        "\n{:5.1} s  FAIL  {title}\n{error:#}",
                        seconds()
                    ));
                }
            }
        }
        if cli.keep && index == last {
            let config = on.cluster().kube().kubeconfig().display();
            let wire = on.cluster().wire().path().display();
            say(&format_args!(
                "\nThe cluster runs until Ctrl-C. Commands for another terminal:\n  nsenter --net={wire} env KUBECONFIG={config} \
                 $(crates/mesh-test/apiserver/build.sh) kubectl get pods -A -o wide"
            ));
            loop {
                std::thread::park();
            }
        }
    }
    let all = lines.len() * (last + 1);
    say(&format_args!(
        "\n{:5.1} s  {} of {all} lines passed",
        begun.elapsed().as_secs_f64(),
        all - failed
    ));
    Ok(failed)
}
