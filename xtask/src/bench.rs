// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench`: prepares the machine, builds, and runs the `bench` program of mesh-test.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{demo, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments of the bench: `[GROUP] [--rounds N] [--seconds S] [--json PATH]`; `policy [--json PATH]`
    /// measures the cost of policy
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let [group, rest @ ..] = args.args.as_slice()
        && group == "policy"
    {
        return policy(rest);
    }
    run::show(demo::hand_over("bench", true)?.args(&args.args))
}

/// Measures the cost of policy in three parts: compiling, comparing and deciding in user space at 100 to 10,000
/// pods and policies; a decision of the kernel's programs at 10 to 10,000 policies; short connections
/// between two pods of a node, plain and meshed in turns, without policies and with 50.
fn policy(args: &[String]) -> Result<()> {
    let path = match args {
        [] => "target/bench-policy.json",
        [json, path] if json == "--json" => path,
        _ => bail!("bench policy [--json PATH]"),
    };
    let part = |name: &str| format!("target/bench-policy-{name}.json");
    let compile = part("compile");
    let mut scale = run::cargo(["run", "--quiet", "--release", "--package", "mesh-plan"]);
    run::show(scale.args(["--example", "scale", "--", "--json", &compile]))?;
    let mut rows = vec![
        format!("\"compile\":{}", read(&compile)?),
        format!("\"decisions\":{}", decisions()?),
    ];
    for policies in ["0", "50"] {
        let connect = part(&format!("connect-{policies}"));
        let args = [
            "crr",
            "--scenario",
            "same_node",
            "--rounds",
            "5",
            "--seconds",
            "5",
        ];
        let args = args
            .into_iter()
            .chain(["--policies", policies, "--json", &connect]);
        let args: Vec<String> = args.map(str::to_owned).collect();
        run::show(demo::hand_over("bench", true)?.args(&args))?;
        rows.push(format!(
            "\"connect_{policies}_policies\":{}",
            read(&connect)?
        ));
    }
    let text = format!("{{\n{}\n}}\n", rows.join(",\n"));
    fs::write(path, text).with_context(|| format!("cannot write {path}"))
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(run::root().join(path)).with_context(|| path.to_owned())?;
    Ok(text.trim_end().to_owned())
}

/// Cost of the kernel's decisions, as printed by the test that bounds it.
fn decisions() -> Result<String> {
    let test = [
        "test",
        "--quiet",
        "--package",
        "mesh-datapath",
        "--test",
        "parity",
    ];
    let mut test = run::cargo(test);
    let said = run::capture(test.args(["cost::", "--", "--nocapture", "--test-threads=1"]))?;
    let rows: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("{\"policies\""))
        .collect();
    ensure!(
        !rows.is_empty(),
        "the test says nothing of the cost: {said}"
    );
    println!("{}", rows.join("\n"));
    Ok(format!("[\n{}\n]", rows.join(",\n")))
}
