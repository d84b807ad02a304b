// SPDX-License-Identifier: Apache-2.0
//! The Helm chart and the kustomize base, both made from `deploy/base`.
//!
//! A file there is a manifest as it is applied by default. `VALUE # value group.name` at the end of
//! a line makes a value of the chart of it, with the comment lines that begin with `##` as its
//! documentation; `# if group.name` and `# end` around an object make it depend on one. So the two
//! ways to install cannot drift apart, and every default is where it is used.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

use crate::run;

/// The directory of the sources.
const BASE: &str = "deploy/base";
/// The namespace that base names, and that a release of the chart replaces by its own.
const NAMESPACE: &str = "mesh-system";
/// The uninstallation: a hook of the chart, and a separate directory for kustomize.
const UNINSTALL: &str = "uninstall.yaml";
/// The kind that is not the mesh's own: for kustomize in a directory of its own, so that neither
/// installing nor uninstalling touches what others have of it. Helm leaves CRDs alone by itself.
const SHARED: &str = "clusternetworkpolicies.yaml";
const NOTE: &str = "Generated from deploy/base; do not edit.";

/// A value of the chart.
#[derive(Debug, PartialEq)]
struct Value {
    default: String,
    doc: String,
}

/// By dotted path.
type Values = BTreeMap<String, Value>;

/// Every generated file below `deploy`: path and text.
pub(crate) fn files() -> Result<Vec<(String, String)>> {
    let mut values = Values::new();
    let mut made = Vec::new();
    let mut plain = Vec::new();
    for (name, text) in read(BASE)? {
        let (template, manifest) = convert(&text, &mut values).with_context(|| name.clone())?;
        let template = if name == UNINSTALL {
            hook(&template)
        } else {
            template
        };
        made.push((
            format!("deploy/helm/templates/{name}"),
            format!("{{{{- /* {NOTE} */}}}}\n{template}"),
        ));
        let manifest = format!("# {NOTE}\n{manifest}");
        if name == UNINSTALL {
            made.push((format!("deploy/kustomize/uninstall/{name}"), manifest));
        } else if manifest.lines().any(|line| line.starts_with("kind:")) {
            made.push((format!("deploy/kustomize/{name}"), manifest));
            plain.push(name);
        }
    }
    for (name, text) in read("deploy/crds")? {
        made.push((format!("deploy/helm/crds/{name}"), text.clone()));
        if name == SHARED {
            made.push((format!("deploy/kustomize/policy-api/{name}"), text));
        } else {
            made.push((format!("deploy/kustomize/crds/{name}"), text));
            plain.push(format!("crds/{name}"));
        }
    }
    made.push(("deploy/helm/Chart.yaml".to_owned(), chart()));
    made.push(("deploy/helm/values.yaml".to_owned(), values_yaml(&values)?));
    made.push((
        "deploy/helm/values.schema.json".to_owned(),
        schema(&values)?,
    ));
    plain.insert(0, "namespace.yaml".to_owned());
    made.push((
        "deploy/kustomize/namespace.yaml".to_owned(),
        format!(
            "# {NOTE}\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n  labels:\n    \
             # The agents need the node's network and processes, and capabilities.\n    \
             pod-security.kubernetes.io/enforce: privileged\n"
        ),
    ));
    made.push((
        "deploy/kustomize/kustomization.yaml".to_owned(),
        kustomization(&plain),
    ));
    made.push((
        "deploy/kustomize/uninstall/kustomization.yaml".to_owned(),
        kustomization(&[UNINSTALL.to_owned()]),
    ));
    made.push((
        "deploy/kustomize/policy-api/kustomization.yaml".to_owned(),
        kustomization(&[SHARED.to_owned()]),
    ));
    Ok(made)
}

/// The YAML files of a directory by name.
fn read(dir: &str) -> Result<Vec<(String, String)>> {
    let path = run::root().join(dir);
    let mut files = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| format!("cannot read {dir}"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if Path::new(&name)
            .extension()
            .is_some_and(|end| end == "yaml")
        {
            files.push((name, fs::read_to_string(entry.path())?));
        }
    }
    files.sort();
    Ok(files)
}

/// The template of the chart and the plain manifest that a file of base stands for.
fn convert(text: &str, values: &mut Values) -> Result<(String, String)> {
    let (mut template, mut plain) = (String::new(), String::new());
    let mut doc = Vec::new();
    let mut left_out = false;
    for line in text.lines() {
        if let Some(words) = line.trim_start().strip_prefix("## ") {
            doc.push(words.to_owned());
            continue;
        }
        if let Some(path) = line.strip_prefix("# if ") {
            let default = "false".to_owned();
            note(values, path, default, &std::mem::take(&mut doc))?;
            writeln!(template, "{{{{- if .Values.{path} }}}}")?;
            left_out = true;
            continue;
        }
        if line == "# end" {
            writeln!(template, "{{{{- end }}}}")?;
            left_out = false;
            continue;
        }
        let shown = match line.rsplit_once(" # value ") {
            Some((setting, path)) => {
                let (key, default) = setting.split_once(": ").context("a value has a key")?;
                note(values, path, default.to_owned(), &std::mem::take(&mut doc))?;
                writeln!(template, "{key}: {{{{ toJson .Values.{path} }}}}")?;
                setting
            }
            None => {
                let own = line.replace(NAMESPACE, "{{ .Release.Namespace }}");
                writeln!(template, "{own}")?;
                line
            }
        };
        if !left_out {
            writeln!(plain, "{shown}")?;
        }
    }
    Ok((template, plain))
}

