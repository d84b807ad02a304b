// SPDX-License-Identifier: Apache-2.0
//! `probe serve`: servers for the clients of this program, until killed.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

use anyhow::{Context, Result, ensure};
use mesh_sys::testbed;
use mesh_test::reports::Served;
use mesh_test::talk::{self, Identity, canonical};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::args::Ports;
use crate::say;

/// Listen backlog.
const BACKLOG: i32 = 4096;
/// Maximum number of idle threads per listener.
const IDLE: usize = 16;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// TCP address, may be repeated; `[::]` takes IPv4 too
    #[arg(long)]
    tcp: Vec<SocketAddr>,
    /// Listen on all these ports of each TCP address instead of its own
    #[arg(long)]
    ports: Option<Ports>,
    /// UDP address, may be repeated
    #[arg(long)]
    udp: Vec<SocketAddr>,
    /// SCTP address (one-to-one sockets), may be repeated
    #[arg(long)]
    sctp: Vec<SocketAddr>,
    /// Name in the identity that clients receive
    #[arg(long, default_value = "server")]
    name: String,
    /// Send the identity first, then return everything received
    #[arg(long)]
    greet: bool,
    /// Each UDP socket answers only its first client, by a connected socket
    #[arg(long)]
    udp_connected: bool,
    /// Set SO_REUSEPORT
    #[arg(long)]
    reuseport: bool,
    /// Print each connection and datagram
    #[arg(long)]
    report: bool,
    /// Bind all threads to this CPU
    #[arg(long)]
    cpu: Option<usize>,
}

#[derive(Clone)]
struct Server {
    name: String,
    greet: bool,
    udp_connected: bool,
    report: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    // Call this before threads start, because they inherit the affinity.
    args.cpu.map_or(Ok(()), testbed::pin_to_cpu)?;
    let server = Arc::new(Server {
        name: args.name.clone(),
        greet: args.greet,
        udp_connected: args.udp_connected,
        report: args.report,
    });
    let mut listening = Vec::new();
    let sctp = Protocol::from(libc::IPPROTO_SCTP);
    let tcp = args.tcp.iter().map(|address| (address, Protocol::TCP));
    // A one-to-one SCTP socket has the same API as a TCP socket.
    for (address, protocol) in tcp.chain(args.sctp.iter().map(|address| (address, sctp))) {
        let ports = args
            .ports
            .map_or(address.port()..=address.port(), |p| p.first..=p.last);
        for port in ports {
            let address = SocketAddr::new(address.ip(), port);
            let socket = bound(address, Type::STREAM, protocol, args.reuseport)?;
            socket.listen(BACKLOG)?;
            let listener = TcpListener::from(socket);
            listening.push(canonical(listener.local_addr()?));
            let idle = Arc::new(AtomicUsize::new(1));
            let listener = Arc::new(Listener {
                listener,
                idle,
                server: Arc::clone(&server),
            });
            listener.start()?;
        }
    }
    for address in &args.udp {
        let socket = UdpSocket::from(bound(*address, Type::DGRAM, Protocol::UDP, args.reuseport)?);
        listening.push(canonical(socket.local_addr()?));
        let server = Arc::clone(&server);
        Builder::new().spawn(move || datagrams(&socket, &server))?;
    }
    ensure!(
        !listening.is_empty(),
        "one of --tcp, --udp and --sctp is required"
    );
    say(&Served::Listening(listening))?;
    loop {
        std::thread::park();
    }
}

fn bound(address: SocketAddr, kind: Type, protocol: Protocol, reuseport: bool) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_reuse_address(kind == Type::STREAM)?;
    socket.set_reuse_port(reuseport)?;
    socket
        .bind(&SockAddr::from(address))
        .with_context(|| format!("bind {address}"))?;
    Ok(socket)
}

/// A listener whose threads both accept and serve, which avoids a second wake-up per connection;
/// the last idle thread starts another before it serves.
struct Listener {
    listener: TcpListener,
    idle: Arc<AtomicUsize>,
    server: Arc<Server>,
}

impl Listener {
    fn start(self: &Arc<Self>) -> io::Result<()> {
        let this = Arc::clone(self);
        Builder::new()
            .stack_size(256 << 10)
            .spawn(move || this.run())
            .map(drop)
    }

    fn run(self: &Arc<Self>) {
        loop {
            let Ok((stream, _)) = self.listener.accept() else {
                continue;
            };
            if self.idle.fetch_sub(1, Ordering::Relaxed) == 1 {
                self.idle.fetch_add(1, Ordering::Relaxed);
                // If no thread starts, the next connection waits for this one.
                drop(self.start());
            }
            // The client reports how a connection ended.
            drop(self.server.connection(&stream));
            drop(stream);
            if self.idle.fetch_add(1, Ordering::Relaxed) >= IDLE {
                self.idle.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

impl Server {
    fn connection(&self, stream: &TcpStream) -> Result<()> {
        if self.report {
            say(&Served::Connection(talk::identify(stream, &self.name)?))?;
        }
        if self.greet {
            use std::io::Write;
            let greeting = format!("{}\n", talk::identify(stream, &self.name)?);
            let mut stream = stream;
            stream.write_all(greeting.as_bytes())?;
            return Ok(talk::echo(&mut { stream }, stream)?);
        }
        Ok(talk::serve(stream, &self.name)?)
    }
}

/// Answers datagrams. A failed receive or send (e.g. a late ICMP error) affects only one datagram.
fn datagrams(socket: &UdpSocket, server: &Server) {
    let mut buffer = vec![0; 64 << 10];
    let mut connected = false;
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        if server.udp_connected && !connected {
            connected = socket.connect(from).is_ok();
        }
        drop(datagram(socket, server, from, &buffer[..length]));
    }
}

fn datagram(socket: &UdpSocket, server: &Server, from: SocketAddr, data: &[u8]) -> Result<()> {
    let (local, client) = (canonical(socket.local_addr()?), canonical(from));
    let identity = Identity {
        server: local,
        client,
        name: server.name.clone(),
    };
    if server.report {
        say(&Served::Datagram(identity.clone()))?;
    }
    let mut answer = format!("{identity} ").into_bytes();
    answer.extend_from_slice(data);
    if server.udp_connected {
        socket.send(&answer)
    } else {
        socket.send_to(&answer, from)
    }?;
    Ok(())
}
