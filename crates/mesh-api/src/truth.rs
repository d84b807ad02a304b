// SPDX-License-Identifier: Apache-2.0
//! Truth tables: a cluster as manifests, and who must reach whom in it.
//!
//! One file format for all who run them: `meshctl policy test` asks the compiler, `cargo xtask
//! truth` asks real connections. Nothing here opens files or decides anything.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_plan::cluster::Transport;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

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
            "{number} is none from 1 to 65535"
        ))),
        NumberOrName::Neither(value) => Err(D::Error::custom(format!(
            "{value} is neither a number nor a name"
        ))),
    }
}

/// Why a text is no list of tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not in its format.
    #[error(transparent)]
    Text(#[from] manifests::Error),
    /// Something about a table.
    #[error("{table}")]
    Table {
        /// The table, by its name or its place in the file.
        table: String,
        /// What is wrong, and in which field.
        #[source]
        source: Mistake,
    },
    /// Something about a check.
    #[error("{table}: check {row}")]
    Check {
        /// The table, by its name or its place in the file.
        table: String,
        /// Which of its checks, from 1.
        row: usize,
        /// What is wrong, and in which field.
        #[source]
        source: Mistake,
    },
}

/// A value that is none of its type.
pub type Mistake = serde_path_to_error::Error<serde_json::Error>;

/// The tables of a file's text: one, or a list, or (YAML) several documents of either.
///
/// # Errors
/// The text is not in the format, or something in it is no table.
pub fn tables(text: &str, format: Format) -> Result<Vec<Table>, Error> {
    let documents = match format {
        Format::Yaml => documents(text, format)?,
        Format::Json => {
            // Straight to its type: tables of a million rows are JSON.
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
            // The place of the mistake; a field that is there twice has none.
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

/// One table, its checks one by one, so that a mistake has a place.
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

/// Networks that are set aside for measurements, where no cluster is: 198.18.0.0/15 (RFC 2544, C.2.2)
/// and 2001:2::/48 (RFC 5180, 8).
const SPARE: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(198, 18, 0, 0),
    Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0),
);
/// Addresses of the smaller one, but for its first and last.
const SPARE_COUNT: u32 = (1 << 17) - 2;

/// Gives pods that say no address one of each family, so that a table can be written without them: of
/// networks that are set aside for measurements, 131,070 at most. Those of the host's network stay
/// without, as they have their node's.
pub fn give_addresses<'a>(objects: impl IntoIterator<Item = &'a mut Value>) {
    let mut taken = BTreeSet::new();
    let mut without = Vec::new();
    for object in objects.into_iter().filter(|o| o["kind"] == "Pod") {
        let said = addresses(object);
        let on_host = object["spec"]["hostNetwork"] == true;
        // What is of another type is for who reads the object to reject.
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

/// What a pod's status says, whatever it is.
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
    fn a_mistake_in_a_check_has_its_table_row_and_field() {
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
                "table 2: check 2: port: 70000 is none from 1 to 65535",
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
    fn pods_without_an_address_get_one_that_nobody_has() {
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
    fn a_mistake_outside_checks_has_its_table() {
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
    fn json_is_one_table_or_one_list_and_nothing_after_it() {
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
