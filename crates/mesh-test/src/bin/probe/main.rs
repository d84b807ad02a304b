// SPDX-License-Identifier: Apache-2.0
//! Small real clients and servers for pods of the lab. Each prints JSON lines (`reports.rs`) and
//! exits with 0 if every step succeeded, 1 if not, 2 for invalid arguments.

#![forbid(unsafe_code)]

mod args;
mod checks;
mod connect;
mod datagram;
mod flow;
mod forge;
mod lab;
mod server;
mod storm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde::Serialize;

#[derive(Parser)]
#[command(about = "Small clients and servers for network tests")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One TCP connection, with any socket option that an application may use.
    Tcp(connect::Args),
    /// Many short TCP connections from several threads, each answer checked.
    Storm(storm::Args),
    /// Bulk transfers in one direction, counted on both sides.
    Bulk(flow::BulkArgs),
    /// Small requests and responses on long-lived connections.
    Rr(flow::RrArgs),
    /// Connections that stay open and report how they end.
    Hold(flow::HoldArgs),
    /// Datagrams that are answered.
    Udp(datagram::Args),
    /// Single connections and datagrams in parallel, as listed on standard input.
    Checks(checks::Args),
    /// An empty lab for manual tests.
    Lab(lab::Args),
    /// Servers for all clients of this program.
    Serve(server::Args),
    /// IP packets with any source address through a raw socket.
    Raw(forge::RawArgs),
    /// Ethernet frames with any source address through a packet socket.
    Frame(forge::FrameArgs),
    /// ARP packets with any content.
    Arp(forge::ArpArgs),
    /// Neighbor advertisements with any content.
    Advertise(forge::AdvertiseArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Tcp(args) => connect::run(&args),
        Command::Storm(args) => storm::run(&args),
        Command::Bulk(args) => flow::bulk(&args),
        Command::Rr(args) => flow::rr(&args),
        Command::Hold(args) => flow::hold(&args),
        Command::Udp(args) => datagram::run(&args),
        Command::Serve(args) => server::run(&args),
        Command::Checks(args) => checks::run(&args),
        Command::Lab(args) => lab::run(&args),
        Command::Raw(args) => forge::raw(&args),
        Command::Frame(args) => forge::frame(&args),
        Command::Arp(args) => forge::arp(&args),
        Command::Advertise(args) => forge::advertise(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            complain(&e);
            ExitCode::from(2)
        }
    }
}

#[expect(clippy::print_stderr, reason = "a command line program")]
fn complain(error: &anyhow::Error) {
    eprintln!("probe: {error:#}");
}

/// Prints one JSON line.
#[expect(clippy::print_stdout, reason = "a command line program")]
fn say(line: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}
