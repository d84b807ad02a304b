// SPDX-License-Identifier: Apache-2.0
//! The load clients: workers that start together and stop when the time is over.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{
    BULK_PORT, CHUNK, CLOSED_PORT, CRR_PORTS, Client, Done, Histogram, MESSAGE, RR_PORT, Shape,
};

/// Socket timeout, much longer than any successful operation takes.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failure, so that a refused connection does not become a busy loop.
const PAUSE: Duration = Duration::from_millis(5);

/// The results of one worker.
#[derive(Default)]
struct Share {
    units: u64,
    took: Duration,
    latencies: Histogram,
    errors: BTreeMap<String, u64>,
}

impl Share {
    fn failed(&mut self, error: &anyhow::Error) {
        *self.errors.entry(format!("{error:#}")).or_default() += 1;
    }
}

pub(super) fn run(client: &Client) -> Result<Done> {
    ensure!(client.workers > 0, "at least one worker is required");
    let together = Barrier::new(usize::from(client.workers));
    let shares = std::thread::scope(|scope| {
        let start = |index| {
            let together = &together;
            let thread = std::thread::Builder::new().stack_size(256 << 10);
            thread.spawn_scoped(scope, move || work(client, index, together))
        };
        let threads: io::Result<Vec<_>> = (0..client.workers).map(start).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Share>| match thread.join() {
            Ok(share) => share,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.map(|threads| threads.into_iter().map(join).collect::<Vec<_>>())
    })?;
    let (mut done, mut latencies) = (Done::default(), Histogram::default());
    for share in shares {
        done.units += share.units;
        done.seconds = done.seconds.max(share.took.as_secs_f64());
        latencies.merge(&share.latencies);
        for (error, count) in share.errors {
            *done.errors.entry(error).or_default() += count;
        }
    }
    (done.p50_us, done.p99_us) = (latencies.micros(0.5), latencies.micros(0.99));
    Ok(done)
}

fn work(client: &Client, index: u16, together: &Barrier) -> Share {
    let mut share = Share::default();
    let time = Duration::from_secs_f64(client.seconds);
    match client.shape {
        Shape::Bulk => {
            let ready = bulk_connection(client.to);
            together.wait();
            let sent = ready.and_then(|stream| bulk(&stream, time, &mut share));
            sent.unwrap_or_else(|error| share.failed(&error));
        }
        Shape::Rr => {
            let ready = rr_connection(client.to);
            together.wait();
            let asked = ready.and_then(|stream| rr(&stream, time, &mut share));
            asked.unwrap_or_else(|error| share.failed(&error));
        }
        Shape::Crr => {
            // Each worker has its own ports, so that none waits behind another's.
            let ports: Vec<u16> = CRR_PORTS
                .skip(usize::from(index))
                .step_by(usize::from(client.workers))
                .collect();
            together.wait();
            crr(client.to, &ports, time, &mut share);
        }
        Shape::Touch => crr(client.to, &[CLOSED_PORT], Duration::ZERO, &mut share),
    }
    share
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect(to).context("connect")
}

fn long_connection(to: IpAddr, port: u16) -> Result<TcpStream> {
    let stream = connect(SocketAddr::new(to, port))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn bulk_connection(to: IpAddr) -> Result<TcpStream> {
    let mut stream = long_connection(to, BULK_PORT)?;
    stream.read_exact(&mut [0]).context("greeting")?;
    Ok(stream)
}

fn bulk(mut stream: &TcpStream, time: Duration, share: &mut Share) -> Result<()> {
    let buffer = vec![b'.'; CHUNK];
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < time {
        sent += stream.write(&buffer).context("write")? as u64;
    }
    stream.shutdown(Shutdown::Write).context("shutdown")?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived).context("confirmation")?;
    let arrived = u64::from_be_bytes(arrived);
    ensure!(arrived == sent, "{sent} bytes sent, {arrived} arrived");
    (share.units, share.took) = (arrived, begun.elapsed());
    Ok(())
}

fn exchange(mut stream: &TcpStream) -> Result<()> {
    let mut answer = [0; MESSAGE];
    stream.write_all(&[b'?'; MESSAGE]).context("write")?;
    stream.read_exact(&mut answer).context("read")?;
    ensure!(
        answer == [b'?'; MESSAGE],
        "the response differs from the request"
    );
    Ok(())
}

fn rr_connection(to: IpAddr) -> Result<TcpStream> {
    let stream = long_connection(to, RR_PORT)?;
    exchange(&stream)?;
    Ok(stream)
}

fn rr(stream: &TcpStream, time: Duration, share: &mut Share) -> Result<()> {
    let begun = Instant::now();
    let mut asked = begun;
    while asked.duration_since(begun) < time {
        exchange(stream)?;
        let answered = Instant::now();
        share.latencies.add(nanos(answered.duration_since(asked)));
        share.units += 1;
        asked = answered;
    }
    share.took = asked.duration_since(begun);
    Ok(())
}

/// Makes at least one connection, and as many as fit into `time`.
fn crr(to: IpAddr, ports: &[u16], time: Duration, share: &mut Share) {
    let begun = Instant::now();
    for port in ports.iter().cycle() {
        let asked = Instant::now();
        match connect(SocketAddr::new(to, *port)).and_then(|stream| {
            exchange(&stream)?;
            Ok(stream)
        }) {
            Ok(stream) => {
                share.latencies.add(nanos(asked.elapsed()));
                share.units += 1;
                drop(stream);
            }
            Err(error) => {
                share.failed(&error);
                std::thread::sleep(PAUSE);
            }
        }
        share.took = begun.elapsed();
        if share.took >= time {
            return;
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
