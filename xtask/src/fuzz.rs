// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask fuzz [TARGET]`: runs the programs of `fuzz/`, each over its committed corpus and then
//! beyond it for a given time, as many at once as there are processors.
//!
//! The compiler's own passes instrument the programs for libFuzzer; RUSTC_BOOTSTRAP enables the
//! unstable ones. New inputs are kept below `target/fuzz` and start the next run; inputs that break
//! a program are kept there too, and reported. Plain tests replay the committed corpus, so that only
//! the search for new inputs needs this command.

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::{reach, run};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Flags that count every edge and trace comparisons; the cfg makes the entry points public.
const FLAGS: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    --cfg fuzzing";

/// Bounds of the time of one input and of the memory of one program.
const LIMITS: [&str; 2] = ["-timeout=10", "-rss_limit_mb=1024"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only this target, a file of fuzz/fuzz_targets
    target: Option<String>,
    /// Seconds that each target runs beyond the corpus; 0: the corpus only
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Report which regions of the parsers the committed corpus reaches instead
    #[arg(long, conflicts_with_all = ["target", "seconds"])]
    coverage: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.coverage {
        return reach::print();
    }
    let all = targets()?;
    let chosen: Vec<String> = match &args.target {
        None => all,
        Some(one) if all.contains(one) => vec![one.clone()],
        Some(other) => bail!("unknown target {other}: must be one of {}", all.join(", ")),
    };
    run::timed("fuzz: build", || build(&chosen))?;
    let at_once = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut broken = Vec::new();
    for some in chosen.chunks(at_once) {
        let running: Vec<_> = some
            .iter()
            .map(|target| {
                let (target, seconds) = (target.clone(), args.seconds);
                thread::spawn(move || (fuzz(&target, seconds), target))
            })
            .collect();
        for one in running {
            let Ok((result, target)) = one.join() else {
                bail!("a thread that runs a target failed");
            };
            match result {
                Ok(text) => println!("fuzz: {target}: {text}"),
                Err(err) => {
                    println!("fuzz: {target}: FAILED: {err:#}");
                    broken.push(target);
                }
            }
        }
    }
    if !broken.is_empty() {
        bail!("fuzz failed: {}", broken.join(", "));
    }
    Ok(())
}

/// Names of all targets.
fn targets() -> Result<Vec<String>> {
    let dir = run::root().join("fuzz/fuzz_targets");
    let mut all = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if let (Some(stem), Some("rs")) = (
            path.file_stem().and_then(|stem| stem.to_str()),
            path.extension().and_then(|kind| kind.to_str()),
        ) {
            all.push(stem.to_owned());
        }
    }
    all.sort();
    Ok(all)
}

fn out() -> PathBuf {
    run::root().join("target/fuzz")
}

fn build(targets: &[String]) -> Result<()> {
    let mut cargo = run::cargo(["build", "--locked", "--manifest-path", "fuzz/Cargo.toml"]);
    cargo
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(out())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", FLAGS);
    for target in targets {
        cargo.args(["--bin", target]);
    }
    run::show(&mut cargo)
}

/// Corpora of a target; new inputs are written to the first.
fn corpora(target: &str) -> Result<Vec<PathBuf>> {
    let found = out().join("corpus").join(target);
    fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
    let mut all = vec![found, run::root().join("fuzz/corpus").join(target)];
    if target == "manifests" {
        // What each kind of object does, as examples.
        all.push(run::root().join("crates/mesh-api/tests/golden"));
    }
    Ok(all)
}

