// SPDX-License-Identifier: Apache-2.0
//! Parses label selectors.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use mesh_plan::cluster::{LabelTest, Requirement, Selector};
use serde_json::Value;

use super::object::{Issues, typed};
use super::validate::{label_key, label_value};

/// Parses a selector with the validation of the API server. The result is meaningless if there was a
/// problem.
pub(super) fn selector(path: &str, from: &LabelSelector, issues: &mut Issues) -> Selector {
    let mut requirements = BTreeSet::new();
    for (key, value) in from.match_labels.iter().flatten() {
        let path = format!("{path}.matchLabels.{key}");
        issues.check(&path, label_key(key));
        issues.check(&path, label_value(value));
        requirements.insert(Requirement {
            key: key.clone(),
            test: LabelTest::In(BTreeSet::from([value.clone()])),
        });
    }
    for (i, expression) in from.match_expressions.iter().flatten().enumerate() {
        let path = format!("{path}.matchExpressions[{i}]");
        issues.check(&format!("{path}.key"), label_key(&expression.key));
        let values: BTreeSet<String> = expression.values.iter().flatten().cloned().collect();
        for value in &values {
            issues.check(&format!("{path}.values"), label_value(value));
        }
        let test = match expression.operator.as_str() {
            "In" | "NotIn" if values.is_empty() => {
                issues.reject(
                    format!("{path}.values"),
                    format!("must not be empty for operator {}", expression.operator),
                );
                continue;
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                issues.reject(
                    format!("{path}.values"),
                    format!("must be empty for operator {}", expression.operator),
                );
                continue;
            }
            "In" => LabelTest::In(values),
            "NotIn" => LabelTest::NotIn(values),
            "Exists" => LabelTest::Exists,
            "DoesNotExist" => LabelTest::DoesNotExist,
            other => {
                issues.reject(
                    format!("{path}.operator"),
                    format!(
                        "unsupported value {other:?}: must be In, NotIn, Exists or DoesNotExist"
                    ),
                );
                continue;
            }
        };
        requirements.insert(Requirement {
            key: expression.key.clone(),
            test,
        });
    }
    Selector {
        requirements: requirements.into_iter().collect(),
    }
}

/// Parses an optional selector. An absent selector selects everything.
pub(super) fn optional(path: &str, from: Option<&LabelSelector>, issues: &mut Issues) -> Selector {
    from.map_or_else(Selector::default, |from| selector(path, from, issues))
}

/// Parses the selector of a rejected object; `None` if the selector is invalid.
pub(super) fn salvaged(from: Option<&Value>) -> Option<Selector> {
    let Some(from) = from else {
        return Some(Selector::default());
    };
    let mut issues = Issues::default();
    let read = typed::<LabelSelector>(from, &mut issues)?;
    let selector = selector("", &read, &mut issues);
    issues.problems.is_empty().then_some(selector)
}
