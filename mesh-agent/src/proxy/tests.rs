// SPDX-License-Identifier: Apache-2.0
//! Two nodes in one process, without network namespaces and kernel programs.

mod elsewhere;
mod hostile;
mod live;
mod paths;
mod rig;
mod trust;
