// SPDX-License-Identifier: Apache-2.0
//! Fuzz entry points: the parsers of bytes from outside, each with what must hold for any input. Compiled
//! for tests and by `cargo xtask fuzz`.

pub use crate::frame::fuzz::frames;
pub use crate::records::fuzz::records;
