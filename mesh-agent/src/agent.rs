// SPDX-License-Identifier: Apache-2.0
//! The agent as data flow: every room is built here, in the order in which things flow, and given
//! exactly the doors it needs.
//!
//! Knows all rooms and decides nothing. The one place, beside `config`, that touches the process:
//! runtime, clock, limits.

mod mirror;
mod neighbour;
mod report;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_plan::{Cluster, Rejection};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::admin::{self, Admin, Readiness};
use crate::flows::{self, Flows};
use crate::metrics::Metrics;
use crate::proxy::{self, ProxyHandle};
use crate::record::{self, Recorder};
use crate::shutdown::{self, Successor};
use crate::source;
use crate::{control, host};
use mesh_config::{Config, Deny, TunnelPort};
use mesh_datapath::cni;
use mesh_datapath::datapath::{self, Datapath, Handles};
use mesh_datapath::pods::find::{ByAnnotation, ByCgroup, ByCri, Finder};
use mesh_identity::{Ca, Clock, GrpcCa, Identities, TrustDomain};
use mesh_log::Level;
use mesh_sys::route::Routing;
use mesh_sys::signals::Termination;
use mesh_sys::{limits, memory};

/// Threads of the control runtime: one for what answers, one for what computes.
const CONTROL_THREADS: usize = 2;
/// An agent that cannot put its first plan in force answers nevertheless after this time.
const ANSWER_AFTER: Duration = Duration::from_secs(5);
/// How long the last records may take to be written.
const LAST_RECORDS: Duration = Duration::from_secs(2);

/// Why the agent ended, or never ran.
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
    #[error("{0:?} is no trust domain")]
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
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A room ended although nobody wanted it to.
    #[error("{0} ended; what the kernel enforces goes on")]
    Room(&'static str),
}

impl Error {
    /// What the process exits with (sysexits.h): 1 failed, 69 a feature of the kernel is missing,
    /// 70 internal, 78 configuration.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Datapath(datapath::Error::Object(_) | datapath::Error::Program { .. }) => 69,
            Self::Datapath(datapath::Error::Missing(_)) | Self::Room(_) => 70,
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

/// Names what was tried, for an error.
fn tried(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Process { what, source }
}

/// Is the agent of a node until a signal ends it.
///
/// # Errors
/// What could not be built, or which room failed.
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
    let mut rooms = Rooms::build(&config).await?;
    rooms.report(&config).await?;
    rooms.answer(&config, level).await?;
    // Reading a whole cluster leaves holes in the heap.
    memory::trim_heap();
    let trimming = tokio::spawn(trim_heap_after_changes(rooms.facts.clone()));
    let successor = Successor::of(&config.admin);
    let result = rooms.until_the_end(&mut requests, &successor).await;
    let drain = match result {
        Ok(()) => config.drain,
        Err(_) => Duration::ZERO,
    };
    trimming.abort();
    rooms.finish(&mut requests, &successor, drain).await;
    result
}

/// The interval at which the heap is trimmed while the cluster changes.
const TRIM_HEAP: Duration = Duration::from_secs(5);

async fn trim_heap_after_changes(mut facts: watch::Receiver<Arc<Cluster>>) {
    while facts.changed().await.is_ok() {
        sleep(TRIM_HEAP).await;
        memory::trim_heap();
    }
}

/// The rooms that run, and what ends them.
struct Rooms {
    metrics: Metrics,
    readiness: Readiness,
    facts: watch::Receiver<Arc<Cluster>>,
    views: control::Views,
    rejections: watch::Receiver<Arc<Vec<Rejection>>>,
    source: watch::Receiver<Arc<source::Report>>,
    neighbour: watch::Receiver<Arc<cni::Neighbour>>,
    datapath: Handles,
    flow_log: Flows,
    identities: Identities,
    proxy: ProxyHandle,
    /// Ends when `control` does.
    control: oneshot::Receiver<()>,
    /// Those that end when they are told to, and those that never do.
    tasks: Vec<JoinHandle<()>>,
    /// They end with the agent.
    reporting: Vec<JoinHandle<()>>,
    endless: JoinHandle<io::Result<()>>,
    /// One agent writes to the kernel: this one stops when it ends, or when a successor is there.
    quiet: watch::Sender<bool>,
    /// No questions are answered any more: a successor does, or the agent ends.
    silent: watch::Sender<bool>,
    /// The agent ends.
    ending: watch::Sender<bool>,
}

