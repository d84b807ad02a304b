// SPDX-License-Identifier: Apache-2.0
//! Finds the network namespace of a pod: by annotation, by the kubelet's cgroups, or by the container runtime's
//! API if the cgroups show no process of the pod.

use std::path::PathBuf;

use mesh_plan::plan::LocalPod;

use super::Error;

mod cgroup;
mod cri;

pub use cgroup::ByCgroup;
pub use cri::ByCri;

/// Finds the namespace file of a pod.
pub trait Find {
    /// Returns the path of the network namespace of the pod with this UID.
    ///
    /// # Errors
    /// The path is not known, or not known yet.
    fn path(&self, uid: &str, pod: &LocalPod) -> Result<PathBuf, Error>;

    /// Returns whether paths are below `/proc/PID` and can disappear before the namespace does.
    fn is_of_a_process(&self) -> bool {
        false
    }
}

/// Takes the path from the annotation `mesh.rs/netns`, which the source `dir` uses. With that source, the author
/// of the manifests is trusted.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByAnnotation;

impl Find for ByAnnotation {
    fn path(&self, _uid: &str, pod: &LocalPod) -> Result<PathBuf, Error> {
        match &pod.netns_path {
            Some(path) => Ok(PathBuf::from(path)),
            None => Err(Error::NoAnnotation),
        }
    }
}

/// The finder of a configuration source.
#[derive(Debug)]
pub enum Finder {
    /// Source `dir`: annotations name the paths.
    Annotation(ByAnnotation),
    /// Source `kubernetes`: cgroups of the kubelet, then the container runtime for pods without a process there.
    Kubelet(ByCgroup, Option<ByCri>),
}

impl Find for Finder {
    fn path(&self, uid: &str, pod: &LocalPod) -> Result<PathBuf, Error> {
        match self {
            Self::Annotation(find) => find.path(uid, pod),
            Self::Kubelet(cgroup, runtime) => match (cgroup.path(uid, pod), runtime) {
                (Err(Error::NoProcess { .. }), Some(runtime)) => runtime.path(uid, pod),
                (found, _) => found,
            },
        }
    }

    fn is_of_a_process(&self) -> bool {
        match self {
            Self::Annotation(find) => find.is_of_a_process(),
            Self::Kubelet(cgroup, _) => cgroup.is_of_a_process(),
        }
    }
}
