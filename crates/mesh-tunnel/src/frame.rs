// SPDX-License-Identifier: Apache-2.0
//! The frames of `mesh/1` as `docs/tunnel.md` specifies them: a pure codec over decrypted bytes.
//!
//! The decoder never allocates more than one control frame, and never holds application data. It knows
//! nothing of connections: the tunnel and the relay decide which frame may arrive when.

use mesh_common::policy::RuleId;
use mesh_common::{Addr, Endpoint, Port, Reason};

/// Bytes before every frame's payload: type, length, stream number.
pub const HEADER: usize = 8;

/// The longest payload of a DATA frame: one read of the application's socket.
pub const MAX_DATA: usize = 256 * 1024;

/// The longest payload of any other frame.
pub const MAX_CONTROL: usize = 1024;

/// The version that OPEN carries. A higher version only adds fields behind those known here.
pub const VERSION: u8 = 1;

/// Receivers skip unknown frame types from this one on.
const OPTIONAL: u8 = 0x80;

const OPEN: u8 = 1;
const OPENED: u8 = 2;
const REFUSED: u8 = 3;
const DATA: u8 = 4;
const FIN: u8 = 5;
const FIN_ACK: u8 = 6;
const RESET: u8 = 7;

const OPEN_BYTES: usize = 38;
const ENDPOINT_BYTES: usize = 18;
const CLOSE_REASON_BYTES: usize = 12;
const HAS_SERVICE: u8 = 1;

/// The number of an application connection within its tunnel; the first is 1.
pub type StreamId = u32;

/// A request for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The destination of the application's connection, after service resolution.
    pub destination: Endpoint,
    /// The application's own address and port.
    pub source: Endpoint,
    /// The virtual endpoint that the application connected to, if it is another one.
    pub service: Option<Endpoint>,
}

/// Details of a refusal: why the acceptor could not connect to its application, or how the opener must
/// refuse the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cause {
    /// Not known, or not a failure to connect.
    #[default]
    None,
    /// The application's port refused (ECONNREFUSED, ECONNRESET).
    Refused,
    /// The application did not answer (ETIMEDOUT).
    TimedOut,
    /// The application was unreachable (EHOSTUNREACH, ENETUNREACH).
    Unreachable,
    /// The client's address and port were still in use (EADDRINUSE, EADDRNOTAVAIL).
    AddressInUse,
    /// Policy refused, and the client must see silence.
    Silent,
}

impl Cause {
    /// The cause as records name it. `None` if it is not known.
    #[must_use]
    pub const fn label(self) -> Option<&'static str> {
        match self {
            Self::None | Self::Silent => None,
            Self::Refused => Some("refused"),
            Self::TimedOut => Some("timed_out"),
            Self::Unreachable => Some("unreachable"),
            Self::AddressInUse => Some("address_in_use"),
        }
    }

    const fn code(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Refused => 1,
            Self::TimedOut => 2,
            Self::Unreachable => 3,
            Self::AddressInUse => 4,
            Self::Silent => 5,
        }
    }

    const fn from_code(code: u16) -> Self {
        match code {
            1 => Self::Refused,
            2 => Self::TimedOut,
            3 => Self::Unreachable,
            4 => Self::AddressInUse,
            5 => Self::Silent,
            _ => Self::None,
        }
    }
}

/// Why a stream was refused or reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CloseReason {
    /// The mesh's reason. `None` if the application itself reset its connection.
    pub reason: Option<Reason>,
    /// Details.
    pub cause: Cause,
    /// The rule that decided, or [`RuleId::NONE`].
    pub rule: RuleId,
}

impl CloseReason {
    /// The application reset its connection.
    pub const APPLICATION: Self = Self {
        reason: None,
        cause: Cause::None,
        rule: RuleId::NONE,
    };

    /// Makes a reason that comes from no rule.
    #[must_use]
    pub const fn new(reason: Reason) -> Self {
        Self {
            reason: Some(reason),
            cause: Cause::None,
            rule: RuleId::NONE,
        }
    }
}

/// A frame without application data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Requests a connection.
    Open(Open),
    /// The application has accepted the connection.
    Opened,
    /// The connection was not made.
    Refused(CloseReason),
    /// No more data follows in this direction.
    Fin,
    /// All data before FIN, and FIN itself, were passed on.
    FinAck,
    /// The stream ended; data under way is lost.
    Reset(CloseReason),
}

/// A protocol violation of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame type is unknown and not optional.
    #[error("unknown frame type {0:#04x}")]
    UnknownType(u8),
    /// A length that the type does not allow.
    #[error("invalid length {length} of a frame of type {kind:#04x}")]
    Length {
        /// The type.
        kind: u8,
        /// The length it claims.
        length: usize,
    },
    /// The stream number 0.
    #[error("invalid stream number 0")]
    StreamZero,
    /// An OPEN of version 0.
    #[error("invalid version 0 of OPEN")]
    VersionZero,
}