/// Runs a target and returns its coverage as libFuzzer reports it.
fn fuzz(target: &str, seconds: u64) -> Result<String> {
    let broken = out().join("broken").join(target);
    fs::create_dir_all(&broken).with_context(|| format!("cannot make {}", broken.display()))?;
    let mut program = run::command(out().join(TRIPLE).join("debug").join(target));
    program
        .args(corpora(target)?)
        .args(LIMITS)
        .arg(format!("-artifact_prefix={}/", broken.display()))
        .arg("-print_final_stats=1")
        .arg(match seconds {
            0 => "-runs=0".to_owned(),
            seconds => format!("-max_total_time={seconds}"),
        })
        .stdin(Stdio::null());
    let output = program
        .output()
        .with_context(|| format!("cannot start {}", run::line(&program)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let from = said.lines().count().saturating_sub(40);
        let last: Vec<&str> = said.lines().skip(from).collect();
        bail!(
            "{}: {}\n{}",
            run::line(&program),
            output.status,
            last.join("\n")
        );
    }
    summary(&said, seconds).with_context(|| format!("{} said no coverage", run::line(&program)))
}

/// Summarizes the coverage of the corpus and of the whole run, and the number of inputs.
fn summary(said: &str, seconds: u64) -> Option<String> {
    let counted = |line: &&str| line.contains(" cov: ");
    let at = |line: &str| {
        Some(
            line.split_once("cov: ")?
                .1
                .split(" exec/s")
                .next()?
                .to_owned(),
        )
    };
    let begin = said
        .lines()
        .find(|line| line.contains("INITED") && counted(line))?;
    let end = said.lines().rfind(counted)?;
    let inputs = said
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    let after = Duration::from_secs(seconds);
    Some(format!(
        "edges of the corpus: {}; after {after:?} and {} inputs: {}",
        at(begin)?.trim(),
        inputs.trim(),
        at(end)?.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy;

    #[test]
    fn every_fuzz_target_has_program_and_corpus() {
        let manifest =
            fs::read_to_string(run::root().join("fuzz/Cargo.toml")).expect("it is there");
        let all = targets().expect("they can be listed");
        assert!(all.len() >= 7, "{all:?}");
        for target in all {
            let path = format!("path = \"fuzz_targets/{target}.rs\"");
            assert!(manifest.contains(&path), "{target}");
            let corpus = run::root().join("fuzz/corpus").join(&target);
            let has_files = |dir| fs::read_dir(dir).is_ok_and(|mut all| all.next().is_some());
            assert!(has_files(corpus), "{target}");
        }
    }

    /// CI does not build the instrumented targets: plain tests replay their corpora.
    #[test]
    fn plain_tests_replay_every_fuzz_corpus() {
        let sources: Vec<_> = tidy::files()
            .expect("git lists the tree")
            .into_iter()
            .filter(|file| file.path.ends_with(".rs") && !file.path.starts_with("xtask/"))
            .collect();
        for target in targets().expect("they can be listed") {
            let [named, listed] = [
                format!("replay(\"{target}\""),
                format!("fuzz/corpus/{target}\""),
            ];
            let replays = sources
                .iter()
                .any(|file| file.text.contains(&named) || file.text.contains(&listed));
            assert!(replays, "no test replays fuzz/corpus/{target}");
        }
    }

    #[test]
    fn fuzz_summary_has_coverage_of_corpus_and_of_end() {
        let said = "INFO: Running with entropic power schedule (0xFF, 100).\n\
            #22\tINITED cov: 310 ft: 512 corp: 20/4Kb exec/s: 0 rss: 40Mb\n\
            #900\tNEW    cov: 311 ft: 530 corp: 21/4Kb lim: 4096 exec/s: 450 rss: 41Mb L: 3/9\n\
            #1000\tDONE   cov: 312 ft: 540 corp: 22/4Kb lim: 4096 exec/s: 500 rss: 41Mb\n\
            stat::number_of_executed_units: 1000\n";
        assert_eq!(
            summary(said, 2).as_deref(),
            Some(
                "edges of the corpus: 310 ft: 512 corp: 20/4Kb; after 2s and 1000 inputs: \
                 312 ft: 540 corp: 22/4Kb lim: 4096"
            )
        );
        assert_eq!(summary("killed", 2), None);
    }
}
