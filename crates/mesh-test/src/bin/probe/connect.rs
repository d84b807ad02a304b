// SPDX-License-Identifier: Apache-2.0
//! `probe tcp`: one connection.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_sys::testbed;
use mesh_test::reports::Tcp;
use mesh_test::talk::{ask_identity, canonical, read_line};
use socket2::{SockAddr, Socket};

use crate::args::SocketArgs;
use crate::say;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Destination
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    socket: SocketArgs,
    /// Send the first bytes with MSG_FASTOPEN instead of calling connect()
    #[arg(long)]
    fastopen: bool,
    /// Use an MPTCP socket
    #[arg(long)]
    mptcp: bool,
    /// Connect without blocking, and call connect() again once the socket is writable
    #[arg(long)]
    nonblocking: bool,
    /// Do not ask for the server's identity, for servers other than `probe serve`
    #[arg(long)]
    no_id: bool,
    /// Send this text; `probe serve` returns it, other servers may send up to 64 KiB
    #[arg(long)]
    say: Option<String>,
    /// Close with a reset
    #[arg(long)]
    reset: bool,
    /// Milliseconds to stay connected before closing
    #[arg(long, default_value_t = 0)]
    stay_ms: u64,
}

/// Maximum size of the answer of servers other than `probe serve`, in bytes.
const FOREIGN: u64 = 64 << 10;

pub(crate) fn run(args: &Args) -> Result<bool> {
    let socket = args.socket.tcp(args.to, args.mptcp)?;
    let mut report = Tcp::default();
    if let Err(e) = converse(args, socket, &mut report) {
        let cause = e.downcast_ref::<io::Error>();
        report.errno = cause.and_then(io::Error::raw_os_error);
        report.error = Some(format!("{e:#}"));
    }
    report.ok = report.error.is_none();
    say(&report)?;
    Ok(report.ok)
}

fn converse(args: &Args, socket: Socket, report: &mut Tcp) -> Result<()> {
    let to = SockAddr::from(args.socket.destination(args.to));
    let begun = Instant::now();
    if args.fastopen {
        // This also connects. The identity is requested again below, so that both paths continue
        // alike.
        testbed::send_to(&socket, b"ID\n", libc::MSG_FASTOPEN, &to).context("MSG_FASTOPEN")?;
    } else if args.nonblocking {
        socket
            .connect_timeout(&to, args.socket.timeout())
            .context("connect")?;
        connect_again(&socket, &to)?;
    } else {
        socket.connect(&to).context("connect")?;
    }
    report.connect_us = u64::try_from(begun.elapsed().as_micros())?;
    let mut stream = TcpStream::from(socket);
    report.local = Some(canonical(stream.local_addr().context("getsockname")?));
    report.peer = Some(canonical(stream.peer_addr().context("getpeername")?));
    if args.fastopen {
        report.identity = Some(read_line(&mut stream).context("read")?.parse()?);
    } else if !args.no_id {
        report.identity = Some(ask_identity(&mut stream).context("identity")?);
    }
    if let Some(text) = &args.say {
        report.received = Some(exchange(&mut stream, text, args.no_id)?);
    }
    std::thread::sleep(Duration::from_millis(args.stay_ms));
    if args.reset {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

/// Calls connect() again, as applications do until it succeeds: EISCONN, or 0 the first time.
fn connect_again(socket: &Socket, to: &SockAddr) -> Result<()> {
    socket.set_nonblocking(true)?;
    let again = socket.connect(to);
    socket.set_nonblocking(false)?;
    match again {
        Err(e) if e.raw_os_error() != Some(libc::EISCONN) => Err(e).context("second connect"),
        _ => Ok(()),
    }
}

fn exchange(stream: &mut TcpStream, text: &str, foreign: bool) -> Result<String> {
    let mut received = Vec::new();
    if foreign {
        stream.write_all(text.as_bytes()).context("write")?;
        stream
            .take(FOREIGN)
            .read_to_end(&mut received)
            .context("read")?;
    } else {
        stream.write_all(b"ECHO\n").context("write")?;
        stream.write_all(text.as_bytes()).context("write")?;
        stream.shutdown(Shutdown::Write).context("shutdown")?;
        stream.read_to_end(&mut received).context("read")?;
        anyhow::ensure!(
            received == text.as_bytes(),
            "the echo differs from the text"
        );
    }
    Ok(String::from_utf8_lossy(&received).into_owned())
}
