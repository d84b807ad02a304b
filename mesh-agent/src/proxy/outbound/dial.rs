// SPDX-License-Identifier: Apache-2.0
//! Makes a new tunnel to another node's agent: connects from the pod's own address, and has the peer
//! prove its identity.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_backoff::Backoff;
use mesh_common::Reason;
use mesh_datapath::pods::PodHandle;
use mesh_identity::{Epoch, Refusal, server_name};
use mesh_tunnel::tls::{self, HandshakeError};
use mesh_tunnel::{Socket, Tunnel};
use tokio::time::{Instant as Deadline, sleep, timeout_at};

use super::target::Target;
use crate::proxy::Timing;
use crate::proxy::handshake_scheduler::PodHandshakes;
use crate::proxy::pod_sockets::PeerAddress;
use crate::proxy::pool::Pooled;
use crate::proxy::worker::{PodResources, Worker};
use mesh_telemetry::metrics::Role;

/// The delay before a peer that refuses TCP is asked again.
const fn backoff(timing: &Timing) -> Backoff {
    Backoff {
        first: timing.first_retry,
        longest: timing.retry,
        jitter: 0.5..=1.0,
    }
}

/// Makes tunnels to one target.
pub(super) struct Dialer<'a> {
    pub(super) worker: &'a Rc<Worker>,
    pub(super) pod: &'a PodHandle,
    pub(super) resources: &'a PodResources,
    pub(super) target: &'a Target,
}

/// Time limits of one attempt.
struct Limits {
    connect: Duration,
    /// The time during which a connect to a peer that refuses TCP is retried.
    retry: Duration,
    handshake: Duration,
}

/// Why an attempt failed.
struct DialError {
    reason: Reason,
    /// Whether the port may belong to another program than an agent, or to none.
    no_agent: bool,
}

