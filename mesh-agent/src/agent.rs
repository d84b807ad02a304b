// SPDX-License-Identifier: Apache-2.0
//! Wires the agent: builds every component, in the order of the data flow, and gives each the handles
//! that it needs.
//!
//! The only module that knows all others, and, beside `config`, the only one that touches the process:
//! runtime, clock, limits.

mod cni_conflicts;
mod kernel;
mod report;
mod status_sync;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_plan::{ClusterSnapshot, Rejection};
use mesh_telemetry::flows::{self, Flows};
use mesh_telemetry::metrics::Metrics;
use mesh_telemetry::readiness::Readiness;
use mesh_telemetry::record::{self, Recorder};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::admin::{self, Admin};
use crate::control::{self, InForce};
use crate::host;
use crate::proxy::{self, ProxyHandle};
use crate::shutdown::{self, Successor};
use crate::source;
use mesh_config::{Config, Deny, TunnelPort};
use mesh_datapath::cni;
use mesh_datapath::pods::find::{ByAnnotation, ByCgroup, ByCri, Finder};
use mesh_datapath::{Datapath, Handles, datapath};
use mesh_identity::{Ca, Clock, GrpcCa, Identities, TrustDomain};
use mesh_log::Level;
use mesh_sys::route::Routing;
use mesh_sys::signals::Termination;
use mesh_sys::{limits, memory};

/// Threads of the control runtime: one for I/O, one for computation.
const CONTROL_THREADS: usize = 2;
/// Time after which the agent answers requests although its first plan is not in force.
const ANSWER_AFTER: Duration = Duration::from_secs(5);
/// Time limit for writing the last records.
const LAST_RECORDS: Duration = Duration::from_secs(2);

