// SPDX-License-Identifier: Apache-2.0
//! The load of the bench: one server and one client program, blocking threads, nothing else.
//!
//! Owns what both say to each other and what the client reports. Knows nothing of labs or meshes:
//! the same two programs run with and without one.

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
/// Port of requests on long connections.
pub(super) const RR_PORT: u16 = 5002;
/// Ports of short connections. The client closes first and its port then waits a minute
/// (TIME_WAIT): 64 destinations leave enough of them at any rate that one machine reaches.
pub(super) const CRR_PORTS: RangeInclusive<u16> = 5100..=5163;
/// A port that the server serves like [`CRR_PORTS`] and that no policy allows.
pub(super) const CLOSED_PORT: u16 = 5999;
/// Bytes of a request, and of an answer.
pub(super) const MESSAGE: usize = 64;
/// Bytes per read or write of bulk transfers, as iperf3 has them.
const CHUNK: usize = 128 << 10;

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// Each worker sends to its own connection as fast as that takes it; the server says how much
    /// it got.
    Bulk,
    /// Each worker asks on its own connection, waits for the answer, and asks again.
    Rr,
    /// Each worker connects, asks, reads the answer, closes, and does it again.
    Crr,
    /// As `Crr`, once, to [`CLOSED_PORT`].
    Touch,
}

/// The load programs, as subcommands of the bench itself: what it starts in pods.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Program {
    /// Serve every shape until killed
    #[command(hide = true)]
    LoadServer {
        /// Where and when
        #[command(flatten)]
        scheduling: Scheduling,
    },
    /// Make load and report it
    #[command(hide = true)]
    LoadClient(Client),
    /// Connect again and again, and say when the answer changes
    #[command(hide = true)]
    LoadWatch {
        /// The server
        #[arg(long)]
        to: SocketAddr,
    },
}

/// A client's orders.
#[derive(Clone, Debug, clap::Args)]
pub struct Client {
    /// What to do
    #[arg(long)]
    pub shape: Shape,
    /// The server
    #[arg(long)]
    pub to: IpAddr,
    /// Threads, each with one connection at a time
    #[arg(long, default_value_t = 1)]
    pub workers: u16,
    /// For how long
    #[arg(long)]
    pub seconds: f64,
    #[command(flatten)]
    scheduling: Scheduling,
}

/// Where and when a load program runs.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Scheduling {
    /// Bind all threads to this CPU
    #[arg(long)]
    cpu: Option<usize>,
    /// Go before all other programs of the machine
    #[arg(long)]
    ahead: bool,
}

impl Scheduling {
    /// Before any thread is made: they inherit it.
    fn take_on(self) -> Result<()> {
        if self.ahead {
            go_ahead("self")?;
        }
        self.cpu.map_or(Ok(()), testbed::pin_to_cpu)?;
        Ok(())
    }
}

/// Gives a process of a session of its own (`self`, or its id) precedence over the machine's other
/// sessions: the nice value of its autogroup (sched(7)), which alone counts between sessions.
pub(super) fn go_ahead(process: &str) -> Result<()> {
    let path = format!("/proc/{process}/autogroup");
    std::fs::write(&path, "-20").with_context(|| path)
}

/// What a client has done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// Bytes that arrived, requests answered on long connections, or connections served.
    pub units: u64,
    /// From the first request to the last answer; connections made before do not count.
    pub seconds: f64,
    /// Median from request (short connections: from connect) to answer, in microseconds; of bulk 0.
    pub p50_us: f64,
    /// 99th percentile of the same.
    pub p99_us: f64,
    /// What failed, by error, and how often.
    pub errors: BTreeMap<String, u64>,
}

impl Program {
    /// Runs it to its end: a server has none.
    ///
    /// # Errors
    /// It cannot listen, or cannot start threads. What fails of the load itself is reported.
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

/// Prints one JSON line, read by the bench.
#[expect(clippy::print_stdout, reason = "what a program reports")]
fn say(line: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}
