// SPDX-License-Identifier: Apache-2.0
//! TLS below the tunnel: the handshake by rustls, records by [`records`](crate::records).
//!
//! rustls verifies the peer, agrees on keys and keeps sessions. After the handshake it hands out the
//! keys, answers key updates and takes tickets; it never sees a byte of data.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ConnectionTrafficSecrets, ExtractedSecrets, ServerConfig};

use crate::records::{RecordError, RecordOpener, RecordSealer};
use crate::socket::Socket;

/// The longest flight that a peer may send before it has proven its identity.
const MAX_FLIGHT: usize = 64 * 1024;

/// Why a TLS handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed or was closed.
    #[error("the connection ended during the TLS handshake")]
    Io(#[from] std::io::Error),
    /// rustls refused the peer, or the peer refused us.
    #[error("the TLS handshake failed")]
    Tls(#[from] rustls::Error),
    /// The peer's flight is longer than any certificate chain needs.
    #[error("the peer's handshake messages are too long")]
    TooLong,
    /// The keys cannot be used.
    #[error("the agreed keys cannot be used")]
    Keys(#[from] RecordError),
    /// rustls is in a state that our configurations exclude.
    #[error("unexpected state of the TLS handshake")]
    Unexpected,
}

/// A connection whose handshake has succeeded.
pub struct SecureConnection {
    /// Seals what we send.
    pub sealer: RecordSealer,
    /// Opens what the peer sends.
    pub opener: RecordOpener,
    /// Key updates and tickets.
    pub keys: PostHandshake,
    /// The end of our last flight. Send it before, and best together with, the first record.
    pub unsent: Vec<u8>,
    /// Data that the peer sent together with the end of its handshake, already decrypted.
    pub early: Vec<u8>,
    /// Records that arrived with it and are not decrypted yet.
    pub unread: Vec<u8>,
}

/// The part of rustls that is in use after the handshake.
pub enum PostHandshake {
    /// The client side.
    Client(KernelConnection<ClientConnectionData>),
    /// The server side.
    Server(KernelConnection<ServerConnectionData>),
}

impl PostHandshake {
    /// Switches to the peer's next key.
    ///
    /// # Errors
    /// The key cannot be derived or used.
    pub fn next_opener(&mut self) -> Result<RecordOpener, HandshakeError> {
        let (sequence, secrets) = match self {
            Self::Client(rest) => rest.update_rx_secret()?,
            Self::Server(rest) => rest.update_rx_secret()?,
        };
        Ok(RecordOpener::new(sequence, &secrets)?)
    }

    /// Switches to our next key.
    ///
    /// # Errors
    /// The key cannot be derived or used.
    pub fn next_sealer(&mut self) -> Result<RecordSealer, HandshakeError> {
        let (sequence, secrets) = match self {
            Self::Client(rest) => rest.update_tx_secret()?,
            Self::Server(rest) => rest.update_tx_secret()?,
        };
        Ok(RecordSealer::new(sequence, &secrets)?)
    }

    /// Stores a session ticket.
    ///
    /// # Errors
    /// The ticket is malformed, or came from a client.
    pub fn ticket(&mut self, body: &[u8]) -> Result<(), HandshakeError> {
        match self {
            Self::Client(rest) => Ok(rest.handle_new_session_ticket(body)?),
            // Only servers send tickets (RFC 8446, 4.6.1).
            Self::Server(_) => Err(HandshakeError::Unexpected),
        }
    }
}

/// Grants CPU time to handshakes, which are expensive.
pub trait CpuScheduler {
    /// The right to compute one step; dropped when the step is done.
    type Permit;

    /// Waits for a permit.
    fn permit(&self) -> impl Future<Output = Self::Permit>;
}

/// Grants every permit at once.
#[derive(Clone, Copy, Debug)]
pub struct Unscheduled;

impl CpuScheduler for Unscheduled {
    type Permit = ();

    async fn permit(&self) {}
}

/// Runs the client side of a handshake: proves our identity, and has the peer prove the identity that
/// `config` expects. `verify` takes the proof once the handshake is over.
///
/// # Errors
/// The handshake failed, or `verify` did.
pub async fn connect<T, E: From<HandshakeError>>(
    socket: &Socket,
    cpu: &impl CpuScheduler,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    verify: impl FnOnce(&CommonState) -> Result<T, E>,
) -> Result<(SecureConnection, T), E> {
    let connection = UnbufferedClientConnection::new(config, name).map_err(HandshakeError::from)?;
    let mut connection = Box::new(connection);
    let flight = drive(&mut *connection, socket, cpu).await?;
    let peer = verify(&connection)?;
    let (secrets, rest) = connection
        .dangerous_into_kernel_connection()
        .map_err(HandshakeError::from)?;
    Ok((flight.secured(secrets, PostHandshake::Client(rest))?, peer))
}

/// Runs the server side of a handshake: the peer has to prove an identity.
///
/// # Errors
/// The handshake failed, or `verify` did.
pub async fn accept<T, E: From<HandshakeError>>(
    socket: &Socket,
    cpu: &impl CpuScheduler,
    config: Arc<ServerConfig>,
    verify: impl FnOnce(&CommonState) -> Result<T, E>,
) -> Result<(SecureConnection, T), E> {
    let connection = UnbufferedServerConnection::new(config).map_err(HandshakeError::from)?;
    let mut connection = Box::new(connection);
    let flight = drive(&mut *connection, socket, cpu).await?;
    let peer = verify(&connection)?;
    let (secrets, rest) = connection
        .dangerous_into_kernel_connection()
        .map_err(HandshakeError::from)?;
    Ok((flight.secured(secrets, PostHandshake::Server(rest))?, peer))
}

/// Either side's connection, as [`drive`] needs it.
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

/// The next step of a handshake.
enum Step {
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
    cpu: &impl CpuScheduler,
) -> Result<Flight, HandshakeError> {
    let mut flight = Flight {
        input: vec![0; 4096],
        filled: 0,
        output: Vec::new(),
        early: Vec::new(),
    };
    // Work begins with what was received; what is sent was computed in the same step.
    let mut permit = Some(cpu.permit().await);
    loop {
        match flight.step(side) {
            Ok(Step::Again) => {}
            Ok(Step::Send) if side.handshaking() => {
                drop(permit.take());
                flight.send(socket).await?;
            }
            Ok(Step::Send | Step::Done) => return Ok(flight),
            Ok(Step::Receive) => {
                drop(permit.take());
                flight.receive(socket).await?;
                permit = Some(cpu.permit().await);
            }
            Err(error) => {
                // Makes the alert for the peer, if there is one: exactly one step, because another
                // would look at the peer's bytes again, which rustls does not expect.
                let alert = flight.step(side).is_ok();
                drop(permit.take());
                if alert && let Err(error) = flight.send(socket).await {
                    tracing::debug!(%error, "failed to send the TLS alert");
                }
                return Err(error);
            }
        }
    }
}

impl Flight {
    fn step<S: Side>(&mut self, side: &mut S) -> Result<Step, HandshakeError> {
        let UnbufferedStatus { discard, state } = side.process(&mut self.input[..self.filled]);
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                let at = self.output.len();
                let mut room = 0;
                loop {
                    self.output.resize(at + room, 0);
                    match data.encode(&mut self.output[at..]) {
                        Ok(written) => {
                            self.output.truncate(at + written);
                            break Ok(Step::Again);
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
                Ok(Step::Send)
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Step::Receive),
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
            Ok(ConnectionState::ReadTraffic(mut data)) => {
                while let Some(record) = data.next_record() {
                    self.early.extend_from_slice(record?.payload);
                }
                Ok(Step::Again)
            }
            Ok(_) => Err(HandshakeError::Unexpected),
            Err(error) => Err(error.into()),
        };
        self.input.copy_within(discard..self.filled, 0);
        self.filled -= discard;
        step
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

    fn secured(
        self,
        secrets: ExtractedSecrets,
        keys: PostHandshake,
    ) -> Result<SecureConnection, HandshakeError> {
        let Self {
            mut input,
            filled,
            output,
            early,
        } = self;
        input.truncate(filled);
        let (sequence, secret): (u64, ConnectionTrafficSecrets) = secrets.tx;
        let sealer = RecordSealer::new(sequence, &secret)?;
        let (sequence, secret) = secrets.rx;
        Ok(SecureConnection {
            sealer,
            opener: RecordOpener::new(sequence, &secret)?,
            keys,
            unsent: output,
            early,
            unread: input,
        })
    }
}

#[cfg(test)]
mod tests;
