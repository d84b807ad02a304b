// SPDX-License-Identifier: Apache-2.0
//! Truth tables, as files hold them.

use std::path::Path;

use anyhow::{Context, Result};
use mesh_api::Object;
use mesh_api::manifests::{Format, documents};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::args::{Evidence, Protocol};
use crate::input;

/// A cluster, and what must hold in it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Table {
    /// What it is called in output; without it, its place in the file.
    #[serde(default)]
    pub(crate) name: Option<String>,
    /// For people.
    #[serde(default, rename = "description")]
    _description: Option<String>,
    /// Objects, or paths of files and directories, from the table's own directory.
    #[serde(default)]
    manifests: Vec<Manifest>,
    /// What must hold.
    pub(crate) checks: Vec<Check>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Manifest {
    Path(String),
    Object(Value),
}

/// One connection, and what must become of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Check {
    /// Who connects: NAMESPACE/POD or an address.
    pub(crate) from: String,
    /// To whom.
    pub(crate) to: String,
    /// To which port, by number or name.
    #[serde(deserialize_with = "number_or_name")]
    pub(crate) port: String,
    #[serde(default)]
    pub(crate) protocol: Protocol,
    /// How each end knows the other.
    #[serde(default)]
    pub(crate) evidence: Evidence,
    /// Whether it comes about.
    #[serde(default)]
    pub(crate) expect: Option<Expected>,
    /// What the policy of the destination says.
    #[serde(default)]
    pub(crate) expect_ingress: Option<Expected>,
    /// What the policy of the source says.
    #[serde(default)]
    pub(crate) expect_egress: Option<Expected>,
    /// What it is called in output.
    #[serde(default)]
    pub(crate) name: Option<String>,
    /// For people.
    #[serde(default, rename = "comment")]
    _comment: Option<String>,
}

/// What must become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Expected {
    Allow,
    Deny,
}

impl Expected {
    pub(crate) fn of(allowed: bool) -> Self {
        if allowed { Self::Allow } else { Self::Deny }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrName {
    Number(u16),
    Name(String),
}

fn number_or_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Ok(match NumberOrName::deserialize(from)? {
        NumberOrName::Number(number) => number.to_string(),
        NumberOrName::Name(name) => name,
    })
}

/// The tables of a file: one, or a list, or (YAML) several documents of either.
pub(crate) fn read(path: &Path) -> Result<Vec<Table>> {
    let (text, format) = input::read(path)?;
    let tables = match format {
        // Straight to its type: tables of a million rows are JSON.
        Format::Json if text.trim_start().starts_with('[') => Ok(serde_json::from_str(&text)?),
        Format::Json => serde_json::from_str(&text).map(|table| vec![table]),
        Format::Yaml => yaml(&text)?,
    };
    tables.with_context(|| path.display().to_string())
}

fn yaml(text: &str) -> Result<serde_json::Result<Vec<Table>>> {
    let mut tables = Vec::new();
    for document in documents(text, Format::Yaml)? {
        if let Value::Array(list) = document {
            tables.extend(list);
        } else if !document.is_null() {
            tables.push(document);
        }
    }
    Ok(tables.into_iter().map(serde_json::from_value).collect())
}

/// The objects of a table.
pub(crate) fn objects(table: &Table, file: &Path) -> Result<Vec<Object>> {
    let base = file.parent().unwrap_or(Path::new(""));
    let mut objects = Vec::new();
    for manifest in &table.manifests {
        match manifest {
            Manifest::Path(path) => input::manifests(&base.join(path), &mut objects)?,
            Manifest::Object(value) => {
                let mut flat = Vec::new();
                mesh_api::manifests::flatten(value.clone(), 1, &mut flat)?;
                objects.extend(flat.into_iter().map(|value| Object {
                    origin: file.display().to_string(),
                    value,
                }));
            }
        }
    }
    Ok(objects)
}