/// One event of the byte stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Application data: this many bytes that end where [`Step::used`] ends.
    Data(StreamId, usize),
    /// A whole control frame.
    Control(StreamId, Control),
}

/// The result of [`Decoder::step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the input that were consumed.
    pub used: usize,
    /// The event that they completed. `None` if the input is used up.
    pub event: Option<Event>,
}

/// Splits the byte stream into frames; its input may be cut anywhere.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    held: [u8; HEADER],
    held_len: usize,
    body: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Data {
        stream: StreamId,
        left: usize,
    },
    Body {
        kind: u8,
        stream: StreamId,
        length: usize,
    },
    Skip {
        left: usize,
    },
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            state: State::Header,
            held: [0; HEADER],
            held_len: 0,
            body: Vec::new(),
        }
    }
}

impl Decoder {
    /// Whether the last input ended between two frames.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header) && self.held_len == 0
    }

    /// Takes the next event out of `input`.
    ///
    /// # Errors
    /// The peer violated the protocol. The decoder cannot be used afterwards.
    pub fn step(&mut self, input: &[u8]) -> Result<Step, FrameError> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match self.state {
                State::Header => match self.header(rest) {
                    (taken, None) => {
                        used += taken;
                        return Ok(Step { used, event: None });
                    }
                    (taken, Some(header)) => {
                        used += taken;
                        if let Some(event) = self.begin(header)? {
                            return Ok(Step {
                                used,
                                event: Some(event),
                            });
                        }
                    }
                },
                State::Data { stream, left } => {
                    let taken = left.min(rest.len());
                    if taken == 0 {
                        return Ok(Step { used, event: None });
                    }
                    self.state = if taken == left {
                        State::Header
                    } else {
                        State::Data {
                            stream,
                            left: left - taken,
                        }
                    };
                    return Ok(Step {
                        used: used + taken,
                        event: Some(Event::Data(stream, taken)),
                    });
                }
                State::Body {
                    kind,
                    stream,
                    length,
                } => {
                    let taken = (length - self.body.len()).min(rest.len());
                    self.body.extend_from_slice(&rest[..taken]);
                    used += taken;
                    if self.body.len() < length {
                        return Ok(Step { used, event: None });
                    }
                    self.state = State::Header;
                    let control = parse(kind, &self.body)?;
                    self.body = Vec::new();
                    return Ok(Step {
                        used,
                        event: Some(Event::Control(stream, control)),
                    });
                }
                State::Skip { left } => {
                    let taken = left.min(rest.len());
                    used += taken;
                    if taken < left {
                        self.state = State::Skip { left: left - taken };
                        return Ok(Step { used, event: None });
                    }
                    self.state = State::Header;
                }
            }
        }
    }

    /// Takes a header, whole or piece by piece.
    fn header(&mut self, input: &[u8]) -> (usize, Option<[u8; HEADER]>) {
        if self.held_len == 0
            && let Some(whole) = input.first_chunk()
        {
            return (HEADER, Some(*whole));
        }
        let taken = (HEADER - self.held_len).min(input.len());
        self.held[self.held_len..self.held_len + taken].copy_from_slice(&input[..taken]);
        self.held_len += taken;
        if self.held_len < HEADER {
            return (taken, None);
        }
        self.held_len = 0;
        (taken, Some(self.held))
    }

    /// Checks a header before anything is allocated for it.
    fn begin(&mut self, header: [u8; HEADER]) -> Result<Option<Event>, FrameError> {
        let [kind, a, b, c, s @ ..] = header;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let stream = u32::from_be_bytes(s);
        let wrong = Err(FrameError::Length { kind, length });
        if kind >= OPTIONAL {
            if length > MAX_CONTROL {
                return wrong;
            }
            self.state = State::Skip { left: length };
            return Ok(None);
        }
        let range = match kind {
            OPEN => OPEN_BYTES..=MAX_CONTROL,
            REFUSED | RESET => CLOSE_REASON_BYTES..=MAX_CONTROL,
            OPENED | FIN | FIN_ACK => 0..=MAX_CONTROL,
            DATA => 1..=MAX_DATA,
            _ => return Err(FrameError::UnknownType(kind)),
        };
        if !range.contains(&length) {
            return wrong;
        }
        if stream == 0 {
            return Err(FrameError::StreamZero);
        }
        if kind == DATA {
            self.state = State::Data {
                stream,
                left: length,
            };
            return Ok(None);
        }
        if length == 0 {
            return Ok(Some(Event::Control(stream, parse(kind, &[])?)));
        }
        self.body.reserve_exact(length);
        self.state = State::Body {
            kind,
            stream,
            length,
        };
        Ok(None)
    }
}

