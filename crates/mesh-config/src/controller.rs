// SPDX-License-Identifier: Apache-2.0
//! The configuration of `mesh-controller`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::flags::Values;
use super::{Error, LogConfig, Origin, Surroundings, kubeconfig, values};

/// The configuration of `mesh-controller`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerConfig {
    /// The kubeconfig file; `None` = the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the Lease, the Secret, the ConfigMap and the agents' service account.
    pub namespace: String,
    /// The holder identity of this replica.
    pub replica: String,
    /// The duration of the leader election Lease, from 2 s to 5 min.
    pub lease: Duration,
    /// The listening address of the certificate service.
    pub listen: SocketAddr,
    /// The listening address of metrics and probes.
    pub metrics: SocketAddr,
    /// The trust domain of SPIFFE identities.
    pub trust_domain: String,
    /// The service account of the agents.
    pub agent_account: String,
    /// The audience of the agents' tokens.
    pub audience: String,
    /// DNS names and IP addresses of the controller in addition to its Service's name.
    pub serving_names: Vec<String>,
    /// The longest lifetime of signed certificates.
    pub certificate_life: Duration,
    /// The time for which a new root is published before it signs certificates.
    pub root_overlap: Duration,
    /// The log configuration.
    pub log: LogConfig,
}

pub(super) fn parse(
    mut values: Values,
    around: &impl Surroundings,
    log: LogConfig,
) -> Result<Box<ControllerConfig>, Error> {
    let replica = match values.optional("replica", values::name)? {
        Some(name) => name,
        None => around
            .env("HOSTNAME")
            .filter(|name| !name.is_empty())
            .ok_or_else(|| Error::Value {
                origin: Origin::Default("replica"),
                value: String::new(),
                why: "HOSTNAME is not set; set a unique name with --replica".to_owned(),
            })?,
    };
    let between = |least: u64, most: u64| {
        move |text: &str| {
            let duration = values::duration(text)?;
            if (least..=most).contains(&duration.as_secs()) {
                Ok(duration)
            } else {
                Err(format!("must be between {least}s and {most}s"))
            }
        }
    };
    Ok(Box::new(ControllerConfig {
        kubeconfig: kubeconfig(&mut values, around)?,
        namespace: values.required("namespace", values::dns_name)?,
        replica,
        lease: values.required("lease", between(2, 300))?,
        listen: values.required("listen", values::socket_addr)?,
        metrics: values.required("metrics", values::socket_addr)?,
        trust_domain: values.required("trust-domain", values::dns_name)?,
        agent_account: values.required("agent-account", values::dns_name)?,
        audience: values.required("ca-audience", values::name)?,
        serving_names: values.list("serving-name", values::name)?,
        certificate_life: values.required("certificate-life", between(60, 24 * 3600))?,
        root_overlap: values.required("root-overlap", between(1, 30 * 24 * 3600))?,
        log,
    }))
}
