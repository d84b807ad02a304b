// SPDX-License-Identifier: Apache-2.0
//! What an agent, or somebody else, asks the CA of the controller for.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _seen = mesh_controller::fuzzing::csr(data);
});
