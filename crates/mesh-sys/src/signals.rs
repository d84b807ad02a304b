// SPDX-License-Identifier: Apache-2.0
//! Termination signals.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A receiver of SIGTERM and SIGINT. Create it before anything else starts.
#[derive(Debug)]
pub struct Termination {
    terminate: Signal,
    interrupt: Signal,
}

impl Termination {
    /// Registers the signal handlers.
    ///
    /// # Errors
    /// A signal handler cannot be registered.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next signal and returns its name. Cancel safe.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
