// SPDX-License-Identifier: Apache-2.0
//! Collects the values of settings from flags, environment and file as text. It does not parse them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{Error, Origin, Surroundings};

mod table;

pub use table::FLAGS;

/// One of the programs that read settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// `mesh-agent`.
    Agent,
    /// `mesh-controller`.
    Controller,
}

/// A subcommand of a program: its name and what it does.
type Subcommand = (&'static str, &'static str);

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Self::Agent => "mesh-agent",
            Self::Controller => "mesh-controller",
        }
    }

    const fn about(self) -> &'static str {
        match self {
            Self::Agent => "The node agent of the mesh",
            Self::Controller => "The controller of the mesh",
        }
    }

    const fn subcommands(self) -> &'static [Subcommand] {
        match self {
            Self::Agent => &[
                ("run", "Run the agent of a node"),
                (
                    "check",
                    "Test the features of this node and report missing ones with their effects",
                ),
                (
                    "cleanup",
                    "Remove all pins, links, rules and routes of the mesh from this node",
                ),
            ],
            Self::Controller => &[
                (
                    "run",
                    "Run the controller: the cluster's CA, and the status of policies",
                ),
                (
                    "rotate-root",
                    "Ask the controllers to replace the CA's root certificate, with an overlap",
                ),
                (
                    "uninstall",
                    "Stop all agents of the cluster and run cleanup on each node",
                ),
            ],
        }
    }

    /// Returns the settings of a subcommand.
    fn flags(self, subcommand: &str) -> impl Iterator<Item = &'static Flag> {
        FLAGS.iter().filter(move |flag| match (self, subcommand) {
            (Self::Agent, "run") => flag.applies != Applies::Controller,
            (Self::Agent, _) => flag.everywhere,
            (Self::Controller, _) => flag.applies != Applies::Agent,
        })
    }
}

/// The programs that a setting applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applies {
    /// The agent.
    Agent,
    /// The agent and the controller.
    Both,
    /// The controller.
    Controller,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// The flag without dashes, which is also the key in the file.
    pub name: &'static str,
    /// The format of the value.
    pub value: &'static str,
    /// The default; `None` = the setting is required, or `computed` describes its default.
    pub default: Option<&'static str>,
    /// A description of the default that is determined at run time.
    pub computed: Option<&'static str>,
    /// Whether the setting can be repeated (in the environment: separated by commas; in the file: an array).
    pub many: bool,
    /// Whether the setting applies to all subcommands of the agent, not only to `run`.
    pub everywhere: bool,
    /// The programs that the setting applies to.
    pub applies: Applies,
    /// The description.
    pub help: &'static str,
}

const fn flag(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag {
        name,
        value,
        default: None,
        computed: None,
        many: false,
        everywhere: false,
        applies: Applies::Agent,
        help,
    }
}

impl Flag {
    const fn or(self, default: &'static str) -> Self {
        Self {
            default: Some(default),
            ..self
        }
    }

    const fn or_computed(self, computed: &'static str) -> Self {
        Self {
            computed: Some(computed),
            ..self
        }
    }

    const fn many(self) -> Self {
        Self { many: true, ..self }
    }

    const fn everywhere(self) -> Self {
        Self {
            everywhere: true,
            ..self
        }
    }

    const fn applies(self, applies: Applies) -> Self {
        Self { applies, ..self }
    }
}

const CONFIG: &str = "config";

/// Returns the environment variable of a setting.
#[must_use]
pub(super) fn env_name(flag: &str) -> String {
    format!("MESH_{}", flag.to_uppercase().replace('-', "_"))
}

/// The values of all settings as text, with their origins.
#[derive(Debug)]
pub(super) struct Values(BTreeMap<&'static str, Vec<(Origin, String)>>);

impl Values {
    /// Returns the subcommand and the values of its settings. A flag overrides the environment, the environment
    /// overrides the file, and the file overrides the default.
    pub(super) fn gather(
        program: Program,
        args: impl IntoIterator<Item = OsString>,
        around: &impl Surroundings,
    ) -> Result<(String, Self), Error> {
        let matches = command_line(program).try_get_matches_from(args)?;
        let (name, matches) = matches.subcommand().expect("clap requires a subcommand");
        let env = |name: &str| around.env(name).filter(|value| !value.is_empty());
        let path = matches
            .get_one::<String>(CONFIG)
            .cloned()
            .or_else(|| env(&env_name(CONFIG)));
        let mut file = match path {
            Some(path) => read(Path::new(&path))?,
            None => BTreeMap::new(),
        };
        let mut all = BTreeMap::new();
        for flag in program.flags(name) {
            let from_file = file.remove(flag.name);
            let variable = env_name(flag.name);
            let given = if let Some(texts) = matches.get_many::<String>(flag.name) {
                let origin = Origin::Flag(flag.name);
                texts.map(|text| (origin.clone(), text.clone())).collect()
            } else if let Some(text) = env(&variable) {
                let parts = if flag.many { split(&text) } else { vec![text] };
                let origin = Origin::Env(variable);
                parts.into_iter().map(|t| (origin.clone(), t)).collect()
            } else if let Some(texts) = from_file {
                texts
            } else if let Some(text) = flag.default {
                vec![(Origin::Default(flag.name), text.to_owned())]
            } else {
                continue;
            };
            all.insert(flag.name, given);
        }
        Ok((name.to_owned(), Self(all)))
    }

    /// Parses a setting that can be repeated.
    pub(super) fn list<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, Error> {
        self.0
            .remove(name)
            .unwrap_or_default()
            .into_iter()
            .map(|(origin, value)| {
                parse(value.trim()).map_err(|why| Error::Value { origin, value, why })
            })
            .collect()
    }

    /// Parses an optional setting.
    pub(super) fn optional<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        Ok(self.list(name, parse)?.pop())
    }

    /// Parses a required setting.
    pub(super) fn required<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, Error> {
        self.optional(name, parse)?.ok_or_else(|| Error::Missing {
            name,
            help: FLAGS
                .iter()
                .find(|flag| flag.name == name)
                .map_or("", |flag| flag.help),
        })
    }

    /// Returns whether all settings were read.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn split(text: &str) -> Vec<String> {
    text.split(',').map(|part| part.trim().to_owned()).collect()
}

