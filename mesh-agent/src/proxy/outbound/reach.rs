// SPDX-License-Identifier: Apache-2.0
//! A new tunnel to another node's agent: connected from the pod's own address, and the peer proven.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_common::Reason;
use tokio::time::{Instant as Deadline, sleep, timeout_at};

use super::target::Target;
use crate::proxy::pool::Pooled;
use crate::proxy::socket::Socket;
use crate::proxy::tls::{self, HandshakeError};
use crate::proxy::tunnel::Tunnel;
use crate::proxy::turns::Computing;
use crate::proxy::worker::{Share, Worker};
use mesh_datapath::pods::PodHandle;
use mesh_identity::{Epoch, Refusal, server_name};
use mesh_telemetry::metrics::Role;

/// Makes a tunnel to the target's agent. With `elsewhere` another endpoint can be tried, and this
/// one is given up sooner. An agent that is not found on the application's own port is asked for on
/// the tunnel port, which it always listens on.
pub(super) async fn tunnel(
    worker: &Rc<Worker>,
    pod: (&PodHandle, &Share),
    target: &Target,
    elsewhere: bool,
) -> Result<Pooled, Reason> {
    let timing = &worker.timing;
    let ready = worker.identities.ready(&target.key.own);
    match timeout_at(Deadline::now() + timing.certificate, ready).await {
        Ok(Ok(_certificate)) => {}
        Ok(Err(_)) | Err(_) => return Err(Reason::NoCertificate),
    }
    let usual = Patience {
        connect: if elsewhere {
            timing.connect_first
        } else {
            timing.connect
        },
        retry: if elsewhere {
            Duration::ZERO
        } else {
            timing.retry
        },
        handshake: timing.handshake,
    };
    let own = SocketAddr::new(target.to.ip(), worker.tunnel_port.get());
    if target.to == own {
        return made(worker, pod, target, own, usual)
            .await
            .map_err(|(reason, _)| reason);
    }
    let short = Patience {
        connect: timing.connect_first,
        retry: Duration::ZERO,
        handshake: timing.handshake_first,
    };
    match made(worker, pod, target, target.to, short).await {
        Ok(pooled) => return Ok(pooled),
        Err((reason, false)) => return Err(reason),
        Err((_, true)) => {}
    }
    let pooled = made(worker, pod, target, own, usual).await;
    let pooled = pooled.map_err(|(reason, _)| reason)?;
    worker.mark_lost(target.key.to.addr);
    Ok(pooled)
}

/// How long a peer is waited for.
struct Patience {
    connect: Duration,
    retry: Duration,
    handshake: Duration,
}

/// Makes a tunnel to this very port. A failure also says whether somebody else than an agent may
/// have answered, or nobody.
async fn made(
    worker: &Rc<Worker>,
    (pod, share): (&PodHandle, &Share),
    target: &Target,
    to: SocketAddr,
    patience: Patience,
) -> Result<Pooled, (Reason, bool)> {
    let until = Deadline::now() + patience.connect;
    let connected = connected(worker, pod, (target.from, to), patience.retry);
    let socket = match timeout_at(until, connected).await {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => {
            tracing::debug!(%to, %error, "cannot reach another node's agent");
            return Err((Reason::PeerUnreachable, true));
        }
        Err(_elapsed) => return Err((Reason::PeerUnreachable, true)),
    };
    let handshake = async {
        let _admitted = share.admission.dial().await;
        secure(worker, share, target, socket).await
    };
    let made = match timeout_at(Deadline::now() + patience.handshake, handshake).await {
        Ok(made) => made,
        Err(_elapsed) => Err(Failure::Refused(Refusal::Timeout)),
    };
    let refused = |failure: &Failure| failure.refusal().label();
    let result = made.as_ref().map(|_| ()).map_err(refused);
    worker.metrics().handshake(Role::Client, result);
    made.map_err(|failure| {
        tracing::debug!(%to, expected = %target.key.expected, %failure, "no tunnel");
        let no_agent = matches!(
            failure.refusal(),
            Refusal::NotTls
                | Refusal::Misbehaved
                | Refusal::TlsVersion
                | Refusal::RefusedByPeer(_)
                | Refusal::Closed
                | Refusal::Timeout
        );
        (failure.reason(), no_agent)
    })
}

/// Connects; a peer that refuses may be just starting, and is asked again for a while. It is never
/// reached in clear instead.
async fn connected(
    worker: &Worker,
    pod: &PodHandle,
    (from, to): (SocketAddr, SocketAddr),
    retry: Duration,
) -> io::Result<Socket> {
    let begun = Deadline::now();
    let mut pause = worker.timing.first_retry;
    loop {
        let marked = to.port() != worker.tunnel_port.get();
        let stream = worker.dial.peer(pod, from, to, marked)?;
        let socket = Socket::new(stream)?;
        match socket.connected().await {
            Ok(()) => return Ok(socket),
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && begun.elapsed() + pause < retry =>
            {
                sleep(pause).await;
                pause *= 2;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn secure(
    worker: &Worker,
    share: &Share,
    target: &Target,
    socket: Socket,
) -> Result<Pooled, Failure> {
    let key = &target.key;
    let identities = &worker.identities;
    // The epoch first: a tunnel may count as older than it is, never as newer.
    let epoch: Epoch = identities
        .epoch(&key.own)
        .ok_or(Failure::Refused(Refusal::Failed))?;
    let config = identities.client(&key.own, &key.expected)?;
    let computing = Computing::of(&worker.turns, &share.uid);
    let name = server_name(key.to.addr.into());
    let verify = |connection: &_| {
        let proof = identities.peer(connection)?;
        if proof.id == key.expected {
            Ok(Rc::new(proof))
        } else {
            Err(Failure::Refused(Refusal::WrongIdentity))
        }
    };
    let (secured, proof) = tls::connect((&socket, computing), config, name, verify).await?;
    Ok(Pooled {
        tunnel: Tunnel::new(socket, secured, worker.lender(share)),
        epoch,
        proof,
        made: Instant::now(),
    })
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The handshake did not prove the peer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no certificate to show.
    #[error(transparent)]
    Identity(#[from] mesh_identity::Error),
}

impl From<HandshakeError> for Failure {
    fn from(error: HandshakeError) -> Self {
        Self::Refused(error.refusal())
    }
}

impl Failure {
    /// For metrics.
    pub(crate) const fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(refusal) => *refusal,
            Self::Identity(_) => Refusal::NoOwnCertificate,
        }
    }

    /// For records.
    pub(crate) fn reason(&self) -> Reason {
        self.refusal().reason()
    }
}
