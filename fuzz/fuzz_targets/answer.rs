// SPDX-License-Identifier: Apache-2.0
//! What a CA answers over gRPC.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _seen = mesh_identity::fuzzing::answer(data);
});
