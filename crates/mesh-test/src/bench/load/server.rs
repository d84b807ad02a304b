// SPDX-License-Identifier: Apache-2.0
//! The load server: one thread per long-lived connection, two per port of short-lived ones.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::Builder;

use anyhow::{Context, Result};
use serde_json::json;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{BULK_PORT, CHUNK, CLOSED_PORT, CRR_PORTS, MESSAGE, RR_PORT, say};

/// Listen backlog.
const BACKLOG: i32 = 1024;
/// Threads per port of short-lived connections: one waits for the client's close while the other
/// serves the next connection.
const THREADS: usize = 2;
const STACK: usize = 128 << 10;

pub(super) fn run() -> Result<()> {
    long(BULK_PORT, bulk)?;
    long(RR_PORT, rr)?;
    for port in CRR_PORTS.chain([CLOSED_PORT]) {
        let listener = Arc::new(listen(port)?);
        for _ in 0..THREADS {
            let listener = Arc::clone(&listener);
            let _thread = Builder::new().stack_size(STACK).spawn(move || {
                loop {
                    // The client reports how a connection ended.
                    drop(listener.accept().and_then(|(stream, _)| crr(&stream)));
                }
            })?;
        }
    }
    say(&json!("listening"))?;
    loop {
        std::thread::park();
    }
}

fn listen(port: u16) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    socket
        .bind(&SockAddr::from(address))
        .with_context(|| format!("bind {address}"))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn long(port: u16, serve: fn(&TcpStream) -> io::Result<()>) -> Result<()> {
    let listener = listen(port)?;
    let _acceptor = Builder::new().spawn(move || {
        for stream in listener.incoming().flatten() {
            // If no thread starts, the connection closes at once and the client reports it.
            let started = Builder::new()
                .stack_size(STACK)
                .spawn(move || drop(serve(&stream)));
            drop(started);
        }
    })?;
    Ok(())
}

/// Sends one byte once connected, and the number of bytes received when the client has finished.
fn bulk(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(b"!")?;
    let (mut buffer, mut total) = (vec![0; CHUNK], 0_u64);
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&total.to_be_bytes()),
            got => total += got as u64,
        }
    }
}

fn rr(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}

fn crr(mut stream: &TcpStream) -> io::Result<()> {
    let mut message = [0; MESSAGE];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    stream.read(&mut message).map(drop)
}
