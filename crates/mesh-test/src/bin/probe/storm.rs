// SPDX-License-Identifier: Apache-2.0
//! `probe storm`: many short connections that the client closes first, with each answer checked.
//! SIGTERM ends it early, with its report.

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_sys::testbed::{block_interrupts, wait_for_interrupt};
use mesh_test::reports::Storm;
use mesh_test::talk::{Identity, ask_identity, canonical};
use socket2::SockAddr;

use crate::args::{Net, Ports, Random, SocketArgs, percentile};
use crate::say;

/// Set by SIGTERM; no further connection starts.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// Number of wrong answers that are reported in full.
const EXAMPLES: usize = 10;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Destination, may be repeated
    #[arg(long)]
    to: Vec<SocketAddr>,
    /// Random destinations in this network, may be repeated
    #[arg(long)]
    net: Vec<Net>,
    /// Ports of the random destinations, and of those of --to if given
    #[arg(long)]
    ports: Option<Ports>,
    #[command(flatten)]
    socket: SocketArgs,
    /// Number of threads, each with one connection at a time
    #[arg(long, default_value_t = 1)]
    threads: u64,
    /// Total number of connections
    #[arg(long)]
    count: Option<u64>,
    /// Duration in seconds (default without --count: 1)
    #[arg(long)]
    seconds: Option<f64>,
    /// Accept a server address other than the destination (behind a Service)
    #[arg(long)]
    any_server: bool,
    /// Pause of each thread between connections in microseconds
    #[arg(long, default_value_t = 0)]
    pause_us: u64,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Default)]
struct Share {
    report: Storm,
    micros: Vec<u64>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    ensure!(
        !args.to.is_empty() || !args.net.is_empty(),
        "--to or --net is required"
    );
    ensure!(
        args.net.is_empty() || args.ports.is_some(),
        "--net needs --ports"
    );
    block_interrupts()?;
    let _waiter = std::thread::spawn(|| {
        if wait_for_interrupt().is_ok() {
            STOPPED.store(true, Ordering::Relaxed);
        }
    });
    let left = AtomicU64::new(args.count.unwrap_or(u64::MAX));
    let seconds = args.seconds.or_else(|| args.count.is_none().then_some(1.0));
    let begun = Instant::now();
    let until = seconds.map(|seconds| begun + Duration::from_secs_f64(seconds));
    let shares: Vec<Share> = std::thread::scope(|scope| {
        let start = |thread| {
            let (args, left) = (&*args, &left);
            scope.spawn(move || storm(args, thread, left, until))
        };
        let threads: Vec<_> = (0..args.threads).map(start).collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .collect()
    });
    ensure!(shares.len() as u64 == args.threads, "a thread panicked");
    let mut total = Storm {
        seconds: begun.elapsed().as_secs_f64(),
        ..Storm::default()
    };
    let mut micros = Vec::new();
    for share in shares {
        add(&mut total, share.report);
        micros.extend(share.micros);
    }
    micros.sort_unstable();
    total.p50_us = percentile(&micros, 0.5);
    total.p99_us = percentile(&micros, 0.99);
    say(&total)?;
    Ok(total.wrong == 0 && total.failed == 0)
}

fn add(total: &mut Storm, part: Storm) {
    total.ok += part.ok;
    total.wrong += part.wrong;
    total.failed += part.failed;
    total.bytes_sent += part.bytes_sent;
    total.bytes_received += part.bytes_received;
    total.wrong_answers.extend(part.wrong_answers);
    total.wrong_answers.truncate(EXAMPLES);
    for (error, count) in part.errors {
        *total.errors.entry(error).or_default() += count;
    }
    for (name, count) in part.names {
        *total.names.entry(name).or_default() += count;
    }
}

fn storm(args: &Args, thread: u64, left: &AtomicU64, until: Option<Instant>) -> Share {
    let mut random = Random(args.seed.wrapping_add(thread << 32));
    let mut share = Share::default();
    let take_one = |left: u64| left.checked_sub(1);
    while until.is_none_or(|until| Instant::now() < until)
        && !STOPPED.load(Ordering::Relaxed)
        && left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take_one)
            .is_ok()
    {
        let to = destination(args, &mut random);
        let begun = Instant::now();
        let answer = connection(args, to);
        share
            .micros
            .push(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
        let report = &mut share.report;
        match answer {
            Err(e) => {
                report.failed += 1;
                *report.errors.entry(format!("{e:#}")).or_default() += 1;
            }
            Ok((local, answer)) => {
                report.bytes_sent += 3;
                report.bytes_received += answer.to_string().len() as u64 + 1;
                *report.names.entry(answer.name.clone()).or_default() += 1;
                if answer.client == local && (args.any_server || answer.server == to) {
                    report.ok += 1;
                } else {
                    report.wrong += 1;
                    if report.wrong_answers.len() < EXAMPLES {
                        let example = format!("{local} to {to} got the answer {answer}");
                        report.wrong_answers.push(example);
                    }
                }
            }
        }
        if args.pause_us > 0 {
            std::thread::sleep(Duration::from_micros(args.pause_us));
        }
    }
    share
}

fn destination(args: &Args, random: &mut Random) -> SocketAddr {
    let kinds = args.to.len() + args.net.len();
    let index = random.below(u32::try_from(kinds).unwrap_or(u32::MAX)) as usize;
    match (args.to.get(index), args.ports) {
        (Some(to), None) => *to,
        (Some(to), Some(ports)) => SocketAddr::new(to.ip(), ports.pick(random)),
        (None, ports) => {
            let net = args.net[index - args.to.len()];
            let port = ports.map_or(0, |ports| ports.pick(random));
            SocketAddr::new(net.pick(random), port)
        }
    }
}

fn connection(args: &Args, to: SocketAddr) -> Result<(SocketAddr, Identity)> {
    let socket = args.socket.tcp(to, false)?;
    socket
        .connect(&SockAddr::from(args.socket.destination(to)))
        .context("connect")?;
    let mut stream = TcpStream::from(socket);
    let local = canonical(stream.local_addr().context("getsockname")?);
    let answer = ask_identity(&mut stream).context("identity")?;
    Ok((local, answer))
}
