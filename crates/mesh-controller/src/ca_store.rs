// SPDX-License-Identifier: Apache-2.0
//! Storage of the CA in a Secret, and of its roots in a public ConfigMap.
//!
//! All replicas read the Secret. Only the leader writes it, on top of the version that it has read, so
//! that no step of a rotation happens twice. An invalid Secret is never overwritten: the last valid CA
//! continues to sign.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, interval};
use zeroize::Zeroizing;

use super::authority::{Authority, CertificateAndKey, Lifetimes, Material, unix};
use super::metrics::Metrics;
use mesh_log::warn_limited;

/// The Secret with the keys and certificates of the CA.
pub(super) const SECRET: &str = "mesh-ca";
/// The ConfigMap with the roots.
pub(super) const CONFIG_MAP: &str = "mesh-ca-root";
/// The key of the roots in the ConfigMap.
const BUNDLE: &str = "ca.crt";
/// The annotation that requests a new root: each new value is one request.
pub(super) const ROTATE_ROOT: &str = "mesh.rs/rotate-root";
/// The annotation with the request that was carried out last.
const LAST_REQUEST: &str = "mesh.rs/rotate-root-followed";
/// The annotation with the time at which the next root was published.
const PUBLISHED: &str = "mesh.rs/next-root-published";
/// The annotation with the time at which the old root ceased to sign.
const SWITCHED: &str = "mesh.rs/old-root-ended";
/// The field manager of the controller's writes.
pub(super) const MANAGER: &str = "mesh-controller";

/// Interval of checks for due steps.
const TICK: Duration = Duration::from_secs(1);
/// Interval of checks of the ConfigMap while the roots do not change.
const CONFIG_MAP_CHECK: Duration = Duration::from_secs(30);

/// Settings of the CA.
pub(super) struct Settings {
    pub(super) namespace: String,
    pub(super) trust_domain: String,
    /// Names in the controller's serving certificate.
    pub(super) names: Vec<String>,
    pub(super) lifetimes: Lifetimes,
    pub(super) now: fn() -> SystemTime,
}

/// The CA that signs; `None` until one is known.
pub(super) type Current = watch::Receiver<Option<Arc<Authority>>>;

/// Follows the CA's Secret; the leader also writes it.
pub(super) struct CaStore {
    settings: Settings,
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    metrics: Metrics,
    /// The last valid state in the Secret.
    material: Option<Material>,
    /// The Secret as it is; `None` = it does not exist.
    secret: Option<Secret>,
    authority: watch::Sender<Option<Arc<Authority>>>,
    /// The roots that the ConfigMap has, and when that was checked.
    published: Option<(String, Instant)>,
}

impl CaStore {
    pub(super) fn new(client: &Client, settings: Settings, metrics: Metrics) -> (Self, Current) {
        let (authority, current) = watch::channel(None);
        let store = Self {
            secrets: Api::namespaced(client.clone(), &settings.namespace),
            config_maps: Api::namespaced(client.clone(), &settings.namespace),
            settings,
            metrics,
            material: None,
            secret: None,
            authority,
            published: None,
        };
        (store, current)
    }

    /// Follows the Secret until the watch ends, and writes it while this replica leads.
    pub(super) async fn run(mut self, leads: watch::Receiver<bool>) {
        let mut secrets = watcher::watch_object(self.secrets.clone(), SECRET)
            .default_backoff()
            .boxed();
        let mut ticks = interval(TICK);
        let mut known = false;
        loop {
            tokio::select! {
                event = secrets.next() => match event {
                    Some(Ok(secret)) => {
                        known = true;
                        self.read(secret);
                    }
                    Some(Err(error)) => {
                        warn_limited!("ca_secret", error, "cannot watch the CA's Secret");
                    }
                    None => return,
                },
                _ = ticks.tick() => {}
            }
            self.renew();
            if known && *leads.borrow() {
                self.lead().await;
            }
        }
    }

    /// Takes over the state in the Secret if it is valid.
    fn read(&mut self, secret: Option<Secret>) {
        self.secret = secret;
        let Some(secret) = &self.secret else { return };
        let material = material(secret);
        if self.material.as_ref() == Some(&material) {
            return;
        }
        // The leader first adds a missing intermediate; the last valid CA signs until then.
        if material.intermediate.certificate.is_empty() && !material.root.key.is_empty() {
            let kept = self.material.as_ref();
            if kept.is_none_or(|kept| kept.root == material.root) {
                self.material = Some(material);
            }
            return;
        }
        self.activate(material);
    }

