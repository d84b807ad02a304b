// SPDX-License-Identifier: Apache-2.0
//! Validates MeshTrafficPolicy objects. This version does not act on them.

use super::ParsedObject;
use super::object::{Fallback, Issues, RawObject, own_spec};
use crate::crd::{MeshTrafficPolicySpec, NO_EFFECT};

pub(super) fn parse(object: &RawObject<'_>, issues: &mut Issues) -> Option<ParsedObject> {
    issues.warn("", NO_EFFECT);
    let MeshTrafficPolicySpec {
        target_ref: _,
        load_balancing: _,
        connections: _,
        retry: _,
        outlier_ejection: _,
    } = own_spec(object.value, issues)?;
    None
}

pub(super) fn fallback(_: &RawObject<'_>) -> Fallback {
    Fallback::nothing("the object is ignored")
}
