// SPDX-License-Identifier: Apache-2.0
//! A new tunnel to another node's agent: connected from the pod's own address, and the peer proven.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_common::Reason;
use tokio::time::{Instant as Deadline, sleep, timeout_at};

use super::target::Target;
use crate::identity::{self, Epoch, Refusal, server_name};
use crate::metrics::Role;
use crate::pods::PodHandle;
use crate::proxy::pool::Pooled;
use crate::proxy::socket::Socket;
use crate::proxy::tls::{self, HandshakeError};
use crate::proxy::tunnel::Tunnel;
use crate::proxy::turns::Computing;
use crate::proxy::worker::{Share, Worker};

/// Makes a tunnel to the target's agent. With `elsewhere` another endpoint can be tried, and this
/// one is given up sooner.
pub(super) async fn tunnel(
    worker: &Rc<Worker>,
    (pod, share): (&PodHandle, &Share),
    target: &Target,
    elsewhere: bool,
) -> Result<Pooled, Reason> {
    let timing = &worker.timing;
    let begun = Deadline::now();
    let key = &target.key;
    let ready = worker.identities.ready(&key.own);
    match timeout_at(begun + timing.certificate, ready).await {
        Ok(Ok(_certificate)) => {}
        Ok(Err(_)) | Err(_) => return Err(Reason::NoCertificate),
    }
    let (connect, retry) = if elsewhere {
        (timing.connect_first, Duration::ZERO)
    } else {
        (timing.connect, timing.retry)
    };
    let connected = timeout_at(begun + connect, connected(worker, pod, target, retry)).await;
    let socket = match connected {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => {
            tracing::debug!(to = %key.to, %error, "cannot reach another node's agent");
            return Err(Reason::PeerUnreachable);
        }
        Err(_elapsed) => return Err(Reason::PeerUnreachable),
    };
    let handshake = async {
        let _admitted = share.admission.dial().await;
        secure(worker, share, target, socket).await
    };
    let made = match timeout_at(Deadline::now() + timing.handshake, handshake).await {
        Ok(made) => made,
        Err(_elapsed) => Err(Failure::Refused(Refusal::Timeout)),
    };
    let result = made.as_ref().map(|_| ()).map_err(Failure::refusal);
    worker.metrics().handshake(Role::Client, result);
    made.map_err(|failure| {
        tracing::debug!(to = %key.to, expected = %key.expected, %failure, "no tunnel");
        failure.reason()
    })
}

/// Connects; a peer that refuses may be just starting, and is asked again for a while. It is never
/// reached in clear instead.
async fn connected(
    worker: &Worker,
    pod: &PodHandle,
    target: &Target,
    retry: Duration,
) -> io::Result<Socket> {
    let begun = Deadline::now();
    let mut pause = worker.timing.first_retry;
    loop {
        let stream = worker.dial.peer(pod, target.from, target.to)?;
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
    Identity(#[from] identity::Error),
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
