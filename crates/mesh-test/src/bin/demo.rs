// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask demo [--keep]`: the shop of deploy/examples on two nodes of this machine, with
//! evidence for each promise of the mesh. Exits with 1 if a line fails.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use mesh_test::demo::{Demo, LINES};
use mesh_test::remove_on_interrupt;

#[derive(Parser)]
#[command(about = "Shows the mesh at work: two nodes, two agents, a small shop")]
struct Cli {
    /// Keep the demo running until Ctrl-C and print commands to look around
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.keep) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format_args!("the demo could not be run: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "a program for people")]
fn say(what: &impl std::fmt::Display) {
    println!("{what}");
}

fn run(keep: bool) -> Result<bool> {
    remove_on_interrupt()?;
    let begun = Instant::now();
    let seconds = || begun.elapsed().as_secs_f64();
    let demo = Demo::start(true, |what| {
        say(&format_args!("{:5.1} s  {what}", seconds()));
    })?;
    let mut failed = 0;
    for line in LINES {
        match (line.check)(&demo) {
            Ok(evidence) => {
                say(&format_args!("\n{:5.1} s  ok    {}", seconds(), line.title));
                for sentence in evidence.lines() {
                    say(&format_args!("               {sentence}"));
                }
            }
            Err(error) => {
                failed += 1;
                say(&format_args!(
                    "\n{:5.1} s  FAIL  {}\n               {error:#}",
                    seconds(),
                    line.title
                ));
            }
        }
    }
    say(&format_args!(
        "\n{:5.1} s  {} of {} lines passed",
        seconds(),
        LINES.len() - failed,
        LINES.len()
    ));
    if keep {
        look_around(&demo);
        loop {
            std::thread::park();
        }
    }
    drop(demo);
    say(&format_args!(
        "{:5.1} s  all namespaces, cgroups and files are removed",
        seconds()
    ));
    Ok(failed == 0)
}

fn look_around(demo: &Demo) {
    say(&"\nThe demo runs until Ctrl-C. Commands for another terminal:");
    for pod in demo.pods() {
        let (name, path) = (pod.name(), pod.path().display());
        let node = pod.node().name();
        say(&format_args!(
            "  nsenter --net={path} sh  # {name}, on {node}"
        ));
    }
    say(&"A program started this way has the pod's network but not its cgroup. To have both:");
    let client = demo.pod("client");
    say(&format_args!(
        "  sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} curl http://10.96.0.20/'",
        client.cgroup().display(),
        client.path().display()
    ));
    say(&"The agents' admin API:");
    for agent in &demo.agents {
        let (node, admin) = (agent.node().name(), agent.admin());
        say(&format_args!(
            "  curl --unix-socket {} http://agent/status  # {node}; also /pods, /plan, /flows",
            admin.display()
        ));
    }
    for agent in &demo.agents {
        say(&format_args!("  tail -f {}", agent.flow_log().display()));
    }
    say(&format_args!(
        "Manifests, re-read when they change: {}",
        demo.manifest_dir().display()
    ));
}
