// SPDX-License-Identifier: Apache-2.0
//! `probe bulk`, `rr` and `hold`: clients with long-lived connections.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_sys::testbed;
use mesh_test::reports::{Bulk, Held, RequestResponse};
use mesh_test::talk::{CHUNK, canonical, read_line};
use socket2::SockAddr;

use crate::args::{SocketArgs, percentile};
use crate::say;

fn connect(socket: &SocketArgs, to: SocketAddr) -> Result<TcpStream> {
    let connected = socket.tcp(to, false)?;
    connected
        .connect(&SockAddr::from(socket.destination(to)))
        .context("connect")?;
    let stream = TcpStream::from(connected);
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Runs `work` on `count` threads and returns all results, or the first error.
fn on_threads<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let start = |index| {
            let thread = std::thread::Builder::new().stack_size(256 << 10);
            thread.spawn_scoped(scope, move || work(index))
        };
        let threads: io::Result<Vec<_>> = (0..count).map(start).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads?.into_iter().map(join).collect()
    })
}

#[derive(clap::Args)]
pub(crate) struct BulkArgs {
    /// Destination
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    socket: SocketArgs,
    /// Number of connections
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Bytes of each connection
    #[arg(long)]
    bytes: Option<u64>,
    /// Duration in seconds (default without --bytes: 1)
    #[arg(long)]
    seconds: Option<f64>,
    /// Transfer from the server to the client
    #[arg(long)]
    reverse: bool,
    /// Bind the sending (or receiving) threads to this CPU
    #[arg(long)]
    cpu: Option<usize>,
}

pub(crate) fn bulk(args: &BulkArgs) -> Result<bool> {
    let seconds = args.seconds.or_else(|| args.bytes.is_none().then_some(1.0));
    let limit = args.bytes.unwrap_or(u64::MAX);
    let together = Barrier::new(args.streams);
    let begun = Instant::now();
    let shares = on_threads(args.streams, |_| {
        args.cpu.map_or(Ok(()), testbed::pin_to_cpu)?;
        let connected = connect(&args.socket, args.to);
        together.wait();
        let mut stream = connected?;
        let until = seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
        if args.reverse {
            let got = receive(&mut stream, args.bytes, until)?;
            Ok((got, args.bytes.unwrap_or(got)))
        } else {
            send(&mut stream, limit, until)
        }
    })?;
    let report = Bulk {
        bytes: shares.iter().map(|share| share.0).sum(),
        confirmed: shares.iter().map(|share| share.1).sum(),
        seconds: begun.elapsed().as_secs_f64(),
    };
    say(&report)?;
    Ok(report.bytes == report.confirmed && report.bytes > 0)
}

fn over(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}

fn send(stream: &mut TcpStream, limit: u64, until: Option<Instant>) -> Result<(u64, u64)> {
    let buffer = vec![b'.'; CHUNK];
    stream.write_all(b"SINK\n").context("write")?;
    let mut sent = 0;
    while sent < limit && !over(until) {
        let most = usize::try_from(limit - sent).unwrap_or(CHUNK).min(CHUNK);
        sent += stream.write(&buffer[..most]).context("write")? as u64;
    }
    stream.shutdown(Shutdown::Write).context("shutdown")?;
    let confirmed = read_line(stream).context("read")?.parse()?;
    Ok((sent, confirmed))
}

fn receive(stream: &mut TcpStream, bytes: Option<u64>, until: Option<Instant>) -> Result<u64> {
    let mut buffer = vec![0; CHUNK];
    stream
        .write_all(format!("SOURCE {}\n", bytes.unwrap_or(0)).as_bytes())
        .context("write")?;
    let mut got = 0;
    while !over(until) {
        match stream.read(&mut buffer).context("read")? {
            0 => break,
            part => got += part as u64,
        }
    }
    Ok(got)
}

#[derive(clap::Args)]
pub(crate) struct RrArgs {
    /// Destination
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    socket: SocketArgs,
    /// Number of connections, each on its own thread
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Bytes of a request and of an answer
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Requests of each connection
    #[arg(long)]
    count: Option<u64>,
    /// Duration in seconds (default without --count: 1)
    #[arg(long)]
    seconds: Option<f64>,
    /// Bind the threads to this CPU
    #[arg(long)]
    cpu: Option<usize>,
}

