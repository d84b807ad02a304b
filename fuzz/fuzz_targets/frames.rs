// SPDX-License-Identifier: Apache-2.0
//! The frames of `mesh/1`: any bytes, cut anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _seen = mesh_tunnel::fuzzing::frames(data);
});
