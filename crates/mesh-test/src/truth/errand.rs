// SPDX-License-Identifier: Apache-2.0
//! What `probe checks` is told to try, and what it says came of it.

use std::net::{IpAddr, SocketAddr};

use mesh_plan::cluster::Transport;
use serde::{Deserialize, Serialize};

use crate::talk::Identity;

/// One connection or datagram to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errand {
    /// Its number, which the result carries.
    pub id: usize,
    /// A datagram (UDP) or a connection.
    pub transport: Transport,
    /// Bind to this address; else the kernel chooses.
    pub from: Option<IpAddr>,
    /// Where to.
    pub to: SocketAddr,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// Of which errand.
    pub id: usize,
    /// What the server saw, if it answered.
    pub answer: Option<Identity>,
    /// Which call failed, and how.
    pub error: Option<String>,
    /// Its `errno`.
    pub errno: Option<i32>,
}

impl Tried {
    /// Whether it came about; what fails otherwise than a refusal does is neither.
    ///
    /// # Errors
    /// It failed for another reason than that it is refused.
    pub fn allowed(&self) -> Result<bool, String> {
        const REFUSED: [i32; 8] = [
            libc::ECONNREFUSED,
            libc::ECONNRESET,
            libc::EPIPE,
            libc::ETIMEDOUT,
            libc::EAGAIN,
            // A blocking connect() whose time is over.
            libc::EINPROGRESS,
            libc::EPERM,
            libc::EACCES,
        ];
        match (&self.answer, &self.error, self.errno) {
            (Some(_), _, _) => Ok(true),
            (None, _, Some(errno)) if REFUSED.contains(&errno) => Ok(false),
            // The other end closed before it answered.
            (None, Some(_), None) => Ok(false),
            (None, error, _) => Err(error.clone().unwrap_or_default()),
        }
    }
}
