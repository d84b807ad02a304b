// SPDX-License-Identifier: Apache-2.0
//! Starts the tasks of the controller, and stops them at a signal or when one of them ends.

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

use super::authority::{Lifetimes, unix};
use super::ca_store::{self, CaStore, Current, SECRET};
use super::caller::{Authenticator, ServiceAccount};
use super::lease::Candidate;
use super::metrics::Metrics;
use super::service::{CertificateService, Dependencies};
use super::status::StatusWriter;
use super::workloads::Workloads;
use super::{Error, tls};
use mesh_config::ControllerConfig;
use mesh_identity::TrustDomain;
use mesh_kube::connect;
use mesh_sys::limits;
use mesh_sys::signals::Termination;
use mesh_telemetry::http::{self, Listener, Probes};
use mesh_telemetry::readiness::{Readiness, ReadyTask};

const THREADS: usize = 2;
/// The time that releasing the lease may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the controller until a signal ends it.
///
/// # Errors
/// When the controller cannot start, or one of its tasks ends.
pub fn run(config: ControllerConfig) -> Result<(), Error> {
    limits::raise_open_files().map_err(cannot("raise the limit of open files"))?;
    limits::forbid_dumps().map_err(cannot("keep keys out of core dumps"))?;
    let runtime = runtime()?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(RELEASE_TIMEOUT);
    result
}

/// Requests a new root from the running controllers. Returns a message for the user.
///
/// # Errors
/// When the Kubernetes API cannot be reached or refuses the request.
pub fn rotate_root(config: &ControllerConfig) -> Result<String, Error> {
    runtime()?.block_on(async {
        let secrets: Api<Secret> = Api::namespaced(
            connect(config.kubeconfig.as_deref()).await?,
            &config.namespace,
        );
        let value = unix(now()).to_string();
        let patch = json!({"metadata": {"annotations": {ca_store::ROTATE_ROOT: value}}});
        let patched = secrets
            .patch(SECRET, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.map_err(|error| Error::Api {
            what: "request a new root",
            why: error.to_string(),
        })?;
        Ok(format!(
            "new root requested: it is published at once and signs after the controllers' \
             --root-overlap; to follow the rotation, run `kubectl -n {namespace} get secret {SECRET} -o yaml`",
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
        .map_err(cannot("build the runtime"))
}

fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Process { what, source }
}

async fn serve(config: ControllerConfig) -> Result<(), Error> {
    let mut termination = Termination::listen().map_err(cannot("listen for signals"))?;
    let trust_domain = TrustDomain::new(&config.trust_domain)
        .map_err(|_invalid| Error::TrustDomain(config.trust_domain.clone()))?;
    let client = connect(config.kubeconfig.as_deref()).await?;
    let metrics = Metrics::default();
    let (leads, leading) = watch::channel(false);
    let (ending, stop) = watch::channel(false);
    let mut tasks = JoinSet::new();

    // Every replica issues certificates; the leader writes the CA's Secret.
    let (ca_store, authority) = CaStore::new(&client, ca_settings(&config), metrics.clone());
    let (workloads, pods) = Workloads::watch(client.clone());
    let agents = ServiceAccount {
        namespace: &config.namespace,
        name: &config.agent_account,
    };
    let service = CertificateService::new(Dependencies {
        authority: authority.clone(),
        authenticator: Authenticator::new(client.clone(), agents, &config.audience),
        workloads: workloads.clone(),
        metrics: metrics.clone(),
        trust_domain,
        life: config.certificate_life,
        now,
    });
    let listener = bind(config.listen).await?;
    let tls = tls::config(authority.clone())?;
    let follower = leading.clone();
    tasks.spawn(async move {
        ca_store.run(follower).await;
        "the watch of the CA's Secret"
    });
    tasks.spawn(async move {
        pods.await;
        "the watch of pods"
    });
    tasks.spawn(async move {
        if let Err(error) = tls::serve(listener, tls, service).await {
            tracing::error!(%error, "certificate service failed");
        }
        "the certificate service"
    });

    // The leader writes status.
    let status = StatusWriter::watch(client.clone(), metrics.clone(), timestamp);
    let follower = leading.clone();
    tasks.spawn(async move {
        status.run(follower).await;
        "the status writer"
    });

    // Metrics and probes.
    let listener =
        Listener::tcp(config.metrics).map_err(cannot(format!("listen on {}", config.metrics)))?;
    let readiness = Readiness::new();
    let conditions = [
        readiness.task("pods are known"),
        readiness.task("the CA is known"),
    ];
    tasks.spawn(report_leadership(leading, metrics.clone()));
    tasks.spawn(become_ready(workloads, authority, conditions));
    let probes = Probes::new(move |format| metrics.page(format), readiness);
    let stopping = stop.clone();
    tasks.spawn(async move {
        http::serve(listener, probes, stopping).await;
        "the server of metrics and probes"
    });

    let candidate = Candidate::new(client, &config.namespace, &config.replica, config.lease);
    let lease = tokio::spawn(candidate.run(leads, stop, timestamp));
    let result = tokio::select! {
        signal = termination.next() => {
            tracing::info!(signal, "controller shutting down");
            Ok(())
        }
        ended = tasks.join_next() => Err(Error::Task(match ended {
            Some(Ok(task)) => task,
            Some(Err(_)) | None => "a task of the controller",
        })),
    };
    ending.send_replace(true);
    if tokio::time::timeout(RELEASE_TIMEOUT, lease).await.is_err() {
        tracing::warn!("lease not released in time; another replica leads once it expires");
    }
    result
}

/// Waits until certificates can be issued.
async fn become_ready(
    workloads: Workloads,
    mut authority: Current,
    [pods_known, ca_known]: [ReadyTask; 2],
) -> &'static str {
    workloads.known().await;
    pods_known.done();
    if authority.wait_for(Option::is_some).await.is_ok() {
        ca_known.done();
        tracing::info!("controller ready; issuing certificates");
    }
    std::future::pending().await
}

/// NodeReports leadership in the metrics.
async fn report_leadership(mut leading: watch::Receiver<bool>, metrics: Metrics) -> &'static str {
    loop {
        metrics.leader(*leading.borrow_and_update());
        if leading.changed().await.is_err() {
            // The sender lives until the controller shuts down.
            std::future::pending::<()>().await;
        }
    }
}

fn ca_settings(config: &ControllerConfig) -> ca_store::Settings {
    let service = format!("mesh-controller.{}", config.namespace);
    let mut names = vec![
        format!("{service}.svc"),
        format!("{service}.svc.cluster.local"),
        service,
    ];
    names.extend(config.serving_names.iter().cloned());
    ca_store::Settings {
        namespace: config.namespace.clone(),
        trust_domain: config.trust_domain.clone(),
        names,
        lifetimes: Lifetimes {
            leaf: config.certificate_life,
            overlap: config.root_overlap,
        },
        now,
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    let bound = match TcpListener::bind(address).await {
        // The host may have no IPv6.
        Err(_) if address.ip() == IpAddr::from([0_u16; 8]) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    bound.map_err(cannot(format!("listen on {address}")))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the clock is read here, and passed on"
)]
fn now() -> SystemTime {
    SystemTime::now()
}

fn timestamp() -> Timestamp {
    Timestamp::try_from(now()).unwrap_or_default()
}
