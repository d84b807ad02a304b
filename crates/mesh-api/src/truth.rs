// SPDX-License-Identifier: Apache-2.0
//! Reads truth tables: a cluster as manifests, and the connections that must be allowed or denied in it.
//!
//! `meshctl policy test` checks a table with the policy compiler, and `cargo xtask truth` checks it with
//! real connections. This module neither opens files nor decides anything.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_plan::cluster::Transport;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::manifests::{self, Format, documents};

/// A cluster, and the checks that must hold in it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Table {
    /// The name in output. Defaults to the position in the file.
    #[serde(default)]
    pub name: Option<String>,
    /// A description, which is not evaluated.
    #[serde(default)]
    pub description: Option<String>,
    /// The objects, or paths to them.
    #[serde(default)]
    pub manifests: Vec<Manifest>,
    /// The checks that must hold.
    pub checks: Vec<Check>,
}

/// An object of a table, or a path to objects.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Manifest {
    /// A file or directory, relative to the directory of the table.
    Path(String),
    /// An object.
    Object(Value),
}

/// One connection, and its expected verdict.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Check {
    /// The source: NAMESPACE/POD or an address.
    pub from: String,
    /// The destination, in the same form.
    pub to: String,
    /// The destination port: a number or a name.
    #[serde(deserialize_with = "number_or_name")]
    pub port: String,
    /// The protocol.
    #[serde(default)]
    pub protocol: Transport,
    /// The proof of the identity of each endpoint.
    #[serde(default)]
    pub evidence: Known,
    /// The expected verdict for the connection.
    #[serde(default)]
    pub expect: Option<Expected>,
    /// The expected verdict of the destination's policy.
    #[serde(default)]
    pub expect_ingress: Option<Expected>,
    /// The expected verdict of the source's policy.
    #[serde(default)]
    pub expect_egress: Option<Expected>,
    /// The name in output.
    #[serde(default)]
    pub name: Option<String>,
    /// A description, which is not evaluated.
    #[serde(default)]
    pub comment: Option<String>,
}

/// The proof of an identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Known {
    /// The IP address.
    #[default]
    Address,
    /// The certificate of a TLS connection.
    Tls,
}

impl Known {
    /// The value as in tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Tls => "tls",
        }
    }
}

/// The expected verdict for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expected {
    /// The connection is allowed.
    Allow,
    /// The connection is denied.
    Deny,
}

impl Expected {
    /// The verdict for an allowed or denied connection.
    #[must_use]
    pub const fn of(allowed: bool) -> Self {
        if allowed { Self::Allow } else { Self::Deny }
    }

    /// The value as in tables.
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
            "invalid port {number}: must be between 1 and 65535"
        ))),
        NumberOrName::Neither(value) => Err(D::Error::custom(format!(
            "invalid port {value}: must be a number or a name"
        ))),
    }
}

/// The reason why a text cannot be read as tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not valid YAML or JSON.
    #[error(transparent)]
    Text(#[from] manifests::Error),
    /// A table is invalid.
    #[error("{table}")]
    Table {
        /// The name of the table, or its position in the file.
        table: String,
        /// The invalid field, and the problem.
        #[source]
        source: Mistake,
    },
    /// A check is invalid.
    #[error("{table}: check {row}")]
    Check {
        /// The name of the table, or its position in the file.
        table: String,
        /// The number of the check, from 1.
        row: usize,
        /// The invalid field, and the problem.
        #[source]
        source: Mistake,
    },
}

/// A value of a wrong type, with its path.
pub type Mistake = serde_path_to_error::Error<serde_json::Error>;

