// SPDX-License-Identifier: Apache-2.0
//! The test environment itself: labs, clients, servers, the applications, the demo and the bench.

mod apps;
mod bench;
mod clients;
mod demo;
mod lab;
mod lifecycle;
mod manifests;
