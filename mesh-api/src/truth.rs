// SPDX-License-Identifier: Apache-2.0
//! Truth tables: a cluster as manifests, and who must reach whom in it.
//!
//! One file format for all who run them: `meshctl policy test` asks the compiler, `cargo xtask
//! truth` asks real connections. Nothing here opens files or decides anything.

use mesh_plan::cluster::Transport;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::manifests::{self, Format, documents};

/// A cluster, and what must hold in it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Table {
    /// What it is called in output; without it, its place in the file.
    #[serde(default)]
    pub name: Option<String>,
    /// For people.
    #[serde(default)]
    pub description: Option<String>,
    /// Objects, or where they are.
    #[serde(default)]
    pub manifests: Vec<Manifest>,
    /// What must hold.
    pub checks: Vec<Check>,
}

/// Objects of a table.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Manifest {
    /// A file or a directory, from the table's own directory.
    Path(String),
    /// An object.
    Object(Value),
}

/// One connection, and what must become of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Check {
    /// Who connects: NAMESPACE/POD or an address.
    pub from: String,
    /// To whom.
    pub to: String,
    /// To which port, by number or name.
    #[serde(deserialize_with = "number_or_name")]
    pub port: String,
    /// With which protocol.
    #[serde(default)]
    pub protocol: Transport,
    /// How each end knows the other.
    #[serde(default)]
    pub evidence: Known,
    /// Whether it comes about.
    #[serde(default)]
    pub expect: Option<Expected>,
    /// What the policy of the destination says.
    #[serde(default)]
    pub expect_ingress: Option<Expected>,
    /// What the policy of the source says.
    #[serde(default)]
    pub expect_egress: Option<Expected>,
    /// What it is called in output.
    #[serde(default)]
    pub name: Option<String>,
    /// For people.
    #[serde(default)]
    pub comment: Option<String>,
}

/// How an end knows the other one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Known {
    /// By its address.
    #[default]
    Address,
    /// By its certificate.
    Tls,
}

impl Known {
    /// As in tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Tls => "tls",
        }
    }
}

/// What must become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expected {
    /// It comes about.
    Allow,
    /// It does not.
    Deny,
}

impl Expected {
    /// From whether it is allowed.
    #[must_use]
    pub const fn of(allowed: bool) -> Self {
        if allowed { Self::Allow } else { Self::Deny }
    }

    /// As in tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrName {
    Number(u64),
    Name(String),
    Neither(Value),
}

fn number_or_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    match NumberOrName::deserialize(from)? {
        NumberOrName::Number(number) if u16::try_from(number).is_ok() => Ok(number.to_string()),
        NumberOrName::Name(name) => Ok(name),
        NumberOrName::Number(number) => Err(D::Error::custom(format!(
            "port: {number} is none from 1 to 65535"
        ))),
        NumberOrName::Neither(value) => Err(D::Error::custom(format!(
            "port: {value} is neither a number nor a name"
        ))),
    }
}

/// The tables of a file's text: one, or a list, or (YAML) several documents of either.
///
/// # Errors
/// The text is not in the format, or something in it is no table.
pub fn tables(text: &str, format: Format) -> Result<Vec<Table>, manifests::Error> {
    match format {
        // Straight to its type: tables of a million rows are JSON.
        Format::Json if text.trim_start().starts_with('[') => Ok(serde_json::from_str(text)?),
        Format::Json => Ok(vec![serde_json::from_str(text)?]),
        Format::Yaml => {
            let mut tables = Vec::new();
            for document in documents(text, Format::Yaml)? {
                if let Value::Array(list) = document {
                    tables.extend(list);
                } else if !document.is_null() {
                    tables.push(document);
                }
            }
            let tables = tables.into_iter().map(serde_json::from_value);
            Ok(tables.collect::<Result<_, _>>()?)
        }
    }
}
