// SPDX-License-Identifier: Apache-2.0
//! A peer's chain, the root that it is proven against, and a revocation list.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _seen = mesh_identity::fuzzing::certificate(data);
});
