// SPDX-License-Identifier: Apache-2.0
//! Two nodes in one process: everything is real but the namespaces and the kernel programs.

mod elsewhere;
mod hostile;
mod live;
mod paths;
mod rig;
mod trust;
