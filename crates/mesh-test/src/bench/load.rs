// SPDX-License-Identifier: Apache-2.0
//! The load generator of the benchmark: one server and one client program with blocking threads.
//!
//! Defines the protocol between both and the client's report. It is independent of labs and
//! meshes: the same two programs run with and without a mesh.

mod client;
mod histogram;
mod server;
mod watch;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use histogram::Histogram;

use mesh_sys::testbed;

/// Port of bulk transfers.
pub(super) const BULK_PORT: u16 = 5001;
/// Port of requests on long-lived connections.
pub(super) const RR_PORT: u16 = 5002;
/// Ports of short-lived connections. The client closes first, so its port stays in TIME_WAIT for a
/// minute: 64 destination ports are enough for any rate that one machine reaches.
pub(super) const CRR_PORTS: RangeInclusive<u16> = 5100..=5163;
/// A port on which the server serves like on [`CRR_PORTS`], but which no policy allows.
pub(super) const CLOSED_PORT: u16 = 5999;
/// Size of a request and of a response in bytes.
pub(super) const MESSAGE: usize = 64;
/// Bytes per read or write of bulk transfers, as in iperf3.
const CHUNK: usize = 128 << 10;

/// The client's traffic pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// Each worker sends on its own connection as fast as possible; the server reports how many
    /// bytes it received.
    Bulk,
    /// Each worker sends requests on its own connection, each after the previous response.
    Rr,
    /// Each worker connects, sends a request, reads the response, closes, and repeats.
    Crr,
    /// Connects once to [`CLOSED_PORT`], like one iteration of `Crr`.
    Touch,
}

/// The load programs, hidden subcommands of the bench that it starts in pods.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Program {
    /// Serve every traffic pattern until killed
    #[command(hide = true)]
    LoadServer {
        /// CPU affinity and priority
        #[command(flatten)]
        scheduling: Scheduling,
    },
    /// Generate load and report it
    #[command(hide = true)]
    LoadClient(Client),
    /// Connect repeatedly and report when the result changes
    #[command(hide = true)]
    LoadWatch {
        /// Address of the server
        #[arg(long)]
        to: SocketAddr,
    },
}

/// Command-line options of the client.
#[derive(Clone, Debug, clap::Args)]
pub struct Client {
    /// Traffic pattern
    #[arg(long)]
    pub shape: Shape,
    /// Address of the server
    #[arg(long)]
    pub to: IpAddr,
    /// Threads, each with one connection at a time
    #[arg(long, default_value_t = 1)]
    pub workers: u16,
    /// Duration in seconds
    #[arg(long)]
    pub seconds: f64,
    #[command(flatten)]
    scheduling: Scheduling,
}

/// CPU affinity and priority of a load program.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Scheduling {
    /// Bind all threads to this CPU
    #[arg(long)]
    cpu: Option<usize>,
    /// Run with priority over all other programs of the machine
    #[arg(long)]
    ahead: bool,
}

impl Scheduling {
    /// Applies the scheduling options. Call it before threads start, because they inherit it.
    fn take_on(self) -> Result<()> {
        if self.ahead {
            go_ahead("self")?;
        }
        self.cpu.map_or(Ok(()), testbed::pin_to_cpu)?;
        Ok(())
    }
}

/// Gives a process (`self` or its pid) that is in a session of its own priority over the machine's
/// other sessions, through its autogroup's nice value; see sched(7).
pub(super) fn go_ahead(process: &str) -> Result<()> {
    let path = format!("/proc/{process}/autogroup");
    std::fs::write(&path, "-20").with_context(|| path)
}

/// A client's report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// Bytes received, requests answered on long-lived connections, or connections served.
    pub units: u64,
    /// Time from the first request to the last response; connection setup before it is excluded.
    pub seconds: f64,
    /// Median latency in microseconds from the request (crr: from connect) to the response; 0 for
    /// bulk.
    pub p50_us: f64,
    /// 99th percentile of the latency in microseconds; 0 for bulk.
    pub p99_us: f64,
    /// Number of failures by error text.
    pub errors: BTreeMap<String, u64>,
}

impl Program {
    /// Runs the program to its end; a server never ends.
    ///
    /// # Errors
    /// The program cannot listen or start threads. Errors of the load itself are in the report.
    pub fn run(&self) -> Result<()> {
        match self {
            Self::LoadServer { scheduling } => {
                scheduling.take_on()?;
                server::run()
            }
            Self::LoadClient(client) => {
                client.scheduling.take_on()?;
                say(&client::run(client)?)
            }
            Self::LoadWatch { to } => watch::run(*to),
        }
    }
}

/// Prints one JSON line, which the bench reads.
#[expect(clippy::print_stdout, reason = "what a program reports")]
fn say(line: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}
