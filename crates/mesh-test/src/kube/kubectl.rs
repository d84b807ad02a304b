// SPDX-License-Identifier: Apache-2.0
//! Requests to the API server by kubectl, as a user makes them, without a client library.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::programs::Programs;
use super::{Kube, REQUEST};
use crate::process::{Cmd, Output};
use crate::wait::eventually;

/// The object that a service account token is bound to. The token is valid only while the object
/// exists, and contains the name of the node, or of the node to which the pod is assigned.
#[derive(Clone, Copy, Debug)]
pub enum Bound<'a> {
    /// A pod of the same namespace.
    Pod(&'a str),
    /// A node.
    Node(&'a str),
}

impl Kube {
    /// Returns a kubectl command with these arguments, as the administrator.
    ///
    /// # Errors
    /// The kubectl program cannot be found or built.
    pub fn kubectl_cmd<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Cmd> {
        self.kubectl_as(self.kubeconfig(), args)
    }

    /// Returns a kubectl command with these arguments and this kubeconfig.
    ///
    /// # Errors
    /// The kubectl program cannot be found or built.
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

    /// Runs kubectl as the administrator and returns its standard output.
    ///
    /// # Errors
    /// kubectl failed; the error contains its output.
    pub fn kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.run(self.kubectl_cmd(args)?)
    }

    /// Runs kubectl as the administrator and returns its output and status, also if it failed.
    ///
    /// # Errors
    /// kubectl cannot be run or times out.
    pub fn try_kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        self.host().run(self.kubectl_cmd(args)?, REQUEST)
    }

    fn run(&self, cmd: Cmd) -> Result<String> {
        Ok(self.host().run(cmd, REQUEST)?.ok()?.text())
    }

    /// Waits until the API server serves the kinds of all existing CustomResourceDefinitions.
    ///
    /// # Errors
    /// A kind is not served within 30 s.
    pub fn crds_established(&self) -> Result<()> {
        let wait = ["wait", "--for=condition=Established", "--timeout=30s"];
        self.kubectl(wait.into_iter().chain(["crd", "--all"]))
            .map(drop)
    }

    /// Runs `kubectl get ARGS` and returns its JSON output.
    ///
    /// # Errors
    /// The object does not exist.
    pub fn get<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let get = self.kubectl_cmd(["get", "--output=json"])?.args(args);
        Ok(serde_json::from_str(&self.run(get)?)?)
    }

    /// Creates or updates objects (YAML or JSON documents) by server-side apply.
    ///
    /// # Errors
    /// The API server rejects an object; the others are applied.
    pub fn apply_text(&self, manifests: &str) -> Result<String> {
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.run(self.kubectl_cmd(apply)?.input(manifests))
    }

    /// Applies the status of one object and ignores its other fields.
    ///
    /// # Errors
    /// The object does not exist, or the API server rejects the status.
    pub fn apply_status(&self, manifest: &str) -> Result<String> {
        let apply = ["apply", "--server-side", "--force-conflicts"];
        let apply = self.kubectl_cmd(apply)?;
        self.run(
            apply
                .args(["--subresource=status", "-f", "-"])
                .input(manifest),
        )
    }

    /// Creates a namespace with these labels and waits for its default service account, which it
    /// creates itself if no controller does.
    ///
    /// # Errors
    /// The API server rejects the request.
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

    /// Creates a service account unless it exists.
    ///
    /// # Errors
    /// The API server rejects the request.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<()> {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "namespace": namespace, "name": name },
        });
        self.apply_text(&account.to_string()).map(drop)
    }

    /// Requests a token of a service account (TokenRequest) that is valid for one hour, for
    /// `audience` or, without one, for the API server.
    ///
    /// # Errors
    /// The account or the object to bind the token to does not exist.
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

    /// Runs `kubectl auth can-i VERB RESOURCE ...` and returns whether the user is allowed.
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

    /// Runs `kubectl get ARGS` until `enough` accepts its output, and returns that output.
    ///
    /// # Errors
    /// `enough` accepts no output within `deadline`; the error contains the last one.
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