fn command_line(program: Program) -> clap::Command {
    let mut line = clap::Command::new(program.name())
        .about(program.about())
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true);
    for (name, about) in program.subcommands() {
        let config = clap::Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .help("A TOML file whose keys are the names of flags [env: MESH_CONFIG]");
        let mut command = clap::Command::new(*name)
            .about(*about)
            .args_override_self(true)
            .arg(config);
        for flag in program.flags(name) {
            let mut help = format!("{} [env: {}]", flag.help, env_name(flag.name));
            if let Some(default) = flag.default.or(flag.computed) {
                help.push_str(&format!(" [default: {default}]"));
            }
            command = command.arg(
                clap::Arg::new(flag.name)
                    .long(flag.name)
                    .value_name(flag.value)
                    .action(if flag.many {
                        clap::ArgAction::Append
                    } else {
                        clap::ArgAction::Set
                    })
                    .help(help),
            );
        }
        line = line.subcommand(command);
    }
    line
}

type FileValues = BTreeMap<String, Vec<(Origin, String)>>;

/// Reads the configuration file. It can contain any setting, so that one file serves all subcommands.
fn read(path: &Path) -> Result<FileValues, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    let table: toml::Table = text.parse().map_err(|source| Error::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let mut values = BTreeMap::new();
    for (key, value) in table {
        let Some(flag) = FLAGS.iter().find(|flag| flag.name == key) else {
            let known: Vec<_> = FLAGS.iter().map(|flag| flag.name).collect();
            return Err(Error::UnknownKey {
                path: path.to_owned(),
                key,
                known: known.join(", "),
            });
        };
        let origin = Origin::File(PathBuf::from(path), flag.name);
        let items = match value.as_array() {
            Some(items) if flag.many => items.clone(),
            Some(_) | None => vec![value],
        };
        let texts = items
            .into_iter()
            .map(|item| match scalar(&item) {
                Some(text) => Ok((origin.clone(), text)),
                None => Err(Error::Value {
                    origin: origin.clone(),
                    value: item.to_string(),
                    why: format!("expected {}", flag.value),
                }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        values.insert(key, texts);
    }
    Ok(values)
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(_)
        | toml::Value::Boolean(_)
        | toml::Value::Datetime(_)
        | toml::Value::Array(_)
        | toml::Value::Table(_) => None,
    }
}

/// Returns the reference of all settings as Markdown.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "<!-- Generated from crates/mesh-config/src/flags.rs; do not edit. -->\n\
         # Configuration\n\n\
         Every setting of `mesh-agent` and `mesh-controller` is a flag, an environment variable and a key\n\
         of the TOML file that `--config FILE` (`MESH_CONFIG`) names. A flag overrides the environment, and\n\
         the environment overrides the file. An unknown key in the file is an error. An empty variable counts\n\
         as not set. Lists are separated by commas in a variable, and are arrays in the file.\n\n\
         `mesh-agent run` accepts the settings of the agent; `mesh-agent check` and `mesh-agent cleanup` accept\n\
         those marked with *. All subcommands of `mesh-controller` accept the settings of the controller.\n\n\
         | Flag and key | Program | Variable | Value | Default | Description |\n\
         |---|---|---|---|---|---|\n",
    );
    for flag in FLAGS {
        let default = match (flag.default, flag.computed) {
            (Some(default), _) => format!("`{default}`"),
            (None, Some(computed)) => computed.to_owned(),
            (None, None) => "required".to_owned(),
        };
        let line = writeln!(
            text,
            "| `{}`{} | {} | `{}` | `{}` | {} | {} |",
            flag.name,
            if flag.everywhere { "*" } else { "" },
            match flag.applies {
                Applies::Agent => "agent",
                Applies::Both => "both",
                Applies::Controller => "controller",
            },
            env_name(flag.name),
            flag.value.replace('|', "\\|"),
            default,
            flag.help.replace('|', "\\|"),
        );
        line.expect("writing to a String does not fail");
    }
    text.push_str(
        "\nExit codes: 0 success; 1 failure; 2 usage error; 69 missing kernel feature; 70 internal error; 78 invalid configuration.\n",
    );
    text
}
