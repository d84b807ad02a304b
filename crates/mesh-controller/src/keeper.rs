// SPDX-License-Identifier: Apache-2.0
//! Keeps the CA in a Secret, and its roots in a ConfigMap for everybody.
//!
//! All replicas read the Secret; the leader alone writes, with the version that it read, so that no
//! step of the CA's life is taken twice. A Secret that is damaged is never overwritten: what was
//! good last goes on signing.

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

use super::authority::{Authority, Material, Pair, Times, unix};
use super::numbers::Numbers;
use mesh_log::warn_limited;

/// The Secret with everything of the CA.
pub(super) const SECRET: &str = "mesh-ca";
/// The ConfigMap with its roots.
pub(super) const CONFIG_MAP: &str = "mesh-ca-root";
/// The key of the roots.
const BUNDLE: &str = "ca.crt";
/// Asks for a new root; any value that was not there before.
pub(super) const ASKED: &str = "mesh.rs/rotate-root";
const FOLLOWED: &str = "mesh.rs/rotate-root-followed";
const PUBLISHED: &str = "mesh.rs/next-root-published";
const SWITCHED: &str = "mesh.rs/old-root-ended";
/// The field manager of what the controller writes.
pub(super) const MANAGER: &str = "mesh-controller";

/// How often it is looked whether something is due.
const TICK: Duration = Duration::from_secs(1);
/// How often the ConfigMap is looked at although nothing changed here.
const LOOK: Duration = Duration::from_secs(30);

/// What the keeper is told.
pub(super) struct Settings {
    pub(super) namespace: String,
    pub(super) trust_domain: String,
    /// Names of the controller, for its own certificate.
    pub(super) names: Vec<String>,
    pub(super) times: Times,
    pub(super) now: fn() -> SystemTime,
}

/// The CA that signs now; none until there is one.
pub(super) type Current = watch::Receiver<Option<Arc<Authority>>>;

pub(super) struct Keeper {
    settings: Settings,
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    numbers: Numbers,
    /// What the Secret said last, and could be used.
    material: Option<Material>,
    /// The Secret as it is; none = there is none.
    secret: Option<Secret>,
    authority: watch::Sender<Option<Arc<Authority>>>,
    /// The roots that the ConfigMap was seen to have, and when.
    published: Option<(String, Instant)>,
}

impl Keeper {
    pub(super) fn new(client: &Client, settings: Settings, numbers: Numbers) -> (Self, Current) {
        let (authority, current) = watch::channel(None);
        let keeper = Self {
            secrets: Api::namespaced(client.clone(), &settings.namespace),
            config_maps: Api::namespaced(client.clone(), &settings.namespace),
            settings,
            numbers,
            material: None,
            secret: None,
            authority,
            published: None,
        };
        (keeper, current)
    }

    /// Follows the Secret for ever, and writes while it leads.
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
                        warn_limited!("ca_secret", error, "the Secret of the CA cannot be watched");
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

    /// Takes what the Secret says, if it can be used.
    fn read(&mut self, secret: Option<Secret>) {
        self.secret = secret;
        let Some(secret) = &self.secret else { return };
        let material = material(secret);
        if self.material.as_ref() == Some(&material) {
            return;
        }
        // One that lacks its intermediate is completed by the leader first; what was good last
        // signs until then.
        if material.intermediate.certificate.is_empty() && !material.root.key.is_empty() {
            let kept = self.material.as_ref();
            if kept.is_none_or(|kept| kept.root == material.root) {
                self.material = Some(material);
            }
            return;
        }
        self.use_it(material);
    }

    fn use_it(&mut self, material: Material) {
        let now = (self.settings.now)();
        let made = Authority::new(&material, &self.settings.names, self.settings.times, now);
        match made {
            Ok(authority) => {
                let ends = |time| i64::try_from(unix(time)).unwrap_or(i64::MAX);
                self.numbers.authority(
                    authority.roots,
                    ends(authority.root_ends),
                    ends(authority.signer.ends()),
                );
                tracing::info!(roots = authority.roots, "the CA signs");
                self.authority.send_replace(Some(Arc::new(authority)));
                self.material = Some(material);
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    secret = SECRET,
                    "the Secret of the CA cannot be used; what was good last goes on signing"
                );
            }
        }
    }

    /// Makes the controller's own certificate anew when it is due.
    fn renew(&mut self) {
        let due = self
            .authority
            .borrow()
            .as_ref()
            .is_some_and(|authority| authority.renew <= (self.settings.now)());
        if due && let Some(material) = self.material.clone() {
            self.use_it(material);
        }
    }

    async fn lead(&mut self) {
        if let Err(error) = self.advance().await {
            warn_limited!("ca_advance", error, "the CA cannot take its next step");
        }
        if let Err(error) = self.publish().await {
            warn_limited!("ca_publish", error, "the roots cannot be published");
        }
    }

    /// Writes the CA's next state, if it is time for one.
    async fn advance(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let now = (self.settings.now)();
        let domain = &self.settings.trust_domain;
        let next = match (&self.secret, &self.material) {
            (None, None) => Some(Material::new(domain, now)?),
            // Somebody deleted it. A new root would cut every connection.
            (None, Some(material)) => Some(material.clone()),
            // One that is damaged, or that lacks what is being made now.
            (Some(secret), Some(kept)) if material(secret) != *kept => None,
            (Some(secret), Some(kept)) => {
                let asked = secret.metadata.annotations.as_ref();
                let asked = asked.and_then(|all| all.get(ASKED)).map(String::as_str);
                kept.next(asked, domain, self.settings.times, now)?
            }
            (Some(_), None) => None,
        };
        let Some(next) = next else { return Ok(()) };
        let secret = written(&next, self.secret.as_ref());
        let post = PostParams::default();
        let result = if self.secret.is_none() {
            self.secrets.create(&post, &secret).await
        } else {
            self.secrets.replace(SECRET, &post, &secret).await
        };
        match result {
            Ok(secret) => {
                tracing::info!("the CA took a step");
                self.read(Some(secret));
                Ok(())
            }
            // Another was faster; the watch brings what it wrote.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Has the ConfigMap hold all roots.
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
            .is_some_and(|(seen, when)| *seen == bundle && when.elapsed() < LOOK);
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

fn material(secret: &Secret) -> Material {
    let text = |key: &str| {
        let data = secret.data.as_ref().and_then(|data| data.get(key));
        data.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned())
            .unwrap_or_default()
    };
    let pair = |certificate: &str, key: &str| Pair {
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
        followed: annotation(FOLLOWED),
    }
}

/// The Secret with `material`; everything else of it as it was.
fn written(material: &Material, before: Option<&Secret>) -> Secret {
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
    let followed = &material.followed;
    annotate(FOLLOWED, (!followed.is_empty()).then(|| followed.clone()));
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
