// SPDX-License-Identifier: Apache-2.0
//! What a setting is, and how their texts are gathered from flags, environment and file.
//! It does not know what a value means.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{Error, Origin, Surroundings};

mod table;

pub use table::FLAGS;

/// What the program can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcommand {
    /// `run`.
    Run,
    /// `check`.
    Check,
    /// `cleanup`.
    Cleanup,
    /// `controller`.
    Controller,
    /// `rotate-root`.
    RotateRoot,
    /// `uninstall`.
    Uninstall,
}

impl Subcommand {
    const ALL: [(Self, &'static str, &'static str); 6] = [
        (Self::Run, "run", "Be the agent of a node"),
        (
            Self::Check,
            "check",
            "Probe the kernel, and say what is missing and what that means",
        ),
        (
            Self::Cleanup,
            "cleanup",
            "Remove every pin, link, rule and route of the mesh (for uninstalling)",
        ),
        (
            Self::Controller,
            "controller",
            "Be the cluster's CA, and fold what nodes report into the status of policies",
        ),
        (
            Self::RotateRoot,
            "rotate-root",
            "Have the controllers replace the root of the CA, with overlap",
        ),
        (
            Self::Uninstall,
            "uninstall",
            "End all agents of the cluster, and run cleanup on every node",
        ),
    ];
}

/// Whether the controller takes a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It does not.
    No,
    /// As the agent does.
    Too,
    /// The agent does not.
    Only,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// The flag without dashes, and the key of the file.
    pub name: &'static str,
    /// How its value looks.
    pub value: &'static str,
    /// What holds if nothing is said; `None` = it must be said, or `computed` tells.
    pub default: Option<&'static str>,
    /// How the default is found on the machine, for settings without a fixed one.
    pub computed: Option<&'static str>,
    /// May be given several times (in the environment: separated by commas; in the file: a list).
    pub many: bool,
    /// For every subcommand, not only for `run`.
    pub everywhere: bool,
    /// Whether the controller takes it.
    pub controller: Taken,
    /// What it is.
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
        controller: Taken::No,
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

    const fn controller(self, controller: Taken) -> Self {
        Self { controller, ..self }
    }
}

const CONFIG: &str = "config";

/// The variable of a setting.
#[must_use]
pub(super) fn env_name(flag: &str) -> String {
    format!("MESH_{}", flag.to_uppercase().replace('-', "_"))
}

/// The texts that were given, each with where it came from.
#[derive(Debug)]
pub(super) struct Values(BTreeMap<&'static str, Vec<(Origin, String)>>);

impl Values {
    /// Takes the texts of all settings of the subcommand: flag before environment before file
    /// before default.
    pub(super) fn gather(
        args: impl IntoIterator<Item = OsString>,
        around: &impl Surroundings,
    ) -> Result<(Subcommand, Self), Error> {
        let matches = command_line().try_get_matches_from(args)?;
        let (name, matches) = matches
            .subcommand()
            .expect("clap refuses a command line without a subcommand");
        let (subcommand, ..) = Subcommand::ALL
            .into_iter()
            .find(|(_, known, _)| *known == name)
            .expect("clap knows only the subcommands of the table");
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
        for flag in flags_of(subcommand) {
            let from_file = file.remove(flag.name);
            let name = env_name(flag.name);
            let given = if let Some(texts) = matches.get_many::<String>(flag.name) {
                let origin = Origin::Flag(flag.name);
                texts.map(|text| (origin.clone(), text.clone())).collect()
            } else if let Some(text) = env(&name) {
                let parts = if flag.many { split(&text) } else { vec![text] };
                let origin = Origin::Env(name);
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
        Ok((subcommand, Self(all)))
    }

    /// Parses a setting that may be given several times.
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

    /// Parses a setting that may be absent.
    pub(super) fn optional<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        Ok(self.list(name, parse)?.pop())
    }

    /// Parses a setting that must be there.
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

    /// Whether every setting was read.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn split(text: &str) -> Vec<String> {
    text.split(',').map(|part| part.trim().to_owned()).collect()
}

fn flags_of(subcommand: Subcommand) -> impl Iterator<Item = &'static Flag> {
    FLAGS.iter().filter(move |flag| match subcommand {
        Subcommand::Run => flag.controller != Taken::Only,
        Subcommand::Check | Subcommand::Cleanup => flag.everywhere,
        Subcommand::Controller | Subcommand::RotateRoot | Subcommand::Uninstall => {
            flag.controller != Taken::No
        }
    })
}

fn command_line() -> clap::Command {
    let mut program = clap::Command::new("mesh-agent")
        .about("The node agent of the mesh")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true);
    for (subcommand, name, about) in Subcommand::ALL {
        let config = clap::Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .help("A TOML file whose keys are the flags' names [env: MESH_CONFIG]");
        let mut command = clap::Command::new(name)
            .about(about)
            .args_override_self(true)
            .arg(config);
        for flag in flags_of(subcommand) {
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
        program = program.subcommand(command);
    }
    program
}

type FileValues = BTreeMap<String, Vec<(Origin, String)>>;

/// Reads the file. It may hold any setting: one file serves every subcommand.
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

/// The reference of all settings, as Markdown.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "<!-- Generated from mesh-agent/src/config/flags.rs; do not edit. -->\n\
         # Configuration of the agent\n\n\
         Every setting is a flag, a variable of the environment and a key of the TOML file that\n\
         `--config FILE` (`MESH_CONFIG`) names. The flag wins, then the environment, then the file. An\n\
         unknown key of the file is an error; an empty variable counts as not set.\n\
         Lists are separated by commas in a variable, and are arrays in the file.\n\n\
         `run` takes all of them but the last ones, which are the controller's; `check` and `cleanup`\n\
         take those marked with *, `controller` and `rotate-root` those marked with +.\n\n\
         | Flag and key | Variable | Value | Default | What it is |\n\
         |---|---|---|---|---|\n",
    );
    for flag in FLAGS {
        let default = match (flag.default, flag.computed) {
            (Some(default), _) => format!("`{default}`"),
            (None, Some(computed)) => computed.to_owned(),
            (None, None) => "must be given".to_owned(),
        };
        let line = writeln!(
            text,
            "| `{}`{}{} | `{}` | `{}` | {} | {} |",
            flag.name,
            if flag.everywhere { "*" } else { "" },
            if flag.controller == Taken::No {
                ""
            } else {
                "+"
            },
            env_name(flag.name),
            flag.value.replace('|', "\\|"),
            default,
            flag.help.replace('|', "\\|"),
        );
        line.expect("a String takes everything");
    }
    text.push_str(
        "\nExit codes: 0; 1 failed; 2 usage; 69 the kernel lacks something; 70 internal; 78 configuration.\n",
    );
    text
}
