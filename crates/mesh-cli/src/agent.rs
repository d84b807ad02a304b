// SPDX-License-Identifier: Apache-2.0
//! Queries the agent of this node over its admin socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::Outcome;
use crate::args::{Agent, Status};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Prints a page of the agent.
pub(crate) fn page(agent: &Agent, path: &str, out: &mut impl Write) -> Result<Outcome> {
    out.write_all(get(agent, path)?.as_bytes())?;
    Ok(Outcome::Good)
}

/// Prints the status of the agent; the outcome is bad if it is not ready or rejects an object.
pub(crate) fn status(args: &Status, out: &mut impl Write) -> Result<Outcome> {
    let text = get(&args.agent, "/status")?;
    let status: Value = serde_json::from_str(&text).context("the agent's answer is not JSON")?;
    if args.json {
        out.write_all(text.as_bytes())?;
    } else {
        summary(&status, out)?;
    }
    let is_ready = status.get("ready") == Some(&Value::Bool(true));
    let rejects = !rejections(&status).is_empty();
    Ok(if is_ready && !rejects {
        Outcome::Good
    } else {
        Outcome::Bad
    })
}

fn rejections(status: &Value) -> &[Value] {
    let list = status.get("rejections").and_then(Value::as_array);
    list.map_or(&[], Vec::as_slice)
}

fn summary(status: &Value, out: &mut impl Write) -> Result<()> {
    for (key, value) in status.as_object().into_iter().flatten() {
        if let Value::Object(parts) = value {
            write!(out, "{key}:")?;
            for (name, part) in parts {
                write!(out, " {name}={}", plain(part))?;
            }
            writeln!(out)?;
        } else if !value.is_array() && !value.is_null() {
            writeln!(out, "{key}: {}", plain(value))?;
        }
    }
    let list = |name: &str| status.get(name).and_then(Value::as_array);
    for (name, title) in [
        ("policies_in_force", "policies in force on this node"),
        ("match_nothing", "peers that match no pod"),
        ("warnings", "warnings"),
    ] {
        let Some(all) = list(name) else { continue };
        writeln!(out, "{title}: {}", all.len())?;
        for one in all {
            writeln!(out, "  {}", line(one))?;
        }
    }
    let rejections = rejections(status);
    writeln!(out, "rejections: {}", rejections.len())?;
    for rejection in rejections {
        let part = |name: &str| rejection.get(name).map(plain).unwrap_or_default();
        let (object, field) = (part("object"), part("field"));
        let (why, consequence) = (part("why"), part("consequence"));
        writeln!(out, "  {object}: {field}: {why}; {consequence}")?;
    }
    Ok(())
}

/// A text, or a warning as `OBJECT: FIELD: TEXT`.
fn line(value: &Value) -> String {
    let part = |name: &str| value.get(name).map(plain).filter(|text| !text.is_empty());
    match (part("object"), part("field"), part("what")) {
        (Some(object), Some(field), Some(what)) => format!("{object}: {field}: {what}"),
        (Some(object), None, Some(what)) => format!("{object}: {what}"),
        _ => plain(value),
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// Fetches a page of the agent.
pub(crate) fn get(agent: &Agent, path: &str) -> Result<String> {
    let socket = &agent.socket;
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to the agent at {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("cannot read the agent's answer")?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the agent's answer is not HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        bail!(
            "the agent answered {path} with status {status}: {}",
            body.trim()
        );
    }
    Ok(body.to_owned())
}