pub(crate) fn rr(args: &RrArgs) -> Result<bool> {
    let seconds = args.seconds.or_else(|| args.count.is_none().then_some(1.0));
    let limit = args.count.unwrap_or(u64::MAX);
    let together = Barrier::new(args.connections);
    let shares = on_threads(args.connections, |_| {
        args.cpu.map_or(Ok(()), testbed::pin_to_cpu)?;
        let connected = connect(&args.socket, args.to);
        together.wait();
        let mut stream = connected?;
        let begun = Instant::now();
        let until = seconds.map(|seconds| begun + Duration::from_secs_f64(seconds));
        stream.write_all(format!("RR {}\n", args.size).as_bytes())?;
        let (request, mut answer) = (vec![b'?'; args.size], vec![0; args.size]);
        let mut nanos = Vec::new();
        while (nanos.len() as u64) < limit && !over(until) {
            let asked = Instant::now();
            stream.write_all(&request).context("write")?;
            stream.read_exact(&mut answer).context("read")?;
            ensure!(answer == request, "the answer differs from the request");
            nanos.push(u64::try_from(asked.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
        Ok((nanos, begun.elapsed()))
    })?;
    let seconds = shares
        .iter()
        .map(|share| share.1.as_secs_f64())
        .fold(0.0, f64::max);
    let mut nanos: Vec<u64> = shares.into_iter().flat_map(|share| share.0).collect();
    nanos.sort_unstable();
    #[expect(
        clippy::cast_precision_loss,
        reason = "latencies are far below 2^52 ns"
    )]
    let micros = |part| percentile(&nanos, part) as f64 / 1000.0;
    say(&RequestResponse {
        requests: nanos.len() as u64,
        seconds,
        p50_us: micros(0.5),
        p99_us: micros(0.99),
    })?;
    Ok(!nanos.is_empty())
}

#[derive(clap::Args)]
pub(crate) struct HoldArgs {
    /// Destination
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    socket: SocketArgs,
    /// Number of connections
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Send this every --pulse-ms and expect it back
    #[arg(long, default_value = "pulse")]
    say: String,
    /// Interval in milliseconds; 0: send nothing, only wait for the connection to end
    #[arg(long, default_value_t = 50)]
    pulse_ms: u64,
    /// Duration in seconds
    #[arg(long, default_value_t = 3600.0)]
    seconds: f64,
}

pub(crate) fn hold(args: &HoldArgs) -> Result<bool> {
    let begun = Instant::now();
    let until = begun + Duration::from_secs_f64(args.seconds);
    let mut streams = Vec::new();
    for _ in 0..args.count {
        let mut stream = connect(&args.socket, args.to)?;
        stream.write_all(b"ECHO\n")?;
        streams.push(stream);
    }
    let local: io::Result<Vec<_>> = streams.iter().map(TcpStream::local_addr).collect();
    say(&Held::Open(local?.into_iter().map(canonical).collect()))?;
    let open = AtomicUsize::new(args.count);
    on_threads(args.count, |index| {
        let mut stream = &streams[index];
        let mut echoed = 0;
        let Some(how) = live(args, &mut stream, until, &mut echoed) else {
            return Ok(());
        };
        open.fetch_sub(1, Ordering::Relaxed);
        let local = canonical(stream.local_addr()?);
        let after_ms = u64::try_from(begun.elapsed().as_millis())?;
        say(&Held::Closed {
            local,
            how,
            after_ms,
            echoed,
        })
    })?;
    let open = open.into_inner();
    say(&Held::End { open })?;
    Ok(open == args.count)
}

/// Keeps one connection alive and returns how it ended, or `None` if the time is over.
fn live(
    args: &HoldArgs,
    stream: &mut &TcpStream,
    until: Instant,
    echoed: &mut u64,
) -> Option<String> {
    let mut buffer = vec![0; args.say.len()];
    while Instant::now() < until {
        if args.pulse_ms == 0 {
            let pause = until.saturating_duration_since(Instant::now());
            match testbed::poll_readable(&**stream, pause) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(e) => return Some(ending(&e)),
            }
        } else if let Err(e) = stream.write_all(args.say.as_bytes()) {
            return Some(ending(&e));
        }
        match stream.read_exact(&mut buffer) {
            Ok(()) if buffer != args.say.as_bytes() => return Some("other bytes".to_owned()),
            Ok(()) => *echoed += buffer.len() as u64,
            Err(e) => return Some(ending(&e)),
        }
        std::thread::sleep(Duration::from_millis(args.pulse_ms));
    }
    None
}

fn ending(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ECONNRESET) => "reset".to_owned(),
        Some(libc::ECONNABORTED) => "aborted".to_owned(),
        Some(libc::EAGAIN | libc::ETIMEDOUT) => "timeout".to_owned(),
        Some(_) => error.to_string(),
        None if error.kind() == ErrorKind::UnexpectedEof => "eof".to_owned(),
        None => error.to_string(),
    }
}