/// A failure that ends the agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source of the cluster's state.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The kernel.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// Certificates.
    #[error(transparent)]
    Identity(#[from] mesh_identity::Error),
    /// The trust domain.
    #[error("invalid trust domain {0:?}")]
    TrustDomain(String),
    /// The flow log.
    #[error(transparent)]
    Flows(#[from] flows::Error),
    /// The admin interface.
    #[error(transparent)]
    Admin(#[from] admin::Error),
    /// Threads, runtimes, signals.
    #[error("cannot {what}")]
    Process {
        /// The operation.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// A component ended unexpectedly.
    #[error("{0} ended unexpectedly; the kernel programs stay in force")]
    Component(&'static str),
}

impl Error {
    /// Returns the exit code of the process (sysexits.h): 1 failure, 69 a kernel feature is missing, 70
    /// internal error, 78 configuration error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Datapath(datapath::Error::Object(_) | datapath::Error::Program { .. }) => 69,
            Self::Datapath(datapath::Error::Missing(_)) | Self::Component(_) => 70,
            Self::TrustDomain(_) => 78,
            Self::Source(error) if error.is_configuration() => 78,
            Self::Source(_)
            | Self::Datapath(_)
            | Self::Identity(_)
            | Self::Flows(_)
            | Self::Admin(_)
            | Self::Process { .. } => 1,
        }
    }
}

/// Adds the operation to an error.
fn tried(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Process { what, source }
}

/// Runs the agent of a node until a signal.
///
/// # Errors
/// When a component cannot be built, or fails.
pub fn run(config: Config, level: Option<Level>) -> Result<(), Error> {
    limits::raise_open_files().map_err(tried("raise the limit of open files"))?;
    memory::configure_allocator();
    limits::forbid_dumps().map_err(tried("keep keys out of core dumps"))?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("mesh-control")
        .enable_all()
        .build()
        .map_err(tried("build the control runtime"))?;
    let result = runtime.block_on(serve(config, level));
    runtime.shutdown_timeout(LAST_RECORDS);
    result
}

async fn serve(config: Config, level: Option<Level>) -> Result<(), Error> {
    let mut requests = Termination::listen().map_err(tried("listen for signals"))?;
    let mut components = Components::build(&config).await?;
    components.report(&config).await?;
    components.answer(&config, level).await?;
    // Reading a whole cluster leaves holes in the heap.
    memory::trim_heap();
    let trimming = tokio::spawn(trim_heap_after_changes(components.snapshots.clone()));
    let successor = Successor::of(&config.admin);
    let result = components.until_the_end(&mut requests, &successor).await;
    let drain = match result {
        Ok(()) => config.drain,
        Err(_) => Duration::ZERO,
    };
    trimming.abort();
    components.finish(&mut requests, &successor, drain).await;
    result
}

/// The interval at which the heap is trimmed while the cluster changes.
const TRIM_HEAP: Duration = Duration::from_secs(5);

async fn trim_heap_after_changes(mut snapshots: watch::Receiver<Arc<ClusterSnapshot>>) {
    while snapshots.changed().await.is_ok() {
        sleep(TRIM_HEAP).await;
        memory::trim_heap();
    }
}

/// The running components, and the channels that stop them.
struct Components {
    metrics: Metrics,
    readiness: Readiness,
    snapshots: watch::Receiver<Arc<ClusterSnapshot>>,
    in_force: watch::Receiver<Arc<InForce>>,
    rejections: watch::Receiver<Arc<Vec<Rejection>>>,
    source: watch::Receiver<Arc<source::Report>>,
    cni_conflicts: watch::Receiver<Arc<cni::CniConflicts>>,
    datapath: Handles,
    flow_log: Flows,
    identities: Identities,
    proxy: ProxyHandle,
    /// Closes when `control` ends.
    control: oneshot::Receiver<()>,
    /// Tasks that end when they are told to.
    tasks: Vec<JoinHandle<()>>,
    /// Tasks of the MeshNode report, which are aborted at the end.
    reporting: Vec<JoinHandle<()>>,
    reopening: JoinHandle<io::Result<()>>,
    /// Stops writing to the kernel: this agent ends, or there is a successor.
    stop_writing: watch::Sender<bool>,
    /// Stops answering requests: this agent ends, or there is a successor.
    stop_serving: watch::Sender<bool>,
    /// Stops the remaining tasks: this agent ends.
    stop_all: watch::Sender<bool>,
}

impl Components {
    /// Builds every component, in the order of the data flow.
    async fn build(config: &Config) -> Result<Self, Error> {
        let metrics = Metrics::new();
        let readiness = metrics.readiness().clone();
        let conditions = status_sync::Conditions {
            applied: readiness.task("plan in force"),
            certified: readiness.task("certificates"),
            readiness: readiness.clone(),
        };
        let (stop_all, mut stop) = watch::channel(false);
        let (stop_serving, replaced) = watch::channel(false);
        let (stop_writing, writes_end) = watch::channel(false);

        // The snapshots of the cluster, and the kernel's state.
        let source = source::watch(source_settings(config)).await?;
        let (kernel, events) = Datapath::load(&datapath_config(config))?;
        let handles = kernel.handles();
        metrics.set_kernel(kernel::Counters(handles.clone()));
        let (publisher, in_force) = control::channel();

        // Identities and records.
        let trust_domain = trust_domain(&config.trust_domain)?;
        let issuer = identity_config(config, &trust_domain)?;
        let wanted = status_sync::identities(in_force.clone(), trust_domain);
        let identities = Identities::start(issuer, wanted).await?;
        let flow_log = Flows::start(&flow_log_target(&config.flow_log), &metrics)?;
        let policy = in_force.clone();
        let policy = move || policy.borrow().policy();
        let (counted, sink) = (metrics.clone(), flow_log.sink());
        let recorder = Recorder::new(&config.node, policy, counted, sink, now);
        // Records have no names before the first plan; a predecessor reads the events until then.
        let named = status_sync::first_plan(in_force.clone(), ANSWER_AFTER);
        let (close_reporter, close_reasons) = record::close_reasons();
        let records = (recorder.clone(), close_reasons);
        let events = tokio::spawn(async move {
            tokio::select! {
                () = named => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
            flows::drain(kernel::Events(events), records, replaced, stop).await;
        });

        // Connections. The proxy starts before the first pod is attached.
        let dependencies = proxy::Dependencies {
            in_force: in_force.clone(),
            identities: identities.clone(),
            recorder,
        };
        let proxy = proxy::start(proxy_config(config), dependencies, handles.clone())
            .map_err(tried("start the workers"))?;

        // From here on the node follows the snapshots.
        let settings = control::Settings {
            node: config.node.clone(),
            silent: config.deny == Deny::Drop,
            close_reporter,
            own_addresses: control::own_addresses::read,
        };
        let snapshots = source.cluster.clone();
        let report = source.report.clone();
        let finder = finder(config).map_err(tried("start the thread that asks the runtime"))?;
        let kernel = (kernel, finder);
        let control = start_control(settings, kernel, source, publisher, writes_end)?;
        let source = report.clone();
        let cni_conflicts = watch_cni_conflicts(config, &in_force);
        let rejections = status_sync::start(&in_force, report, &identities, &metrics, conditions);
        Ok(Self {
            reopening: tokio::spawn(flows::reopen_on_hangup(flow_log.sink())),
            metrics,
            readiness,
            snapshots,
            in_force,
            rejections,
            source,
            cni_conflicts,
            datapath: handles,
            flow_log,
            identities,
            proxy,
            control,
            tasks: vec![events],
            reporting: Vec::new(),
            stop_writing,
            stop_serving,
            stop_all,
        })
    }

    /// Starts to report this node in its MeshNode.
    async fn report(&mut self, config: &Config) -> Result<(), Error> {
        if config.source != mesh_config::Source::Kubernetes {
            return Ok(());
        }
        let writer = source::status::Writer {
            client: mesh_kube::connect(config.kubeconfig.as_deref())
                .await
                .map_err(source::Error::from)?,
            node: config.node.clone(),
            now,
        };
        let sources = report::Sources {
            node: config.node.clone(),
            in_force: self.in_force.clone(),
            source: self.source.clone(),
            host: host(&config.host),
            replaced: self.stop_writing.subscribe(),
            now,
        };
        let (to, reports) = watch::channel(None);
        self.reporting = vec![
            tokio::spawn(report::run(sources, to)),
            tokio::spawn(writer.run(reports)),
        ];
        Ok(())
    }

    /// Starts to answer requests, once the first plan was tried.
    async fn answer(&mut self, config: &Config, level: Option<Level>) -> Result<(), Error> {
        tokio::select! {
            () = status_sync::first_plan(self.in_force.clone(), ANSWER_AFTER) => {}
            _ = &mut self.control => return Err(Error::Component("control")),
        }
        let answers = admin::Views {
            node: config.node.clone(),
            metrics: self.metrics.clone(),
            snapshots: self.snapshots.clone(),
            in_force: self.in_force.clone(),
            plan_text: mesh_plan::text::render,
            rejections: self.rejections.clone(),
            source: self.source.clone(),
            cni_conflicts: self.cni_conflicts.clone(),
            datapath: Some(self.datapath.clone()),
            flows: self.flow_log.sink(),
            level,
        };
        let admin = Admin::bind([config.metrics, config.probes], &config.admin, answers)?;
        tracing::info!(node = config.node, metrics = %admin.metrics_addr(), "serving");
        self.tasks
            .push(tokio::spawn(admin.serve(self.stop_serving.subscribe())));
        Ok(())
    }

    /// Waits for a signal, or for a component that ends unexpectedly.
    async fn until_the_end(
        &mut self,
        requests: &mut Termination,
        successor: &Successor,
    ) -> Result<(), Error> {
        let replaced = async {
            successor.comes().await;
            tracing::info!("successor detected; handing over");
            self.stop_writing.send_replace(true);
            // Both listen on the port of probes: a probe is to reach the successor.
            self.stop_serving.send_replace(true);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            signal = requests.next() => {
                tracing::info!(signal, "shutting down");
                Ok(())
            }
            () = self.proxy.failed() => Err(Error::Component("a worker")),
            _ = &mut self.control => Err(Error::Component("control")),
            () = replaced => Ok(()),
        }
    }

    /// Stops in order: readiness, open connections, records.
    async fn finish(self, requests: &mut Termination, successor: &Successor, drain: Duration) {
        self.readiness.set("not shutting down", false);
        self.stop_writing.send_replace(true);
        tokio::select! {
            () = shutdown::drain(self.proxy, successor, drain) => {}
            signal = requests.next() => tracing::warn!(signal, "second signal; shutting down at once"),
        }
        self.stop_serving.send_replace(true);
        self.stop_all.send_replace(true);
        self.reopening.abort();
        self.reporting.iter().for_each(JoinHandle::abort);
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "task failed during shutdown");
            }
        }
        drop(self.identities);
        self.flow_log.finish(LAST_RECORDS);
    }
}

