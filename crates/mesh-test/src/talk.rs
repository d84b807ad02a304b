// SPDX-License-Identifier: Apache-2.0
//! What `probe`'s clients and servers say to each other: a command line from the client, then what
//! it asks for. Also for listeners that tests write themselves.
//!
//! | command | then |
//! |---|---|
//! | `ID` | the server says what it sees: its own address, the client's, its name; next command |
//! | `ECHO` | everything comes back until the client's end |
//! | `SINK` | the server reads to the client's end, then says how many bytes it was |
//! | `SOURCE N` | the server sends N bytes (0: without end) and closes |
//! | `RR N` | N bytes from the client, N bytes back, again and again |

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes per read or write of bulk transfers.
pub const CHUNK: usize = 128 << 10;
/// Longest command or answer line.
const LINE: usize = 256;

/// What a server sees of a connection or datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its own address (`getsockname`).
    pub server: SocketAddr,
    /// The client's address (`getpeername`).
    pub client: SocketAddr,
    /// Its name, as given when it was started.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.server, self.client, self.name)
    }
}

impl FromStr for Identity {
    type Err = io::Error;
    fn from_str(line: &str) -> io::Result<Self> {
        let mut words = line.split_ascii_whitespace();
        let mut address = || words.next()?.parse().ok();
        let (server, client) = (address(), address());
        match (server, client, words.next()) {
            (Some(server), Some(client), Some(name)) => Ok(Self {
                server,
                client,
                name: name.to_owned(),
            }),
            _ => Err(invalid(&format!("no identity: {line:?}"))),
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// An address without scope or flow label, and IPv4 where it is IPv4 in IPv6.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What a server sees of `stream`.
///
/// # Errors
/// The connection is gone.
pub fn identify(stream: &TcpStream, name: &str) -> io::Result<Identity> {
    let server = canonical(stream.local_addr()?);
    let client = canonical(stream.peer_addr()?);
    Ok(Identity {
        server,
        client,
        name: name.to_owned(),
    })
}

/// Serves one connection to its end.
///
/// # Errors
/// The connection broke, or the client does not speak this.
pub fn serve(stream: &TcpStream, name: &str) -> io::Result<()> {
    // A one-to-one SCTP socket has no such option, and no need of it.
    let _sctp = stream.set_nodelay(true);
    let mut input = BufReader::with_capacity(CHUNK, stream);
    loop {
        let mut line = String::new();
        (&mut input).take(LINE as u64).read_line(&mut line)?;
        let mut words = line.split_ascii_whitespace();
        let command = words.next();
        let number = words.next().and_then(|word| word.parse::<usize>().ok());
        match (command, number) {
            (None, _) => return Ok(()),
            (Some("ID"), _) => {
                let answer = format!("{}\n", identify(stream, name)?);
                (&*stream).write_all(answer.as_bytes())?;
            }
            (Some("ECHO"), _) => return echo(&mut input, stream),
            (Some("SINK"), _) => {
                let read = sink(&mut input)?;
                return (&*stream).write_all(format!("{read}\n").as_bytes());
            }
            (Some("SOURCE"), Some(bytes)) => return source(stream, bytes),
            (Some("RR"), Some(size)) => return reply(&mut input, stream, size),
            _ => return Err(invalid(&format!("no command: {line:?}"))),
        }
    }
}

/// Sends back everything up to the client's end.
///
/// # Errors
/// The connection broke.
pub fn echo(input: &mut impl Read, mut stream: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let got = input.read(&mut buffer)?;
        if got == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..got])?;
    }
}

fn sink(input: &mut impl Read) -> io::Result<u64> {
    let (mut buffer, mut total) = (vec![0; CHUNK], 0);
    loop {
        match input.read(&mut buffer)? {
            0 => return Ok(total),
            got => total += got as u64,
        }
    }
}

fn source(mut stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let buffer = vec![b'.'; CHUNK];
    let mut left = if bytes == 0 { usize::MAX } else { bytes };
    while left > 0 {
        left -= stream.write(&buffer[..left.min(CHUNK)])?;
    }
    Ok(())
}

fn reply(input: &mut impl Read, mut stream: &TcpStream, size: usize) -> io::Result<()> {
    let mut buffer = vec![0; size];
    loop {
        match input.read_exact(&mut buffer) {
            Ok(()) => stream.write_all(&buffer)?,
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// The client's side of `ID`.
///
/// # Errors
/// The connection broke, or the server does not speak this.
pub fn ask_identity(stream: &mut TcpStream) -> io::Result<Identity> {
    stream.write_all(b"ID\n")?;
    read_line(stream)?.parse()
}

/// One line, byte by byte up to its end; servers send nothing after it unasked.
///
/// # Errors
/// The connection broke or ended before the line did.
pub fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let (mut buffer, mut have) = ([0; LINE], 0);
    while !buffer[..have].ends_with(b"\n") {
        match stream.read(&mut buffer[have..])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            got => have += got,
        }
    }
    Ok(String::from_utf8_lossy(&buffer[..have]).trim().to_owned())
}