    /// Signs with a state of the CA from now on, if it is valid.
    fn activate(&mut self, material: Material) {
        let now = (self.settings.now)();
        let authority = Authority::new(
            &material,
            &self.settings.names,
            self.settings.lifetimes,
            now,
        );
        match authority {
            Ok(authority) => {
                let expiry = |time| i64::try_from(unix(time)).unwrap_or(i64::MAX);
                self.metrics.authority(
                    authority.roots,
                    expiry(authority.root_not_after),
                    expiry(authority.signer.not_after()),
                );
                tracing::info!(roots = authority.roots, "CA loaded");
                self.authority.send_replace(Some(Arc::new(authority)));
                self.material = Some(material);
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    secret = SECRET,
                    "invalid CA Secret; the last valid CA continues to sign"
                );
            }
        }
    }

    /// Renews the controller's serving certificate when it is due.
    fn renew(&mut self) {
        let due = self
            .authority
            .borrow()
            .as_ref()
            .is_some_and(|authority| authority.renew <= (self.settings.now)());
        if due && let Some(material) = self.material.clone() {
            self.activate(material);
        }
    }

    /// Does the leader's part: rotation and publication.
    async fn lead(&mut self) {
        if let Err(error) = self.advance().await {
            warn_limited!("ca_advance", error, "cannot update the CA's Secret");
        }
        if let Err(error) = self.publish().await {
            warn_limited!(
                "ca_publish",
                error,
                "cannot publish the roots in the ConfigMap"
            );
        }
    }

    /// Writes the CA's next state if a step is due.
    async fn advance(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let now = (self.settings.now)();
        let domain = &self.settings.trust_domain;
        let next = match (&self.secret, &self.material) {
            (None, None) => Some(Material::new(domain, now)?),
            // The Secret was deleted. A new root would break every connection.
            (None, Some(material)) => Some(material.clone()),
            // The Secret is invalid, or has changes that are not loaded yet.
            (Some(secret), Some(kept)) if material(secret) != *kept => None,
            (Some(secret), Some(kept)) => {
                let request = secret.metadata.annotations.as_ref();
                let request = request
                    .and_then(|all| all.get(ROTATE_ROOT))
                    .map(String::as_str);
                kept.next(request, domain, self.settings.lifetimes, now)?
            }
            (Some(_), None) => None,
        };
        let Some(next) = next else { return Ok(()) };
        let secret = secret_with(&next, self.secret.as_ref());
        let post = PostParams::default();
        let result = if self.secret.is_none() {
            self.secrets.create(&post, &secret).await
        } else {
            self.secrets.replace(SECRET, &post, &secret).await
        };
        match result {
            Ok(secret) => {
                tracing::info!("CA Secret updated");
                self.read(Some(secret));
                Ok(())
            }
            // Another writer was faster; the watch returns its version.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes all roots to the ConfigMap.
    async fn publish(&mut self) -> kube::Result<()> {
        let Some(bundle) = self
            .authority
            .borrow()
            .as_ref()
            .map(|authority| authority.bundle.clone())
        else {
            return Ok(());
        };
        let fresh = self
            .published
            .as_ref()
            .is_some_and(|(seen, when)| *seen == bundle && when.elapsed() < CONFIG_MAP_CHECK);
        if fresh {
            return Ok(());
        }
        let there = self.config_maps.get_opt(CONFIG_MAP).await?;
        let holds = there
            .and_then(|map| map.data)
            .and_then(|mut data| data.remove(BUNDLE));
        if holds.as_ref() != Some(&bundle) {
            let map = json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": CONFIG_MAP},
                "data": {BUNDLE: bundle},
            });
            let params = PatchParams::apply(MANAGER).force();
            self.config_maps
                .patch(CONFIG_MAP, &params, &Patch::Apply(map))
                .await?;
        }
        self.published = Some((bundle, Instant::now()));
        Ok(())
    }
}

/// Reads the state of the CA from the Secret.
fn material(secret: &Secret) -> Material {
    let text = |key: &str| {
        let data = secret.data.as_ref().and_then(|data| data.get(key));
        data.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned())
            .unwrap_or_default()
    };
    let pair = |certificate: &str, key: &str| CertificateAndKey {
        certificate: text(certificate),
        key: Zeroizing::new(text(key)),
    };
    let annotation = |name: &str| {
        let all = secret.metadata.annotations.as_ref();
        all.and_then(|all| all.get(name))
            .cloned()
            .unwrap_or_default()
    };
    let time = |name: &str| annotation(name).parse().unwrap_or(0);
    let next = pair("next-root.crt", "next-root.key");
    let old = text("old-roots.crt");
    Material {
        root: pair("root.crt", "root.key"),
        intermediate: pair("intermediate.crt", "intermediate.key"),
        next: (!next.certificate.is_empty()).then(|| (next, time(PUBLISHED))),
        old: (!old.is_empty()).then(|| (old, time(SWITCHED))),
        last_request: annotation(LAST_REQUEST),
    }
}

/// Returns the Secret with `material`; its other contents stay.
fn secret_with(material: &Material, before: Option<&Secret>) -> Secret {
    let mut secret = before.cloned().unwrap_or_else(|| Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.to_owned()),
            ..ObjectMeta::default()
        },
        ..Secret::default()
    });
    let annotations = secret.metadata.annotations.get_or_insert_default();
    let mut annotate = |name: &str, value: Option<String>| match value {
        Some(value) => annotations.insert(name.to_owned(), value),
        None => annotations.remove(name),
    };
    let last_request = &material.last_request;
    annotate(
        LAST_REQUEST,
        (!last_request.is_empty()).then(|| last_request.clone()),
    );
    annotate(
        PUBLISHED,
        material.next.as_ref().map(|(_, since)| since.to_string()),
    );
    annotate(
        SWITCHED,
        material.old.as_ref().map(|(_, since)| since.to_string()),
    );
    let next = material.next.as_ref().map(|(pair, _)| pair);
    let old = material.old.as_ref().map(|(roots, _)| roots.as_str());
    let parts = [
        ("root.crt", Some(material.root.certificate.as_str())),
        ("root.key", Some(material.root.key.as_str())),
        (
            "intermediate.crt",
            Some(material.intermediate.certificate.as_str()),
        ),
        ("intermediate.key", Some(material.intermediate.key.as_str())),
        ("next-root.crt", next.map(|pair| pair.certificate.as_str())),
        ("next-root.key", next.map(|pair| pair.key.as_str())),
        ("old-roots.crt", old),
    ];
    let data: &mut BTreeMap<_, _> = secret.data.get_or_insert_default();
    for (key, value) in parts {
        match value.filter(|value| !value.is_empty()) {
            Some(value) => data.insert(key.to_owned(), ByteString(value.as_bytes().to_vec())),
            None => data.remove(key),
        };
    }
    secret
}