/// Remembers a value. The first use documents it, and all have the same default.
fn note(values: &mut Values, path: &str, default: String, doc: &[String]) -> Result<()> {
    ensure!(
        path.matches('.').count() <= 1,
        "{path}: values have at most two levels"
    );
    let doc = doc.join(" ");
    match values.get_mut(path) {
        Some(known) => {
            ensure!(known.default == default, "{path} has two defaults");
            if known.doc.is_empty() {
                known.doc = doc;
            }
        }
        None => {
            values.insert(path.to_owned(), Value { default, doc });
        }
    }
    Ok(())
}

/// Makes hooks of objects: they are there while the release is being deleted, and only then. The
/// job comes last, and everything else of the hook goes when it has succeeded.
fn hook(template: &str) -> String {
    let mut made = String::new();
    for object in template.split("---\n") {
        let weight = if object.contains("kind: Job") { 1 } else { 0 };
        let annotations = format!(
            "metadata:\n  annotations:\n    helm.sh/hook: pre-delete\n    \
             helm.sh/hook-weight: \"{weight}\"\n    \
             helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded\n"
        );
        if !made.is_empty() {
            made.push_str("---\n");
        }
        made.push_str(&object.replacen("metadata:\n", &annotations, 1));
    }
    made
}

fn chart() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "# {NOTE}\napiVersion: v2\nname: mesh\ntype: application\n\
         description: A service mesh without sidecars\nversion: {version}\n\
         appVersion: \"{version}\"\nkubeVersion: \">=1.33.0-0\"\n"
    )
}

fn values_yaml(values: &Values) -> Result<String> {
    let mut text = format!("# {NOTE}\n# Values of the chart, with their defaults.\n");
    let parts = |path: &str| match path.split_once('.') {
        Some((group, name)) => (group.to_owned(), name.to_owned()),
        None => (String::new(), path.to_owned()),
    };
    let rows: BTreeMap<_, _> = values
        .iter()
        .map(|(path, value)| (parts(path), value))
        .collect();
    let mut current = String::new();
    for ((group, name), value) in rows {
        ensure!(
            !value.doc.is_empty(),
            "{group}.{name} is not documented by a `##` line"
        );
        if group != current {
            writeln!(text, "{group}:")?;
            current.clone_from(&group);
        }
        let indent = if group.is_empty() { "" } else { "  " };
        writeln!(text, "{indent}# {}", value.doc)?;
        writeln!(text, "{indent}{name}: {}", value.default)?;
    }
    Ok(text)
}

/// JSON Schema of the values: a wrong name or type fails before anything is applied.
fn schema(values: &Values) -> Result<String> {
    let object = |properties: serde_json::Map<String, serde_json::Value>| {
        serde_json::json!({
            "type": "object", "additionalProperties": false, "properties": properties,
        })
    };
    let mut groups: BTreeMap<&str, serde_json::Map<_, _>> = BTreeMap::new();
    let mut top = serde_json::Map::new();
    for (path, value) in values {
        let kind = kind_of(&value.default);
        let property = serde_json::json!({ "type": kind, "description": value.doc });
        match path.split_once('.') {
            Some((group, name)) => {
                let group = groups.entry(group).or_default();
                group.insert(name.to_owned(), property);
            }
            None => {
                top.insert(path.clone(), property);
            }
        }
    }
    for (name, properties) in groups {
        if top.contains_key(name) {
            bail!("{name} is a value and a group");
        }
        top.insert(name.to_owned(), object(properties));
    }
    // What Helm itself puts among the values.
    top.insert("global".to_owned(), serde_json::json!({ "type": "object" }));
    let mut schema = object(top);
    schema["$schema"] = "https://json-schema.org/draft-07/schema#".into();
    Ok(serde_json::to_string_pretty(&schema)? + "\n")
}

fn kind_of(default: &str) -> &'static str {
    match default.chars().next() {
        Some('{') => "object",
        Some('[') => "array",
        _ if default == "true" || default == "false" => "boolean",
        _ if default.parse::<i64>().is_ok() => "integer",
        _ => "string",
    }
}

fn kustomization(files: &[String]) -> String {
    let mut text = format!(
        "# {NOTE}\napiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n"
    );
    for file in files {
        text.push_str("  - ");
        text.push_str(file);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chart_value_carries_its_documentation() {
        let mut values = Values::new();
        let base = "metadata:\n  namespace: mesh-system\nspec:\n  ## How many.\n  replicas: 2 # value a.replicas\n";
        let (template, plain) = convert(base, &mut values).expect("it is well formed");
        assert_eq!(
            template,
            "metadata:\n  namespace: {{ .Release.Namespace }}\nspec:\n  replicas: {{ toJson .Values.a.replicas }}\n"
        );
        assert_eq!(
            plain,
            "metadata:\n  namespace: mesh-system\nspec:\n  replicas: 2\n"
        );
        assert_eq!(values["a.replicas"].doc, "How many.");
        let other = convert("  n: 3 # value a.replicas\n", &mut values);
        assert!(other.is_err(), "two defaults");
    }

    #[test]
    fn conditional_object_is_left_out_of_plain_manifests() {
        let mut values = Values::new();
        let base = "## Whether.\n# if m.enabled\nkind: A\n# end\n";
        let (template, plain) = convert(base, &mut values).expect("it is well formed");
        assert_eq!(
            template,
            "{{- if .Values.m.enabled }}\nkind: A\n{{- end }}\n"
        );
        assert_eq!(plain, "");
        assert_eq!(values["m.enabled"].default, "false");
    }
}
