// SPDX-License-Identifier: Apache-2.0
//! `probe checks`: many single connections and datagrams in parallel, as listed on standard input.

use std::io::{self, Read};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_plan::cluster::Transport;
use mesh_test::talk::{Identity, ask_identity};
use mesh_test::truth::attempt::{Attempt, Outcome};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Threads, each with one attempt at a time
    #[arg(long, default_value_t = 64)]
    threads: usize,
    /// Milliseconds without progress after which the attempt fails
    #[arg(long, default_value_t = 1500)]
    timeout_ms: u64,
}

/// Reads a JSON list of attempts from standard input and prints one line per result, in any order.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut input = String::new();
    io::stdin().read_to_string(&mut input)?;
    let attempts: Vec<Attempt> = serde_json::from_str(&input).context("the list of attempts")?;
    let timeout = Duration::from_millis(args.timeout_ms);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let work = || {
            while let Some(attempt) = attempts.get(next.fetch_add(1, Ordering::Relaxed)) {
                say(&tried(attempt, timeout))?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..args.threads.min(attempts.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().try_for_each(join)
    })?;
    Ok(true)
}

fn tried(attempt: &Attempt, timeout: Duration) -> Outcome {
    let result = match attempt.transport {
        Transport::Udp => datagram(attempt, timeout),
        Transport::Tcp | Transport::Sctp => connection(attempt, timeout),
    };
    let (answer, error) = match result {
        Ok(answer) => (Some(answer), None),
        Err(error) => (None, Some(error)),
    };
    Outcome {
        id: attempt.id,
        answer,
        errno: error.as_ref().and_then(|error| {
            error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::raw_os_error)
        }),
        error: error.map(|error| format!("{error:#}")),
    }
}

fn socket(attempt: &Attempt, timeout: Duration) -> Result<Socket> {
    let (kind, protocol) = match attempt.transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
        Transport::Sctp => (Type::STREAM, Protocol::from(libc::IPPROTO_SCTP)),
    };
    let socket = Socket::new(Domain::for_address(attempt.to), kind, Some(protocol))?;
    socket.set_read_timeout(Some(timeout))?;
    // The send timeout also bounds a blocking connect().
    socket.set_write_timeout(Some(timeout))?;
    if let Some(from) = attempt.from {
        let from = SocketAddr::new(from, 0);
        socket.bind(&SockAddr::from(from)).context("bind")?;
    }
    Ok(socket)
}

fn connection(attempt: &Attempt, timeout: Duration) -> Result<Identity> {
    let socket = socket(attempt, timeout)?;
    socket
        .connect(&SockAddr::from(attempt.to))
        .context("connect")?;
    ask_identity(&mut socket.into()).context("identity")
}

fn datagram(attempt: &Attempt, timeout: Duration) -> Result<Identity> {
    let socket = UdpSocket::from(socket(attempt, timeout)?);
    let said = format!("attempt-{}", attempt.id);
    socket
        .send_to(said.as_bytes(), attempt.to)
        .context("send")?;
    let until = Instant::now() + timeout;
    let mut buffer = [0; 1024];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let (length, from) = socket.recv_from(&mut buffer).context("receive")?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        if from == attempt.to && text.ends_with(&said) {
            return Ok(text.parse()?);
        }
    }
}
