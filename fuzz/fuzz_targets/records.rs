// SPDX-License-Identifier: Apache-2.0
//! TLS records behind the handshake, with frames in those that authenticate.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _seen = mesh_tunnel::fuzzing::records(data);
});
