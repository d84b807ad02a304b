// SPDX-License-Identifier: Apache-2.0
//! The controller as a whole: its parts, and what ends it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::authority::{Times, unix};
use super::caller::Callers;
use super::keeper::{self, Keeper, SECRET};
use super::lease::Candidate;
use super::numbers::Numbers;
use super::service::{CertificateService, Desk};
use super::status::Folder;
use super::workloads::Workloads;
use super::{Error, probes, tls};
use mesh_config::ControllerConfig;
use mesh_identity::TrustDomain;
use mesh_kube::connect;
use mesh_sys::signals::Termination;

const THREADS: usize = 2;
/// How long the lease may take to be let go of.
const LAST_WRITE: Duration = Duration::from_secs(5);

/// Is the controller until a signal ends it.
///
/// # Errors
/// What could not be built, or which part failed.
pub fn run(config: ControllerConfig) -> Result<(), Error> {
    let runtime = runtime()?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(LAST_WRITE);
    result
}

/// Has the controllers replace the root of the CA; what was done, for people.
///
/// # Errors
/// The Kubernetes API cannot be reached or refuses.
pub fn rotate_root(config: &ControllerConfig) -> Result<String, Error> {
    runtime()?.block_on(async {
        let secrets: Api<Secret> = Api::namespaced(
            connect(config.kubeconfig.as_deref()).await?,
            &config.namespace,
        );
        let value = unix(now()).to_string();
        let patch = json!({"metadata": {"annotations": {keeper::ASKED: value}}});
        let patched = secrets
            .patch(SECRET, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.map_err(|error| Error::Api {
            what: "ask for a new root",
            why: error.to_string(),
        })?;
        Ok(format!(
            "asked for a new root: it is published at once and signs after the controllers' \
             --root-overlap; follow it by `kubectl -n {namespace} get secret {SECRET} -o yaml`",
            namespace = config.namespace
        ))
    })
}

fn runtime() -> Result<Runtime, Error> {
    Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("mesh-controller")
        .enable_all()
        .build()
        .map_err(tried("build the runtime"))
}

fn tried(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Process { what, source }
}

async fn serve(config: ControllerConfig) -> Result<(), Error> {
    let mut termination = Termination::listen().map_err(tried("listen for signals"))?;
    let trust_domain = TrustDomain::new(&config.trust_domain)
        .map_err(|_invalid| Error::TrustDomain(config.trust_domain.clone()))?;
    let client = connect(config.kubeconfig.as_deref()).await?;
    let numbers = Numbers::default();
    let (leads, leading) = watch::channel(false);
    let (ending, stop) = watch::channel(false);
    let mut parts = JoinSet::new();

    // The CA: kept by the leader, served by all.
    let (keeper, authority) = Keeper::new(&client, keeper_settings(&config), numbers.clone());
    let (workloads, pods) = Workloads::watch(client.clone());
    let agents = (config.namespace.as_str(), config.agent_account.as_str());
    let service = CertificateService::new(Desk {
        authority: authority.clone(),
        callers: Callers::new(client.clone(), agents, &config.audience),
        workloads: workloads.clone(),
        numbers: numbers.clone(),
        trust_domain,
        life: config.certificate_life,
        now,
    });
    let listener = bind(config.listen).await?;
    let tls = tls::config(authority.clone())?;
    let follower = leading.clone();
    parts.spawn(async move {
        keeper.run(follower).await;
        "the CA's keeper"
    });
    parts.spawn(async move {
        pods.await;
        "the watch of pods"
    });
    parts.spawn(async move {
        if let Err(error) = tls::serve(listener, tls, service).await {
            tracing::error!(%error, "certificates are not served any more");
        }
        "the certificate service"
    });

    // Status: the leader's.
    let folder = Folder::watch(client.clone(), numbers.clone(), timestamp);
    let follower = leading.clone();
    parts.spawn(async move {
        folder.run(follower).await;
        "the watch of policies"
    });

    // Probes.
    let (ready, is_ready) = watch::channel(false);
    let metrics = bind(config.metrics).await?;
    parts.spawn(show(leading.clone(), numbers.clone()));
    parts.spawn(async move {
        probes::serve(metrics, numbers, is_ready).await;
        "probes"
    });
    parts.spawn(async move {
        let mut authority = authority;
        workloads.known().await;
        if authority.wait_for(Option::is_some).await.is_ok() {
            ready.send_replace(true);
            tracing::info!("certificates are served");
        }
        std::future::pending::<()>().await;
        "readiness"
    });

    let candidate = Candidate::new(client, &config.namespace, &config.replica, config.lease);
    let lease = tokio::spawn(candidate.run(leads, stop, timestamp));
    let result = tokio::select! {
        signal = termination.next() => {
            tracing::info!(signal, "controller shutting down");
            Ok(())
        }
        part = parts.join_next() => Err(Error::Task(match part {
            Some(Ok(part)) => part,
            Some(Err(_)) | None => "a part of the controller",
        })),
    };
    ending.send_replace(true);
    if tokio::time::timeout(LAST_WRITE, lease).await.is_err() {
        tracing::warn!("the lease was not let go of in time");
    }
    result
}

/// Shows in the metrics who leads.
async fn show(mut leading: watch::Receiver<bool>, numbers: Numbers) -> &'static str {
    loop {
        numbers.leads(*leading.borrow_and_update());
        if leading.changed().await.is_err() {
            // The lease's task ends when the controller does.
            std::future::pending::<()>().await;
        }
    }
}

fn keeper_settings(config: &ControllerConfig) -> keeper::Settings {
    let service = format!("mesh-controller.{}", config.namespace);
    let mut names = vec![
        format!("{service}.svc"),
        format!("{service}.svc.cluster.local"),
        service,
    ];
    names.extend(config.serving_names.iter().cloned());
    keeper::Settings {
        namespace: config.namespace.clone(),
        trust_domain: config.trust_domain.clone(),
        names,
        times: Times {
            leaf: config.certificate_life,
            overlap: config.root_overlap,
        },
        now,
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    let bound = match TcpListener::bind(address).await {
        // A host without IPv6.
        Err(_) if address.ip() == IpAddr::from([0_u16; 8]) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    bound.map_err(tried(format!("listen on {address}")))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the outermost wiring is where the clock is read"
)]
fn now() -> SystemTime {
    SystemTime::now()
}

fn timestamp() -> Timestamp {
    Timestamp::try_from(now()).unwrap_or_default()
}