impl Dialer<'_> {
    /// Makes a tunnel to the target's agent. With `has_alternative` the attempt is given up sooner,
    /// because another endpoint can be tried. If no agent answers on the application's own port, the
    /// tunnel port is tried, on which every agent listens.
    pub(super) async fn tunnel(&self, has_alternative: bool) -> Result<Pooled, Reason> {
        let timing = &self.worker.timing;
        let ready = self.worker.identities.ready(&self.target.key.own);
        match timeout_at(Deadline::now() + timing.certificate, ready).await {
            Ok(Ok(_certificate)) => {}
            Ok(Err(_)) | Err(_) => return Err(Reason::NoCertificate),
        }
        let usual = Limits {
            connect: if has_alternative {
                timing.connect_first
            } else {
                timing.connect
            },
            retry: if has_alternative {
                Duration::ZERO
            } else {
                timing.retry
            },
            handshake: timing.handshake,
        };
        let port = self.worker.tunnel_port.get();
        let tunnel_port = SocketAddr::new(self.target.to.ip(), port);
        if self.target.to == tunnel_port {
            let made = self.tunnel_to(tunnel_port, usual).await;
            return made.map_err(|error| error.reason);
        }
        let short = Limits {
            connect: timing.connect_first,
            retry: Duration::ZERO,
            handshake: timing.handshake_first,
        };
        match self.tunnel_to(self.target.to, short).await {
            Ok(pooled) => return Ok(pooled),
            Err(error) if !error.no_agent => return Err(error.reason),
            Err(_no_agent) => {}
        }
        let made = self.tunnel_to(tunnel_port, usual).await;
        let pooled = made.map_err(|error| error.reason)?;
        self.worker.mark_lost(self.target.key.to.addr);
        Ok(pooled)
    }

    /// Makes a tunnel to this port.
    async fn tunnel_to(&self, to: SocketAddr, limits: Limits) -> Result<Pooled, DialError> {
        let unreachable = DialError {
            reason: Reason::PeerUnreachable,
            no_agent: true,
        };
        let until = Deadline::now() + limits.connect;
        let socket = match timeout_at(until, self.connect(to, limits.retry)).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                tracing::debug!(%to, %error, "cannot connect to another node's agent");
                return Err(unreachable);
            }
            Err(_elapsed) => return Err(unreachable),
        };
        let handshake = async {
            let _admitted = self.resources.admission.dial().await;
            self.secure(socket).await
        };
        let made = match timeout_at(Deadline::now() + limits.handshake, handshake).await {
            Ok(made) => made,
            Err(_elapsed) => Err(HandshakeFailure::Refused(Refusal::Timeout)),
        };
        let refused = |failure: &HandshakeFailure| failure.refusal().label();
        let result = made.as_ref().map(|_| ()).map_err(refused);
        self.worker.metrics().handshake(Role::Client, result);
        made.map_err(|failure| {
            let expected = &self.target.key.expected;
            tracing::debug!(%to, %expected, %failure, "cannot make a tunnel");
            let no_agent = matches!(
                failure.refusal(),
                Refusal::NotTls
                    | Refusal::Misbehaved
                    | Refusal::TlsVersion
                    | Refusal::RefusedByPeer(_)
                    | Refusal::Closed
                    | Refusal::Timeout
            );
            DialError {
                reason: failure.reason(),
                no_agent,
            }
        })
    }

    /// Connects. A peer that refuses may be just starting, and is asked again for `retry`; it is never
    /// reached in plaintext instead.
    async fn connect(&self, to: SocketAddr, retry: Duration) -> io::Result<Socket> {
        let worker = self.worker;
        let begun = Deadline::now();
        let mut failures = 0;
        let address = PeerAddress {
            from: self.target.from,
            to,
            marked: to.port() != worker.tunnel_port.get(),
        };
        loop {
            let stream = worker.sockets.peer(self.pod, address)?;
            let socket = Socket::new(stream)?;
            let Err(error) = socket.connected().await else {
                return Ok(socket);
            };
            let delay = backoff(&worker.timing).delay(failures, rand::random());
            if error.kind() != io::ErrorKind::ConnectionRefused || begun.elapsed() + delay >= retry
            {
                return Err(error);
            }
            failures += 1;
            sleep(delay).await;
        }
    }

    /// Runs the handshake, in which the peer has to prove the expected identity.
    async fn secure(&self, socket: Socket) -> Result<Pooled, HandshakeFailure> {
        let key = &self.target.key;
        let identities = &self.worker.identities;
        // The epoch first: a tunnel may count as older than it is, never as newer.
        let epoch: Epoch = identities
            .epoch(&key.own)
            .ok_or(HandshakeFailure::Refused(Refusal::Failed))?;
        let config = identities.client(&key.own, &key.expected)?;
        let cpu = PodHandshakes::new(&self.worker.handshakes, &self.resources.uid);
        let name = server_name(key.to.addr.into());
        let verify = |connection: &_| {
            let proof = identities.peer(connection)?;
            if proof.id == key.expected {
                Ok(Rc::new(proof))
            } else {
                Err(HandshakeFailure::Refused(Refusal::WrongIdentity))
            }
        };
        let (secured, proof) = tls::connect(&socket, &cpu, config, name, verify).await?;
        let buffers = self.worker.buffer_account(self.resources);
        Ok(Pooled {
            tunnel: Tunnel::new(socket, secured, buffers),
            epoch,
            proof,
            made: Instant::now(),
        })
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeFailure {
    /// The peer was refused, or refused us.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The pod has no usable certificate.
    #[error(transparent)]
    Identity(#[from] mesh_identity::Error),
}

impl From<HandshakeError> for HandshakeFailure {
    fn from(error: HandshakeError) -> Self {
        Self::Refused(match &error {
            HandshakeError::Io(error) => Refusal::of_io(error),
            HandshakeError::Tls(error) => Refusal::of_tls(error),
            HandshakeError::TooLong => Refusal::Misbehaved,
            HandshakeError::Keys(_) | HandshakeError::Unexpected => Refusal::Failed,
        })
    }
}

impl HandshakeFailure {
    /// The refusal for metrics.
    pub(crate) const fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(refusal) => *refusal,
            Self::Identity(_) => Refusal::NoOwnCertificate,
        }
    }

    /// The reason for records.
    pub(crate) fn reason(&self) -> Reason {
        self.refusal().reason()
    }
}
