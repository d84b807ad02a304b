// SPDX-License-Identifier: Apache-2.0
//! `probe udp`: a client that sends datagrams and checks the answers.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_test::reports::Udp;
use mesh_test::talk::{Identity, canonical};
use socket2::SockAddr;

use crate::args::SocketArgs;
use crate::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Destination; may be repeated for an unconnected socket, which alternates between them
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    #[command(flatten)]
    socket: SocketArgs,
    /// Connect the socket first
    #[arg(long)]
    connected: bool,
    /// Number of datagrams
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Pause between datagrams in milliseconds
    #[arg(long, default_value_t = 0)]
    interval_ms: u64,
    /// Payload
    #[arg(long, default_value = "datagram")]
    say: String,
    /// Do not wait for answers
    #[arg(long)]
    no_answer: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    ensure!(
        !args.connected || args.to.len() == 1,
        "one destination for a connected socket"
    );
    let socket = args.socket.udp(args.to[0])?;
    let mut report = Udp::default();
    if args.connected {
        let to = SockAddr::from(args.socket.destination(args.to[0]));
        if let Err(e) = socket.connect(&to) {
            count_error(&mut report, "connect", &e);
            say(&report)?;
            return Ok(false);
        }
    }
    let socket = UdpSocket::from(socket);
    for (number, to) in (0..args.count).zip(args.to.iter().cycle()) {
        if number > 0 {
            std::thread::sleep(Duration::from_millis(args.interval_ms));
        }
        match send(args, &socket, *to) {
            Ok(_) => report.sent += 1,
            Err(e) => {
                count_error(&mut report, "send", &e);
                continue;
            }
        }
        if !args.no_answer {
            answer(args, &socket, &mut report)?;
        }
    }
    report.local = socket.local_addr().ok().map(canonical);
    report.peer = socket.peer_addr().ok().map(canonical);
    say(&report)?;
    let expected = if args.no_answer { 0 } else { args.count };
    Ok(report.sent == args.count && report.received == expected)
}

fn send(args: &Args, socket: &UdpSocket, to: SocketAddr) -> io::Result<usize> {
    if args.connected {
        socket.send(args.say.as_bytes())
    } else {
        socket.send_to(args.say.as_bytes(), args.socket.destination(to))
    }
}

fn count_error(report: &mut Udp, call: &str, error: &io::Error) {
    *report.errors.entry(format!("{call}: {error}")).or_default() += 1;
}

/// Waits for the answer to the last datagram; late answers to earlier ones are ignored.
fn answer(args: &Args, socket: &UdpSocket, report: &mut Udp) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let until = Instant::now() + args.socket.timeout();
    let left = until.saturating_duration_since(Instant::now());
    socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
    let (length, from) = match socket.recv_from(&mut buffer) {
        Ok(got) => got,
        Err(e) => {
            count_error(report, "receive", &e);
            return Ok(());
        }
    };
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let identity: Identity = text.parse().context("answer")?;
    ensure!(
        text.ends_with(&args.say),
        "the answer {text:?} does not repeat what was sent"
    );
    report.received += 1;
    *report.from.entry(canonical(from)).or_default() += 1;
    *report.names.entry(identity.name.clone()).or_default() += 1;
    report.identity = Some(identity);
    Ok(())
}