fn source_settings(config: &Config) -> source::Settings {
    source::Settings {
        source: config.source.clone(),
        state_dir: config.host.state_dir.clone(),
        pod_cidrs: config.pod_cidrs.clone(),
        kubeconfig: config.kubeconfig.clone(),
    }
}

/// Detects conflicts of the node's CNI plugin with the mesh.
fn watch_cni_conflicts(
    config: &Config,
    in_force: &watch::Receiver<Arc<InForce>>,
) -> watch::Receiver<Arc<cni::CniConflicts>> {
    let links = Routing::open().and_then(|mut routing| routing.links());
    let links: Vec<String> = links
        .unwrap_or_default()
        .into_iter()
        .map(|link| link.name)
        .collect();
    let found = cni_conflicts::Found {
        cni: cni::find(&config.host.cni_conf, &links),
        balancers: cni::balancers(&config.host.cgroup).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot detect whether another program balances services at the sockets");
            Vec::new()
        }),
    };
    let port = match config.tunnel_port {
        TunnelPort::Fixed(port) => Some(port),
        // The plugin enforces its policies on the ports that it sees.
        TunnelPort::Real => None,
    };
    let (to, conflicts) = watch::channel(Arc::default());
    tokio::spawn(cni_conflicts::run(found, port, in_force.clone(), to));
    conflicts
}