/// Reads the tables of a text: one table, a list, or several YAML documents of either.
///
/// # Errors
/// The text is not valid in the format, or has an invalid table.
pub fn tables(text: &str, format: Format) -> Result<Vec<Table>, Error> {
    let documents = match format {
        Format::Yaml => documents(text, format)?,
        Format::Json => {
            // JSON is deserialized without an intermediate value, because tables of a million rows are JSON.
            let direct = if text.trim_start().starts_with('[') {
                serde_json::from_str(text)
            } else {
                serde_json::from_str(text).map(|table| vec![table])
            };
            let error = match direct {
                Ok(tables) => return Ok(tables),
                Err(error) => manifests::Error::from(error),
            };
            let Ok(value) = serde_json::from_str(text) else {
                return Err(error.into());
            };
            // Reading again gives the path of the mistake, except for a duplicate field.
            each(vec![value])?;
            return Err(error.into());
        }
    };
    each(documents)
}

fn each(documents: Vec<Value>) -> Result<Vec<Table>, Error> {
    let mut found = Vec::new();
    for document in documents {
        match document {
            Value::Array(list) => found.extend(list),
            Value::Null => {}
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
                found.push(document);
            }
        }
    }
    found.into_iter().enumerate().map(table).collect()
}

/// Reads one table. The checks are read one by one, so that an error has its position.
fn table((index, mut value): (usize, Value)) -> Result<Table, Error> {
    let name = value.get("name").and_then(Value::as_str);
    let name = name.map_or_else(|| format!("table {}", index + 1), str::to_owned);
    let checks = match value.get_mut("checks") {
        Some(Value::Array(checks)) => std::mem::take(checks),
        Some(_) | None => Vec::new(),
    };
    let mut table: Table = typed(value).map_err(|source| Error::Table {
        table: name.clone(),
        source,
    })?;
    for (index, check) in checks.into_iter().enumerate() {
        let check = typed(check).map_err(|source| Error::Check {
            table: name.clone(),
            row: index + 1,
            source,
        })?;
        table.checks.push(check);
    }
    Ok(table)
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, Mistake> {
    serde_path_to_error::deserialize(value)
}

/// The networks reserved for benchmarks, which no cluster uses: 198.18.0.0/15 (RFC 2544, C.2.2) and
/// 2001:2::/48 (RFC 5180, 8).
const SPARE: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(198, 18, 0, 0),
    Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0),
);
/// The number of addresses in the IPv4 network, without its first and last.
const SPARE_COUNT: u32 = (1 << 17) - 2;

/// Gives an IPv4 and an IPv6 address to each pod without addresses, so that tables can omit them. The
/// addresses are from networks reserved for benchmarks and suffice for 131,070 pods. Pods with hostNetwork
/// are skipped, because they have the addresses of their node.
pub fn give_addresses<'a>(objects: impl IntoIterator<Item = &'a mut Value>) {
    let mut taken = BTreeSet::new();
    let mut without = Vec::new();
    for object in objects.into_iter().filter(|o| o["kind"] == "Pod") {
        let said = addresses(object);
        let on_host = object["spec"]["hostNetwork"] == true;
        // Conversion rejects a status of a wrong type.
        let readable = object["status"].is_null() || object["status"].is_object();
        if said.is_empty() && readable && !on_host {
            without.push(object);
        }
        taken.extend(said);
    }
    let (four, six) = (u32::from(SPARE.0), u128::from(SPARE.1));
    let spare = (1..=SPARE_COUNT).map(|n| {
        let four = Ipv4Addr::from(four + n);
        let six = Ipv6Addr::from(six + u128::from(n));
        [IpAddr::from(four), IpAddr::from(six)].map(|ip| ip.to_string())
    });
    let spare = spare.filter(|both| both.iter().all(|one| !taken.contains(one)));
    for (pod, [four, six]) in without.into_iter().zip(spare) {
        pod["status"]["podIPs"] = json!([{ "ip": four }, { "ip": six }]);
    }
}

