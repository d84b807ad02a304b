// SPDX-License-Identifier: Apache-2.0
//! Output of `probe`: one JSON line per result.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::process::Proc;
use crate::talk::Identity;

/// How long a storm may take for its report.
const REPORT: Duration = Duration::from_secs(120);

/// Result of `probe tcp`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tcp {
    /// Every step succeeded.
    pub ok: bool,
    /// The call that failed, with its error.
    pub error: Option<String>,
    /// Its `errno`.
    pub errno: Option<i32>,
    /// Microseconds until connected.
    pub connect_us: u64,
    /// `getsockname` after connecting, IPv4 in IPv6 unmapped.
    pub local: Option<SocketAddr>,
    /// `getpeername` after connecting, likewise.
    pub peer: Option<SocketAddr>,
    /// What the server saw.
    pub identity: Option<Identity>,
    /// What came back for `--say`.
    pub received: Option<String>,
}

impl Tcp {
    /// Whether both endpoints saw the same two addresses.
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
    /// Connections that were answered with the expected addresses.
    pub ok: u64,
    /// Connections that were answered with other addresses.
    pub wrong: u64,
    /// Connections that failed.
    pub failed: u64,
    /// From the first connect to the last close.
    pub seconds: f64,
    /// Median of connect, request, answer and close.
    pub p50_us: u64,
    /// 99th percentile of the same.
    pub p99_us: u64,
    /// Number of each error.
    pub errors: BTreeMap<String, u64>,
    /// The first wrong answers.
    pub wrong_answers: Vec<String>,
    /// Number of answers of each server.
    pub names: BTreeMap<String, u64>,
    /// Bytes that the client wrote.
    pub bytes_sent: u64,
    /// Bytes that the client read.
    pub bytes_received: u64,
}

impl Storm {
    /// Ends a running `probe storm` and returns its report. Does nothing to one that has ended.
    ///
    /// # Errors
    /// It prints no report.
    pub fn stop(storm: &Proc) -> Result<Self> {
        storm.signal(libc::SIGTERM)?;
        Self::of(storm)
    }

    /// Waits for the report of a `probe storm` that ends by itself.
    ///
    /// # Errors
    /// It prints no report within two minutes.
    pub fn of(storm: &Proc) -> Result<Self> {
        let line = storm.next_line(REPORT)?;
        serde_json::from_str(&line).with_context(|| format!("not the report of a storm: {line}"))
    }
}

/// Result of `probe bulk`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bulk {
    /// Payload bytes sent, or received with `--reverse`.
    pub bytes: u64,
    /// What the servers say they read; equal to `bytes` unless something was lost.
    pub confirmed: u64,
    /// From the first byte to the last confirmation.
    pub seconds: f64,
}

/// Result of `probe rr`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestResponse {
    /// Requests that were answered.
    pub requests: u64,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
}

/// What `probe hold` says while its connections live, one line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// All connections are open: their local addresses.
    Open(Vec<SocketAddr>),
    /// One connection ended.
    Closed {
        /// Its local address.
        local: SocketAddr,
        /// `eof`, `reset`, `aborted`, `timeout`, `other bytes` than were sent, or the error's text.
        how: String,
        /// Milliseconds after it was opened.
        after_ms: u64,
        /// Bytes that came back.
        echoed: u64,
    },
    /// The time given is over; so many connections are still open.
    End {
        /// Connections that still answered.
        open: usize,
    },
}

/// Result of `probe udp`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Udp {
    /// Datagrams that were sent without error.
    pub sent: u64,
    /// Answers.
    pub received: u64,
    /// How often which error came, from sending or receiving.
    pub errors: BTreeMap<String, u64>,
    /// Who answered, as the client sees it (`recvfrom`), and how often.
    pub from: BTreeMap<SocketAddr, u64>,
    /// Number of answers of each server.
    pub names: BTreeMap<String, u64>,
    /// `getsockname` at the end.
    pub local: Option<SocketAddr>,
    /// `getpeername` at the end, of a connected socket.
    pub peer: Option<SocketAddr>,
    /// What the server saw of the last datagram that was answered.
    pub identity: Option<Identity>,
}

/// What `probe serve` says: first that it listens, then, with `--report`, each arrival.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Served {
    /// All sockets are open.
    Listening(Vec<SocketAddr>),
    /// A connection was accepted.
    Connection(Identity),
    /// A datagram came.
    Datagram(Identity),
}
