// SPDX-License-Identifier: Apache-2.0
//! What tests do at the API server, by kubectl: as a user would, and without a client of our own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::programs::Programs;
use super::{Kube, REQUEST};
use crate::process::{Cmd, Output};
use crate::wait::eventually;

/// What a service account's token is bound to: it dies with that object, and carries the name of
/// the node, for a pod the one that it is assigned to.
#[derive(Clone, Copy, Debug)]
pub enum Bound<'a> {
    /// A pod of the same namespace.
    Pod(&'a str),
    /// A node.
    Node(&'a str),
}

impl Kube {
    /// A kubectl with these arguments, as the administrator.
    ///
    /// # Errors
    /// kubectl cannot be had.
    pub fn kubectl_cmd<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Cmd> {
        self.kubectl_as(self.kubeconfig(), args)
    }

    /// A kubectl with these arguments, as whoever the kubeconfig is for.
    ///
    /// # Errors
    /// kubectl cannot be had.
    pub fn kubectl_as<'a>(
        &self,
        kubeconfig: &Path,
        args: impl IntoIterator<Item = &'a str>,
    ) -> Result<Cmd> {
        let kubectl = Programs::find()?.command("kubectl");
        Ok(kubectl
            .env("KUBECONFIG", kubeconfig)
            .env("HOME", self.host().dir())
            .args(args))
    }

    /// Runs kubectl as the administrator; what it printed.
    ///
    /// # Errors
    /// It failed; the error carries what it said.
    pub fn kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.run(self.kubectl_cmd(args)?)
    }

    /// Runs kubectl as the administrator, whatever comes of it.
    ///
    /// # Errors
    /// It cannot be run, or hangs.
    pub fn try_kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        self.host().run(self.kubectl_cmd(args)?, REQUEST)
    }

    fn run(&self, cmd: Cmd) -> Result<String> {
        Ok(self.host().run(cmd, REQUEST)?.ok()?.text())
    }

    /// Waits until the API server serves the kind of every CustomResourceDefinition that is there.
    ///
    /// # Errors
    /// It does not within 30 s.
    pub fn crds_established(&self) -> Result<()> {
        let wait = ["wait", "--for=condition=Established", "--timeout=30s"];
        self.kubectl(wait.into_iter().chain(["crd", "--all"]))
            .map(drop)
    }

    /// `kubectl get ARGS`, as JSON.
    ///
    /// # Errors
    /// There is no such object.
    pub fn get<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let get = self.kubectl_cmd(["get", "--output=json"])?.args(args);
        Ok(serde_json::from_str(&self.run(get)?)?)
    }

    /// Applies manifests (YAML or JSON documents), server side; what is there already is changed.
    ///
    /// # Errors
    /// The API server refuses one; the others are applied.
    pub fn apply_text(&self, manifests: &str) -> Result<String> {
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.run(self.kubectl_cmd(apply)?.input(manifests))
    }

    /// Applies the status of one object; nothing else of it is taken.
    ///
    /// # Errors
    /// There is no such object, or the API server refuses it.
    pub fn apply_status(&self, manifest: &str) -> Result<String> {
        let apply = ["apply", "--server-side", "--force-conflicts"];
        let apply = self.kubectl_cmd(apply)?;
        self.run(
            apply
                .args(["--subresource=status", "-f", "-"])
                .input(manifest),
        )
    }

    /// Makes a namespace with these labels and waits for its default service account, which it
    /// makes itself where no controller does.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: serde_json::Map<_, _> = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect();
        let space = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": name, "labels": labels },
        });
        self.apply_text(&space.to_string())?;
        self.service_account(name, "default")
    }

    /// Makes a service account, if there is none of that name.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<()> {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "namespace": namespace, "name": name },
        });
        self.apply_text(&account.to_string()).map(drop)
    }

    /// A token of a service account (TokenRequest), for an hour: for `audience`, else for the API
    /// server.
    ///
    /// # Errors
    /// There is no such account, or nothing to bind the token to.
    pub fn token(
        &self,
        (namespace, account): (&str, &str),
        audience: Option<&str>,
        bound: Option<Bound<'_>>,
    ) -> Result<String> {
        let mut create = self.kubectl_cmd(["create", "token", account, "-n", namespace])?;
        if let Some(audience) = audience {
            create = create.args(["--audience", audience]);
        }
        if let Some(bound) = bound {
            let (kind, name) = match bound {
                Bound::Pod(name) => ("Pod", name),
                Bound::Node(name) => ("Node", name),
            };
            create = create.args(["--bound-object-kind", kind, "--bound-object-name", name]);
        }
        Ok(self.run(create)?.trim().to_owned())
    }

    /// Whether the user may do that: `kubectl auth can-i VERB RESOURCE ...`.
    ///
    /// # Errors
    /// kubectl gives no answer.
    pub fn can_i<'a>(&self, user: &str, what: impl IntoIterator<Item = &'a str>) -> Result<bool> {
        let ask = self
            .kubectl_cmd(["auth", "can-i", "--as", user])?
            .args(what);
        let output = self.host().run(ask, REQUEST)?;
        match output.text().trim() {
            "yes" => Ok(true),
            no if no.starts_with("no") => Ok(false),
            _ => anyhow::bail!("{output}"),
        }
    }

    /// Waits until `kubectl get ARGS` gives what `enough` accepts, and gives that.
    ///
    /// # Errors
    /// It never does; the error carries the last answer.
    pub fn until(
        &self,
        deadline: Duration,
        args: &[&str],
        enough: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = String::new();
        let found = eventually(&format!("kubectl get {}", args.join(" ")), deadline, || {
            match self.get(args.iter().copied()) {
                Ok(value) if enough(&value) => return Some(value),
                Ok(value) => last = value.to_string(),
                Err(e) => last = format!("{e:#}"),
            }
            None
        });
        found.with_context(|| format!("the last answer was {last}"))
    }
}