/// The header of a DATA frame; `length` is at most [`MAX_DATA`].
#[must_use]
pub fn data_header(stream: StreamId, length: usize) -> [u8; HEADER] {
    header(DATA, stream, length)
}

/// Appends a control frame.
pub fn encode(stream: StreamId, control: &Control, out: &mut Vec<u8>) {
    match control {
        Control::Open(open) => {
            let extra = open.service.map_or(0, |_| ENDPOINT_BYTES);
            out.extend_from_slice(&header(OPEN, stream, OPEN_BYTES + extra));
            let flags = open.service.map_or(0, |_| HAS_SERVICE);
            out.extend_from_slice(&[VERSION, flags]);
            put_endpoint(open.destination, out);
            put_endpoint(open.source, out);
            if let Some(service) = open.service {
                put_endpoint(service, out);
            }
        }
        Control::Opened => out.extend_from_slice(&header(OPENED, stream, 0)),
        Control::Refused(why) => put_close_reason(REFUSED, stream, why, out),
        Control::Fin => out.extend_from_slice(&header(FIN, stream, 0)),
        Control::FinAck => out.extend_from_slice(&header(FIN_ACK, stream, 0)),
        Control::Reset(why) => put_close_reason(RESET, stream, why, out),
    }
}

fn header(kind: u8, stream: StreamId, length: usize) -> [u8; HEADER] {
    debug_assert!(length <= MAX_DATA);
    let [_, _, _, _, _, a, b, c] = (length as u64).to_be_bytes();
    let [s, t, u, v] = stream.to_be_bytes();
    [kind, a, b, c, s, t, u, v]
}

fn put_endpoint(at: Endpoint, out: &mut Vec<u8>) {
    out.extend_from_slice(&at.addr.octets());
    out.extend_from_slice(&at.port.get().to_be_bytes());
}

fn put_close_reason(kind: u8, stream: StreamId, why: &CloseReason, out: &mut Vec<u8>) {
    out.extend_from_slice(&header(kind, stream, CLOSE_REASON_BYTES));
    let reason = why.reason.map_or(0, |reason| reason as u16);
    out.extend_from_slice(&reason.to_be_bytes());
    out.extend_from_slice(&why.cause.code().to_be_bytes());
    out.extend_from_slice(&why.rule.0.to_be_bytes());
}

/// Parses a control frame's payload; bytes behind the known fields belong to later versions.
fn parse(kind: u8, body: &[u8]) -> Result<Control, FrameError> {
    let short = || FrameError::Length {
        kind,
        length: body.len(),
    };
    match kind {
        OPEN => parse_open(body),
        OPENED => Ok(Control::Opened),
        FIN => Ok(Control::Fin),
        FIN_ACK => Ok(Control::FinAck),
        REFUSED => Ok(Control::Refused(close_reason(body).ok_or_else(short)?)),
        RESET => Ok(Control::Reset(close_reason(body).ok_or_else(short)?)),
        _ => Err(FrameError::UnknownType(kind)),
    }
}

fn parse_open(body: &[u8]) -> Result<Control, FrameError> {
    let short = || FrameError::Length {
        kind: OPEN,
        length: body.len(),
    };
    let (&[version, flags], rest) = body.split_first_chunk().ok_or_else(short)?;
    if version == 0 {
        return Err(FrameError::VersionZero);
    }
    let (destination, rest) = endpoint(rest).ok_or_else(short)?;
    let (source, rest) = endpoint(rest).ok_or_else(short)?;
    let service = if flags & HAS_SERVICE == 0 {
        None
    } else {
        Some(endpoint(rest).ok_or_else(short)?.0)
    };
    Ok(Control::Open(Open {
        destination,
        source,
        service,
    }))
}

fn endpoint(input: &[u8]) -> Option<(Endpoint, &[u8])> {
    let (addr, rest) = input.split_first_chunk::<16>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let port = Port::new(u16::from_be_bytes(*port));
    Some((Endpoint::new(Addr::from_octets(*addr), port), rest))
}

fn close_reason(body: &[u8]) -> Option<CloseReason> {
    let (reason, rest) = body.split_first_chunk::<2>()?;
    let (cause, rest) = rest.split_first_chunk::<2>()?;
    let rule = rest.first_chunk::<8>()?;
    let reason = match u16::from_be_bytes(*reason) {
        0 => None,
        // A reason of a later version is still a reason.
        code => Some(
            u8::try_from(code)
                .ok()
                .and_then(Reason::from_code)
                .unwrap_or(Reason::Protocol),
        ),
    };
    Some(CloseReason {
        reason,
        cause: Cause::from_code(u16::from_be_bytes(*cause)),
        rule: RuleId(u64::from_be_bytes(*rule)),
    })
}

#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod tests;