fn finder(config: &Config) -> io::Result<Finder> {
    Ok(match config.source {
        mesh_config::Source::Dir(_) => Finder::Annotation(ByAnnotation),
        mesh_config::Source::Kubernetes => {
            let socket = config.cri_socket.as_ref();
            let runtime = socket.map(|socket| ByCri::new(&config.proc, socket));
            Finder::Kubelet(ByCgroup::new(&config.proc), runtime.transpose()?)
        }
    })
}

fn datapath_config(config: &Config) -> datapath::Config {
    datapath::Config {
        bpffs: config.host.bpffs.clone(),
        cgroup: config.host.cgroup.clone(),
        trace: config.trace_datapath,
    }
}

/// Starts `control` on a thread of its own: it enters namespaces and makes long series of system calls.
/// The receiver closes when `control` ends for any reason.
fn start_control(
    settings: control::Settings,
    (kernel, finder): (Datapath, Finder),
    source: source::Watched,
    publisher: control::Publisher,
    mut stop: watch::Receiver<bool>,
) -> Result<oneshot::Receiver<()>, Error> {
    let runtime = current_thread().map_err(tried("build control's runtime"))?;
    let (ended, end) = oneshot::channel::<()>();
    std::thread::Builder::new()
        .name("mesh-plan".to_owned())
        .spawn(move || {
            let _ended = ended;
            let source::Watched {
                cluster,
                mut complete,
                ..
            } = source;
            let run = async {
                // The pinned state stays in force until then.
                tokio::select! {
                    _ = complete.wait_for(|complete| *complete) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
                control::run(settings, kernel, finder, cluster, publisher, stop).await
            };
            if let Err(error) = runtime.block_on(run) {
                tracing::error!(%error, "control failed");
            }
        })
        .map_err(tried("start control's thread"))?;
    Ok(end)
}

fn current_thread() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn flow_log_target(target: &mesh_config::FlowLog) -> flows::Target {
    match target {
        mesh_config::FlowLog::Stdout => flows::Target::Stdout,
        mesh_config::FlowLog::Off => flows::Target::Off,
        mesh_config::FlowLog::File(path) => flows::Target::File(path.clone()),
    }
}

fn trust_domain(name: &str) -> Result<TrustDomain, Error> {
    TrustDomain::new(name).map_err(|_invalid| Error::TrustDomain(name.to_owned()))
}

fn identity_config(
    config: &Config,
    trust_domain: &TrustDomain,
) -> Result<mesh_identity::Config, Error> {
    let aliases = config.trust_domain_aliases.iter();
    let aliases = aliases
        .map(|name| self::trust_domain(name))
        .collect::<Result<_, _>>()?;
    let ca = match &config.ca {
        mesh_config::Ca::SelfSigned(path) => Ca::SelfSigned(path.clone()),
        mesh_config::Ca::Files(path) => Ca::Files(path.clone()),
        mesh_config::Ca::Grpc(ca) => Ca::Grpc(GrpcCa {
            url: ca.url.clone(),
            token: Some(ca.token.clone()),
            bundle: ca.bundle.clone(),
            cluster: ca.cluster.clone(),
        }),
    };
    Ok(mesh_identity::Config {
        ca,
        alpn: mesh_tunnel::ALPN,
        trust_domain: trust_domain.clone(),
        aliases,
        crls: config.crls.clone(),
        clock: Clock::new(now),
        seed: seed(&config.node),
    })
}

/// Spreads renewals over the nodes: the FNV-1a hash of the node's name.
fn seed(node: &str) -> u64 {
    node.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn proxy_config(config: &Config) -> proxy::Config {
    proxy::Config {
        real_ports: config.tunnel_port == TunnelPort::Real,
        ..proxy::Config::new(config.workers)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the outermost wiring is where the clock is read"
)]
fn now() -> SystemTime {
    SystemTime::now()
}
