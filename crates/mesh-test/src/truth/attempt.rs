// SPDX-License-Identifier: Apache-2.0
//! Input and output of `probe checks`: connections to try, and their outcomes.

use std::net::{IpAddr, SocketAddr};

use mesh_plan::cluster::Transport;
use serde::{Deserialize, Serialize};

use crate::talk::Identity;

/// One connection or datagram to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Number of the attempt, repeated in its outcome.
    pub id: usize,
    /// UDP (a datagram), or the protocol of a connection.
    pub transport: Transport,
    /// Source address (default: the kernel's choice).
    pub from: Option<IpAddr>,
    /// Destination.
    pub to: SocketAddr,
}

/// Outcome of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Number of the attempt, as in its input.
    pub id: usize,
    /// The server's answer, if any.
    pub answer: Option<Identity>,
    /// The call that failed, with its error.
    pub error: Option<String>,
    /// `errno` of the failed call.
    pub errno: Option<i32>,
}

impl Outcome {
    /// Returns whether the connection was allowed (true) or refused (false).
    ///
    /// # Errors
    /// The attempt failed for a reason other than refusal.
    pub fn allowed(&self) -> Result<bool, String> {
        const REFUSED: [i32; 8] = [
            libc::ECONNREFUSED,
            libc::ECONNRESET,
            libc::EPIPE,
            libc::ETIMEDOUT,
            libc::EAGAIN,
            // A blocking connect() timed out.
            libc::EINPROGRESS,
            libc::EPERM,
            libc::EACCES,
        ];
        match (&self.answer, &self.error, self.errno) {
            (Some(_), _, _) => Ok(true),
            (None, _, Some(errno)) if REFUSED.contains(&errno) => Ok(false),
            // The peer closed the connection before it answered.
            (None, Some(_), None) => Ok(false),
            (None, error, _) => Err(error.clone().unwrap_or_default()),
        }
    }
}
