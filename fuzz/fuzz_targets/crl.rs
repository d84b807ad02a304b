// SPDX-License-Identifier: Apache-2.0
//! A file of revocation lists.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _seen = mesh_identity::fuzzing::crl(data);
});