impl Rooms {
    /// Builds every room, in the order of the data's flow.
    async fn build(config: &Config) -> Result<Self, Error> {
        let metrics = Metrics::new();
        let readiness = Readiness::new(metrics.clone());
        let conditions = mirror::Conditions {
            in_force: readiness.task("plan in force"),
            certified: readiness.task("certificates"),
            readiness: readiness.clone(),
        };
        let (ending, mut stop) = watch::channel(false);
        let (silent, replaced) = watch::channel(false);
        let (quiet, writes_end) = watch::channel(false);

        // Facts, and what the kernel holds.
        let facts = source::watch(source_settings(config)).await?;
        let (kernel, events) = Datapath::load(&datapath_config(config))?;
        let handles = kernel.handles();
        metrics.set_kernel(handles.clone());
        let (outputs, views) = control::outputs();

        // Who the pods are, and what is written about them.
        let trust_domain = trust_domain(&config.trust_domain)?;
        let issuer = identity_config(config, &trust_domain)?;
        let identities = Identities::start(issuer, views.wanted.clone()).await?;
        let flow_log = Flows::start(&config.flow_log, &metrics)?;
        let (plan, sink) = (views.plan.clone(), flow_log.sink());
        let recorder = Recorder::new(&config.node, plan, metrics.clone(), sink, now);
        // Before there is a plan, ends have no names; a predecessor reads on until then.
        let named = mirror::first_plan(views.status.clone(), ANSWER_AFTER);
        let (ended, endings) = record::endings();
        let records = (recorder.clone(), endings);
        let events = tokio::spawn(async move {
            tokio::select! {
                () = named => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
            flows::drain(events, records, replaced, stop).await;
        });

        // Connections. The proxy is there before the first pod is.
        let dependencies = proxy::Dependencies {
            pods: views.pods.clone(),
            plan: views.plan.clone(),
            identities: identities.clone(),
            recorder,
        };
        let proxy = proxy::start(proxy_config(config), dependencies, handles.clone())
            .map_err(tried("start the workers"))?;

        // From here on the node becomes what the facts say.
        let settings = control::Settings {
            node: config.node.clone(),
            trust_domain,
            silent: config.deny == Deny::Drop,
            ended,
            own_addresses: control::own_addresses::read,
        };
        let known = facts.cluster.clone();
        let report = facts.report.clone();
        let finder = finder(config).map_err(tried("start the thread that asks the runtime"))?;
        let kernel = (kernel, finder);
        let control = start_control(settings, kernel, facts, outputs, writes_end)?;
        let source = report.clone();
        let neighbour = watch_neighbour(config, &views);
        let rejections = mirror::start(&views, report, &identities, &metrics, conditions);
        Ok(Self {
            endless: tokio::spawn(flows::reopen_on_hangup(flow_log.sink())),
            metrics,
            readiness,
            facts: known,
            views,
            rejections,
            source,
            neighbour,
            datapath: handles,
            flow_log,
            identities,
            proxy,
            control,
            tasks: vec![events],
            reporting: Vec::new(),
            quiet,
            silent,
            ending,
        })
    }

    /// Writes what this node reports to where others read it.
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
            status: self.views.status.clone(),
            source: self.source.clone(),
            host: host(&config.host),
            quiet: self.quiet.subscribe(),
            now,
        };
        let (to, reports) = watch::channel(None);
        self.reporting = vec![
            tokio::spawn(report::run(sources, to)),
            tokio::spawn(writer.run(reports)),
        ];
        Ok(())
    }

    /// Opens the doors for questions, once there is something to say.
    async fn answer(&mut self, config: &Config, level: Option<Level>) -> Result<(), Error> {
        tokio::select! {
            () = mirror::first_plan(self.views.status.clone(), ANSWER_AFTER) => {}
            _ = &mut self.control => return Err(Error::Room("control")),
        }
        let answers = admin::Views {
            node: config.node.clone(),
            metrics: self.metrics.clone(),
            readiness: self.readiness.clone(),
            facts: self.facts.clone(),
            plan: self.views.plan.clone(),
            plan_text: mesh_plan::text::render,
            rejections: self.rejections.clone(),
            pods: self.views.pods.clone(),
            status: self.views.status.clone(),
            source: self.source.clone(),
            neighbour: self.neighbour.clone(),
            datapath: Some(self.datapath.clone()),
            flows: self.flow_log.sink(),
            level,
        };
        let admin = Admin::bind(config.metrics, &config.admin, answers)?;
        tracing::info!(node = config.node, metrics = %admin.metrics_addr(), "serving");
        self.tasks
            .push(tokio::spawn(admin.serve(self.silent.subscribe())));
        Ok(())
    }

    /// Waits for a signal, or for a room that ends although nobody wanted it to.
    async fn until_the_end(
        &mut self,
        requests: &mut Termination,
        successor: &Successor,
    ) -> Result<(), Error> {
        let replaced = async {
            successor.comes().await;
            tracing::info!("a successor is there; it decides from now on");
            self.quiet.send_replace(true);
            // Both have the port of probes: who asks is to get the successor.
            self.silent.send_replace(true);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            signal = requests.next() => {
                tracing::info!(signal, "ending");
                Ok(())
            }
            () = self.proxy.failed() => Err(Error::Room("a worker")),
            _ = &mut self.control => Err(Error::Room("control")),
            () = replaced => Ok(()),
        }
    }

    /// Ends in order: not ready, open connections, records.
    async fn finish(self, requests: &mut Termination, successor: &Successor, drain: Duration) {
        self.readiness.set("not shutting down", false);
        self.quiet.send_replace(true);
        tokio::select! {
            () = shutdown::drain(self.proxy, successor, drain) => {}
            signal = requests.next() => tracing::warn!(signal, "asked again: ending at once"),
        }
        self.silent.send_replace(true);
        self.ending.send_replace(true);
        self.endless.abort();
        self.reporting.iter().for_each(JoinHandle::abort);
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task failed while the agent ended");
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

/// Says what the node's network plug-in means for the mesh.
fn watch_neighbour(
    config: &Config,
    views: &control::Views,
) -> watch::Receiver<Arc<cni::Neighbour>> {
    let links = Routing::open().and_then(|mut routing| routing.links());
    let links: Vec<String> = links
        .unwrap_or_default()
        .into_iter()
        .map(|link| link.name)
        .collect();
    let found = neighbour::Found {
        cni: cni::find(&config.host.cni_conf, &links),
        balancers: cni::balancers(&config.host.cgroup).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot see whether others balance services at the sockets");
            Vec::new()
        }),
    };
    let port = match config.tunnel_port {
        TunnelPort::Fixed(port) => Some(port),
        // The plug-in sees the ports that its policies name.
        TunnelPort::Real => None,
    };
    let (to, neighbour) = watch::channel(Arc::default());
    tokio::spawn(neighbour::run(found, port, views.status.clone(), to));
    neighbour
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

/// `control` on a thread of its own: it enters namespaces and makes long series of system calls.
/// The receiver ends with it, however it ends.
fn start_control(
    settings: control::Settings,
    (kernel, finder): (Datapath, Finder),
    facts: source::Watched,
    outputs: control::Outputs,
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
            } = facts;
            let run = async {
                // What is pinned is in force until then.
                tokio::select! {
                    _ = complete.wait_for(|complete| *complete) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
                control::run(settings, kernel, finder, cluster, outputs, stop).await
            };
            if let Err(error) = runtime.block_on(run) {
                tracing::error!(%error, "control ended");
            }
        })
        .map_err(tried("start control's thread"))?;
    Ok(end)
}

fn current_thread() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
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

/// Spreads renewals over the nodes: FNV-1a of the node's name.
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