/// The addresses in a pod's status, which may be invalid.
fn addresses(pod: &Value) -> Vec<String> {
    let status = &pod["status"];
    let several = status["podIPs"].as_array().into_iter().flatten();
    let several = several.map(|one| &one["ip"]);
    let all = several.chain([&status["podIP"]]);
    all.filter(|one| !one.is_null())
        .map(|one| one.as_str().unwrap_or_default().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(text: &str, format: Format) -> String {
        let error = tables(text, format).expect_err("it is wrong");
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    }

    #[test]
    fn error_in_a_check_has_table_row_and_field() {
        let yaml = |second: &str| {
            format!(
                "name: shop\nchecks: [{{from: a/b, to: a/c, port: 1}}]\n---\nchecks:\n\
                 - {{from: a/b, to: a/c, port: 1, expect: allow}}\n- {second}\n"
            )
        };
        for (check, expected) in [
            (
                "{from: a/b, to: a/c, port: 1, expect: maybe}",
                "table 2: check 2: expect: unknown variant `maybe`",
            ),
            (
                "{from: a/b, to: a/c, port: 1, expects: deny}",
                "table 2: check 2: expects: unknown field `expects`",
            ),
            (
                "{from: a/b, to: a/c, port: 70000}",
                "table 2: check 2: port: invalid port 70000: must be between 1 and 65535",
            ),
            (
                "{from: a/b, port: 1}",
                "table 2: check 2: missing field `to`",
            ),
            ("allow", "table 2: check 2: invalid type: string"),
        ] {
            let said = mistake(&yaml(check), Format::Yaml);
            assert!(said.starts_with(expected), "{said}");
        }
        let json = r#"[{"name": "t", "checks": [
            {"from": "a/b", "to": "a/c", "port": 1, "evidence": "word"}]}]"#;
        let said = mistake(json, Format::Json);
        let expected = "t: check 1: evidence: unknown variant `word`";
        assert!(said.starts_with(expected), "{said}");
    }

    #[test]
    fn pods_without_addresses_get_unused_ones() {
        let pod = |status: Value| json!({"kind": "Pod", "spec": {}, "status": status});
        let said = [
            pod(json!({"podIPs": [{"ip": "198.18.0.2"}]})),
            pod(json!({"podIP": "10.0.0.1"})),
            pod(json!("Running")),
            json!({"kind": "Pod", "spec": {"hostNetwork": true}}),
            json!({"kind": "Service"}),
        ];
        let silent = [
            json!({"kind": "Pod"}),
            pod(json!({"phase": "Pending", "podIPs": []})),
            pod(Value::Null),
        ];
        let mut all: Vec<Value> = said.iter().chain(&silent).cloned().collect();
        give_addresses(&mut all);
        assert_eq!(all[..said.len()], said);
        let given: Vec<_> = all[said.len()..].iter().map(addresses).collect();
        assert_eq!(
            given,
            [1, 3, 4].map(|n| vec![format!("198.18.0.{n}"), format!("2001:2::{n}")])
        );
    }

    #[test]
    fn error_outside_checks_has_its_table() {
        for (text, expected) in [
            ("{name: t}", "t: missing field `checks`"),
            ("{checks: [], name: [t]}", "table 1: name: invalid type"),
            ("{checks: 3}", "table 1: checks: invalid type"),
        ] {
            let said = mistake(text, Format::Yaml);
            assert!(said.starts_with(expected), "{said}");
        }
        let text = "{\"checks\": [";
        let error = tables(text, Format::Json).expect_err("it is cut off");
        assert!(error.to_string().contains("line 1"), "{error}");
    }

    #[test]
    fn json_is_one_table_or_one_list() {
        let table = r#"{"checks": [{"from": "a/b", "to": "a/c", "port": 1}]}"#;
        for (text, count) in [(table.to_owned(), 1), (format!("[{table}, {table}]"), 2)] {
            let read = tables(&text, Format::Json).expect("tables");
            assert_eq!(read.len(), count);
            assert_eq!(read[0].checks.len(), 1);
        }
        let twice = r#"{"checks": [{"from": "a/b", "from": "a/d", "to": "a/c", "port": 1}]}"#;
        for text in [twice, &format!("{table}{table}"), "null"] {
            assert!(tables(text, Format::Json).is_err(), "{text}");
        }
    }
}
