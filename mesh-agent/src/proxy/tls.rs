// SPDX-License-Identifier: Apache-2.0
//! TLS below the tunnel: the handshake by rustls, the records by [`records`].
//!
//! rustls decides who is believed, agrees on keys and keeps sessions; once the handshake is over
//! it hands out the keys, answers key updates and takes tickets, and never sees a byte of data.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ConnectionTrafficSecrets, ExtractedSecrets, ServerConfig};

use self::records::{Opener, RecordError, Sealer};
use super::socket::Socket;
use super::turns::Computing;
use mesh_identity::Refusal;

pub(crate) mod records;

/// The longest flight that a peer may send before it has proven anything.
const MAX_FLIGHT: usize = 64 * 1024;

/// Why there is no secured connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The connection failed or ended.
    #[error("the connection ended during the TLS handshake")]
    Io(#[from] std::io::Error),
    /// rustls refused the peer, or the peer us.
    #[error("the TLS handshake failed")]
    Tls(#[from] rustls::Error),
    /// A flight longer than any certificate chain needs.
    #[error("the peer's handshake is too long")]
    TooLong,
    /// The keys cannot be used.
    #[error("the agreed keys cannot be used")]
    Keys(#[from] RecordError),
    /// rustls is in a state that our configurations exclude.
    #[error("the TLS handshake took an unexpected turn")]
    Unexpected,
}

impl HandshakeError {
    /// The same, as metrics and records say it.
    pub(crate) fn refusal(&self) -> Refusal {
        match self {
            Self::Io(error) => Refusal::of_io(error),
            Self::Tls(error) => Refusal::of_tls(error),
            Self::TooLong => Refusal::Misbehaved,
            Self::Keys(_) | Self::Unexpected => Refusal::Failed,
        }
    }
}

/// A connection after its handshake.
pub(crate) struct Secured {
    /// Seals what we send.
    pub(crate) sealer: Sealer,
    /// Opens what the peer sends.
    pub(crate) opener: Opener,
    /// What is left of rustls.
    pub(crate) rest: Rest,
    /// The end of our last flight: to be sent before, and best together with, the first record.
    pub(crate) unsent: Vec<u8>,
    /// Data that the peer sent together with the end of its handshake, already opened.
    pub(crate) early: Vec<u8>,
    /// Records that came with it and are not opened yet.
    pub(crate) unread: Vec<u8>,
}

/// What rustls does after the handshake.
pub(crate) enum Rest {
    /// For who dialled.
    Client(KernelConnection<ClientConnectionData>),
    /// For who was dialled.
    Server(KernelConnection<ServerConnectionData>),
}

impl Rest {
    /// The peer's next key.
    pub(crate) fn next_opener(&mut self) -> Result<Opener, HandshakeError> {
        let (sequence, secrets) = match self {
            Self::Client(rest) => rest.update_rx_secret()?,
            Self::Server(rest) => rest.update_rx_secret()?,
        };
        Ok(Opener::new(sequence, &secrets)?)
    }

    /// Our next key.
    pub(crate) fn next_sealer(&mut self) -> Result<Sealer, HandshakeError> {
        let (sequence, secrets) = match self {
            Self::Client(rest) => rest.update_tx_secret()?,
            Self::Server(rest) => rest.update_tx_secret()?,
        };
        Ok(Sealer::new(sequence, &secrets)?)
    }

    /// Keeps a session ticket.
    pub(crate) fn ticket(&mut self, body: &[u8]) -> Result<(), HandshakeError> {
        match self {
            Self::Client(rest) => Ok(rest.handle_new_session_ticket(body)?),
            // Only servers send tickets (RFC 8446, 4.6.1).
            Self::Server(_) => Err(HandshakeError::Unexpected),
        }
    }
}

/// Dials: proves our identity and has the peer prove the one that `config` expects. `verify` asks
/// for the proof once the handshake is over.
pub(crate) async fn connect<T, E: From<HandshakeError>>(
    (socket, computing): (&Socket, Computing<'_>),
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    verify: impl FnOnce(&CommonState) -> Result<T, E>,
) -> Result<(Secured, T), E> {
    let connection = UnbufferedClientConnection::new(config, name).map_err(HandshakeError::from)?;
    let mut connection = Box::new(connection);
    let flight = drive(&mut *connection, socket, computing).await?;
    let peer = verify(&connection)?;
    let (secrets, rest) = connection
        .dangerous_into_kernel_connection()
        .map_err(HandshakeError::from)?;
    Ok((flight.secured(secrets, Rest::Client(rest))?, peer))
}

/// Answers a dialler, who has to prove an identity.
pub(crate) async fn accept<T, E: From<HandshakeError>>(
    (socket, computing): (&Socket, Computing<'_>),
    config: Arc<ServerConfig>,
    verify: impl FnOnce(&CommonState) -> Result<T, E>,
) -> Result<(Secured, T), E> {
    let connection = UnbufferedServerConnection::new(config).map_err(HandshakeError::from)?;
    let mut connection = Box::new(connection);
    let flight = drive(&mut *connection, socket, computing).await?;
    let peer = verify(&connection)?;
    let (secrets, rest) = connection
        .dangerous_into_kernel_connection()
        .map_err(HandshakeError::from)?;
    Ok((flight.secured(secrets, Rest::Server(rest))?, peer))
}

/// Either end's connection, as [`drive`] needs it.
trait Side {
    type Data;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn handshaking(&self) -> bool;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }

    fn handshaking(&self) -> bool {
        self.is_handshaking()
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }

    fn handshaking(&self) -> bool {
        self.is_handshaking()
    }
}

/// The bytes around a handshake.
struct Flight {
    input: Vec<u8>,
    filled: usize,
    output: Vec<u8>,
    early: Vec<u8>,
}

/// What [`drive`] has to do next.
enum Turn {
    Again,
    Send,
    Receive,
    Done,
}

/// Runs a handshake to its end. Data that came with the peer's last flight is kept, and our own
/// last flight is left to be sent with the first data.
async fn drive<S: Side>(
    side: &mut S,
    socket: &Socket,
    computing: Computing<'_>,
) -> Result<Flight, HandshakeError> {
    let mut flight = Flight {
        input: vec![0; 4096],
        filled: 0,
        output: Vec::new(),
        early: Vec::new(),
    };
    // What has come is where the work is; what is sent was made in the same turn.
    let mut turn = computing.turn().await;
    loop {
        match flight.turn(side) {
            Ok(Turn::Again) => {}
            Ok(Turn::Send) if side.handshaking() => {
                drop(turn.take());
                flight.send(socket).await?;
            }
            Ok(Turn::Send | Turn::Done) => return Ok(flight),
            Ok(Turn::Receive) => {
                drop(turn.take());
                flight.receive(socket).await?;
                turn = computing.turn().await;
            }
            Err(error) => {
                // The alert that tells the peer, if there is one: exactly one turn, because another
                // would look at the peer's bytes again, which rustls does not expect.
                let alert = flight.turn(side).is_ok();
                drop(turn.take());
                if alert && let Err(error) = flight.send(socket).await {
                    tracing::debug!(%error, "cannot tell the peer why the handshake failed");
                }
                return Err(error);
            }
        }
    }
}

impl Flight {
    fn turn<S: Side>(&mut self, side: &mut S) -> Result<Turn, HandshakeError> {
        let UnbufferedStatus { discard, state } = side.process(&mut self.input[..self.filled]);
        let turn = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                let at = self.output.len();
                let mut room = 0;
                loop {
                    self.output.resize(at + room, 0);
                    match data.encode(&mut self.output[at..]) {
                        Ok(written) => {
                            self.output.truncate(at + written);
                            break Ok(Turn::Again);
                        }
                        Err(EncodeError::InsufficientSize(size)) if size.required_size > room => {
                            room = size.required_size;
                        }
                        Err(_) => break Err(HandshakeError::Unexpected),
                    }
                }
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Ok(Turn::Send)
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Turn::Receive),
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Turn::Done),
            Ok(ConnectionState::ReadTraffic(mut data)) => {
                while let Some(record) = data.next_record() {
                    self.early.extend_from_slice(record?.payload);
                }
                Ok(Turn::Again)
            }
            Ok(_) => Err(HandshakeError::Unexpected),
            Err(error) => Err(error.into()),
        };
        self.input.copy_within(discard..self.filled, 0);
        self.filled -= discard;
        turn
    }

    async fn receive(&mut self, socket: &Socket) -> Result<(), HandshakeError> {
        if self.filled == self.input.len() {
            if self.filled >= MAX_FLIGHT {
                return Err(HandshakeError::TooLong);
            }
            self.input.resize(2 * self.filled, 0);
        }
        let free = &mut self.input[self.filled..];
        let room = free.len();
        let mut free = [std::io::IoSliceMut::new(free)];
        let read = std::future::poll_fn(|cx| socket.poll_read(cx, &mut free, room)).await?;
        if read == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        self.filled += read;
        Ok(())
    }

    async fn send(&mut self, socket: &Socket) -> Result<(), HandshakeError> {
        let mut rest = &self.output[..];
        while !rest.is_empty() {
            let slice = [std::io::IoSlice::new(rest)];
            let length = rest.len();
            let sent = std::future::poll_fn(|cx| socket.poll_write(cx, &slice, length)).await?;
            rest = &rest[sent..];
        }
        self.output.clear();
        Ok(())
    }

    fn secured(self, secrets: ExtractedSecrets, rest: Rest) -> Result<Secured, HandshakeError> {
        let Self {
            mut input,
            filled,
            output,
            early,
        } = self;
        input.truncate(filled);
        let (sequence, secret): (u64, ConnectionTrafficSecrets) = secrets.tx;
        let sealer = Sealer::new(sequence, &secret)?;
        let (sequence, secret) = secrets.rx;
        Ok(Secured {
            sealer,
            opener: Opener::new(sequence, &secret)?,
            rest,
            unsent: output,
            early,
            unread: input,
        })
    }
}

#[cfg(test)]
mod tests;
