// SPDX-License-Identifier: Apache-2.0
//! The protocol of `probe`'s clients and servers, also for servers in tests: the client sends a
//! command line, and the server acts on it.
//!
//! | Command | Server's action |
//! |---|---|
//! | `ID` | sends its own address, the client's address and its name; waits for the next command |
//! | `ECHO` | sends back everything until the client's end of file |
//! | `SINK` | reads until the client's end of file, then sends the number of bytes |
//! | `SOURCE N` | sends N bytes (0: without end) and closes |
//! | `RR N` | reads N bytes and sends N bytes, repeatedly |

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes per read or write of bulk transfers.
pub const CHUNK: usize = 128 << 10;
/// Maximum length of a command or answer line in bytes.
const LINE: usize = 256;

/// A connection or datagram as seen by the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The server's own address (`getsockname`).
    pub server: SocketAddr,
    /// The client's address (`getpeername`).
    pub client: SocketAddr,
    /// The server's name, as given when it was started.
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

/// Removes scope and flow label from an address, and converts an IPv4-mapped address to IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Returns the server's view of `stream`.
///
/// # Errors
/// The connection is closed.
pub fn identify(stream: &TcpStream, name: &str) -> io::Result<Identity> {
    let server = canonical(stream.local_addr()?);
    let client = canonical(stream.peer_addr()?);
    Ok(Identity {
        server,
        client,
        name: name.to_owned(),
    })
}

/// Serves one connection until it ends.
///
/// # Errors
/// The connection failed, or the client sent an invalid command.
pub fn serve(stream: &TcpStream, name: &str) -> io::Result<()> {
    // A one-to-one SCTP socket has no TCP_NODELAY and does not need it.
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

/// Sends back everything until the client's end of file.
///
/// # Errors
/// The connection failed.
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

/// Sends `ID` and returns the server's answer.
///
/// # Errors
/// The connection failed, or the answer is invalid.
pub fn ask_identity(stream: &mut TcpStream) -> io::Result<Identity> {
    stream.write_all(b"ID\n")?;
    read_line(stream)?.parse()
}

/// Reads one line byte by byte, so that nothing after its end is consumed.
///
/// # Errors
/// The connection failed or ended before the end of the line.
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
