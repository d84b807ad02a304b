// SPDX-License-Identifier: Apache-2.0
//! Policy over real connections, packets and datagrams.

mod audit;
mod authentication_modes;
mod clauses;
mod denials;
mod diff;
mod open_connections;
mod raw_sockets;
mod truth_tables;
mod udp;
