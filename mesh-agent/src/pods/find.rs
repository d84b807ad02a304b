// SPDX-License-Identifier: Apache-2.0
//! Where a pod's namespace is.

use std::path::PathBuf;

use mesh_plan::plan::LocalPod;

use super::Error;

/// Finds the file of a pod's namespace.
pub trait Find {
    /// The file of the namespace of the pod with this UID.
    ///
    /// # Errors
    /// When it is not known (yet).
    fn path(&self, uid: &str, pod: &LocalPod) -> Result<PathBuf, Error>;
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
