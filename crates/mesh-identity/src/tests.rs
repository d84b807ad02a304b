// SPDX-License-Identifier: Apache-2.0
//! Real handshakes and whole lives of certificates, without a network and without waiting.

mod corpus;
mod grpc;
mod handshakes;
mod issuers;
mod pki;
mod renewals;
mod revocations;
mod sessions;
mod trust;
