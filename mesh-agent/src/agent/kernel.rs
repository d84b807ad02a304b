// SPDX-License-Identifier: Apache-2.0
//! The datapath as telemetry reads it.

use std::io;

use mesh_common::counter::Counter;
use mesh_common::event::Event;
use mesh_telemetry::flows::EventSource;
use mesh_telemetry::metrics;

use mesh_datapath::{Handles, datapath};

/// The counters and maps of the kernel programs.
pub(super) struct Counters(pub(super) Handles);

impl metrics::Kernel for Counters {
    fn counter(&self, counter: Counter) -> u64 {
        self.0.counter(counter)
    }

    fn map_usage(&self) -> Vec<(&'static str, u64, u64)> {
        self.0.map_usage()
    }
}

/// The events of the kernel programs.
pub(super) struct Events(pub(super) datapath::Events);

/// Maximum number of events in a batch, about the capacity of the ring: a batch ends even if the kernel
/// writes as fast as the agent reads.
const BATCH: usize = 20_000;

impl EventSource for Events {
    fn acquire(&mut self) -> io::Result<bool> {
        self.0.take_turn()
    }

    fn release(&mut self) -> io::Result<()> {
        self.0.give_turn()
    }

    fn drain(&mut self, each: &mut dyn FnMut(&Event)) {
        self.0.drain(BATCH, |event| each(&event));
    }
}
