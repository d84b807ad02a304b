// SPDX-License-Identifier: Apache-2.0
//! Output of `probe`: one JSON line per result.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::process::Proc;
use crate::talk::Identity;

/// Deadline for a storm's report.
const REPORT: Duration = Duration::from_secs(120);

/// Result of `probe tcp`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tcp {
    /// True if every step succeeded.
    pub ok: bool,
    /// The call that failed, with its error.
    pub error: Option<String>,
    /// `errno` of the failed call.
    pub errno: Option<i32>,
    /// Time to connect in microseconds.
    pub connect_us: u64,
    /// Result of `getsockname` after connecting; an IPv4-mapped address is given as IPv4.
    pub local: Option<SocketAddr>,
    /// Result of `getpeername` after connecting; an IPv4-mapped address is given as IPv4.
    pub peer: Option<SocketAddr>,
    /// The addresses that the server saw, and its name.
    pub identity: Option<Identity>,
    /// Bytes that came back for `--say`.
    pub received: Option<String>,
}

impl Tcp {
    /// Returns whether both endpoints saw the same two addresses.
    #[must_use]
    pub fn ends_agree(&self) -> bool {
        self.identity
            .as_ref()
            .is_some_and(|seen| Some(seen.client) == self.local && Some(seen.server) == self.peer)
    }
}

/// Result of `probe storm`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Storm {
    /// Number of connections that were answered with the expected addresses.
    pub ok: u64,
    /// Number of connections that were answered with other addresses.
    pub wrong: u64,
    /// Number of connections that failed.
    pub failed: u64,
    /// Time from the first connect to the last close, in seconds.
    pub seconds: f64,
    /// Median time of connect, request, answer and close together, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of that time in microseconds.
    pub p99_us: u64,
    /// Number of errors by text.
    pub errors: BTreeMap<String, u64>,
    /// The first wrong answers, as text.
    pub wrong_answers: Vec<String>,
    /// Number of answers by server name.
    pub names: BTreeMap<String, u64>,
    /// Bytes that the client wrote.
    pub bytes_sent: u64,
    /// Bytes that the client read.
    pub bytes_received: u64,
}

impl Storm {
    /// Stops a running `probe storm` and returns its report; one that has exited is not signaled.
    ///
    /// # Errors
    /// The program prints no report.
    pub fn stop(storm: &Proc) -> Result<Self> {
        storm.signal(libc::SIGTERM)?;
        Self::of(storm)
    }

    /// Waits for the report of a `probe storm` that exits by itself.
    ///
    /// # Errors
    /// The program prints no report within two minutes.
    pub fn of(storm: &Proc) -> Result<Self> {
        let line = storm.next_line(REPORT)?;
        serde_json::from_str(&line).with_context(|| format!("invalid storm report: {line}"))
    }
}

/// Result of `probe bulk`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bulk {
    /// Payload bytes sent, or received with `--reverse`.
    pub bytes: u64,
    /// Bytes that the servers report as read; equal to `bytes` unless something was lost.
    pub confirmed: u64,
    /// Time from the first byte to the last confirmation, in seconds.
    pub seconds: f64,
}

/// Result of `probe rr`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestResponse {
    /// Number of requests that were answered.
    pub requests: u64,
    /// Time from the first request to the last answer, in seconds.
    pub seconds: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the latency in microseconds.
    pub p99_us: f64,
}

/// Events of `probe hold`, one line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// All connections are open, with these local addresses.
    Open(Vec<SocketAddr>),
    /// A connection ended.
    Closed {
        /// Local address of the connection.
        local: SocketAddr,
        /// The cause: `eof`, `reset`, `aborted`, `timeout`, `other bytes` than sent, or the error's
        /// text.
        how: String,
        /// Lifetime of the connection in milliseconds.
        after_ms: u64,
        /// Number of bytes that came back.
        echoed: u64,
    },
    /// The duration is over.
    End {
        /// Number of connections that still answered.
        open: usize,
    },
}

/// Result of `probe udp`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Udp {
    /// Number of datagrams that were sent without error.
    pub sent: u64,
    /// Number of answers.
    pub received: u64,
    /// Number of send and receive errors by text.
    pub errors: BTreeMap<String, u64>,
    /// Number of answers by source address (`recvfrom`).
    pub from: BTreeMap<SocketAddr, u64>,
    /// Number of answers by server name.
    pub names: BTreeMap<String, u64>,
    /// Result of `getsockname` at the end.
    pub local: Option<SocketAddr>,
    /// Result of `getpeername` at the end, for a connected socket.
    pub peer: Option<SocketAddr>,
    /// The addresses that the server saw for the last answered datagram, and its name.
    pub identity: Option<Identity>,
}

/// Events of `probe serve`: first that it listens, then, with `--report`, each arrival.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Served {
    /// All sockets are open, with these addresses.
    Listening(Vec<SocketAddr>),
    /// A connection was accepted.
    Connection(Identity),
    /// A datagram was received.
    Datagram(Identity),
}
