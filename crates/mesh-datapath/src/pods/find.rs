// SPDX-License-Identifier: Apache-2.0
//! Where a pod's namespace is: named by the source, or found through the kubelet's cgroups, or, if
//! those do not show it, by asking the container runtime.

use std::path::PathBuf;

use mesh_plan::plan::LocalPod;

use super::Error;

mod cgroup;
mod cri;

pub use cgroup::ByCgroup;
pub use cri::ByCri;

/// Finds the file of a pod's namespace.
pub trait Find {
    /// The file of the namespace of the pod with this UID.
    ///
    /// # Errors
    /// When it is not known (yet).
    fn path(&self, uid: &str, pod: &LocalPod) -> Result<PathBuf, Error>;

    /// Whether the file goes when one process of the pod does, while the namespace may go on.
    fn is_of_a_process(&self) -> bool {
        false
    }
}

/// By the file that the source names (annotation `mesh.rs/netns`): source `dir` only. The
/// annotation is the word of whoever writes the manifests, who is trusted there.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByAnnotation;

impl Find for ByAnnotation {
    fn path(&self, _uid: &str, pod: &LocalPod) -> Result<PathBuf, Error> {
        match &pod.netns_path {
            Some(path) => Ok(PathBuf::from(path)),
            None => Err(Error::NotNamed),
        }
    }
}

/// As it fits the source.
#[derive(Debug)]
pub enum Finder {
    /// The source names the files.
    Annotation(ByAnnotation),
    /// The kubelet made the pods; the runtime is asked for those that no cgroup shows.
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
