// SPDX-License-Identifier: Apache-2.0
//! Sockets of a host as listed by `ss` of iproute2: evidence that is independent of the agent.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use crate::process::{Cmd, Host};

/// A TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// State as `ss` names it, e.g. `ESTAB`, `LISTEN`.
    pub state: String,
    /// Local address and port; `None` if it is not a plain address (e.g. `*`).
    pub local: Option<SocketAddr>,
    /// Remote address and port; `None` if it is not a plain address (e.g. `*`).
    pub remote: Option<SocketAddr>,
}

impl Host {
    /// Returns all TCP sockets of the namespace.
    ///
    /// # Errors
    /// `ss` cannot be run.
    pub fn tcp_sockets(&self) -> Result<Vec<TcpSocket>> {
        let output = self
            .run(Cmd::line("ss -Htan"), Duration::from_secs(10))?
            .ok()?;
        Ok(output.text().lines().filter_map(parse).collect())
    }
}

fn parse(line: &str) -> Option<TcpSocket> {
    let mut words = line.split_ascii_whitespace();
    let state = words.next()?.to_owned();
    let mut end = |skip| words.nth(skip).map(endpoint);
    Some(TcpSocket {
        state,
        local: end(2)?,
        remote: end(0)?,
    })
}

/// Parses an address and port of `ss`, which appends the interface of bound sockets to the address:
/// `10.0.0.1%eth0:80`, `[fd00::1]%eth0:80`.
fn endpoint(word: &str) -> Option<SocketAddr> {
    let (address, port) = word.rsplit_once(':')?;
    let address = address
        .split_once('%')
        .map_or(address, |(address, _)| address);
    let address = address.trim_start_matches('[').trim_end_matches(']');
    Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ss_lines_are_parsed() {
        let socket = parse("ESTAB 0      0      10.244.1.10%eth0:52 [fd00::1]:80 ").expect("line");
        assert_eq!(socket.state, "ESTAB");
        assert_eq!(socket.local, "10.244.1.10:52".parse().ok());
        assert_eq!(socket.remote, "[fd00::1]:80".parse().ok());
        let bound = parse("ESTAB 0 0 [fd00::2]%lo:52 [fd00::1]:80").expect("line");
        assert_eq!(bound.local, "[fd00::2]:52".parse().ok());
        let listener = parse("LISTEN 0 128 *:80 *:*").expect("line");
        assert_eq!((listener.local, listener.remote), (None, None));
    }
}
