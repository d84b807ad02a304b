// SPDX-License-Identifier: Apache-2.0
//! The shop of deploy/examples on two nodes, and a check for each promise of the mesh.
//!
//! Each check makes traffic and looks for evidence outside the agent: a client's exit code, an
//! application's log, a packet capture, `ss`. The `demo` program prints the evidence; tests run the
//! same checks, and again without enrollment, where every one must fail.

mod lines;

use std::fmt;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::apps::{Content, Nginx, SHOP_SQL, Shop, postgres, redis};
use crate::capture::Capture;
use crate::lab::Lab;
use crate::mesh::{ENROLLED, Mesh};
use crate::pod::PodSpec;
use crate::process::Proc;
use crate::topology::Topology;

pub use lines::LINES;

/// Addresses and ports of the services in deploy/examples/shop/services.yaml.
pub(crate) mod service {
    /// IPv4 and IPv6 addresses of the web front end.
    pub(crate) const WEB: [&str; 2] = ["10.96.0.20", "[fd00:96::20]"];
    /// Address and port of the application.
    pub(crate) const APP: &str = "10.96.0.21:8000";
    /// Address and port of Redis.
    pub(crate) const REDIS: &str = "10.96.0.22:6379";
    /// Address and port of PostgreSQL.
    pub(crate) const POSTGRES: &str = "[fd00:96::23]:5432";
}

/// The port on which the web front end's pod listens.
pub(crate) const WEB_PORT: u16 = 8080;
/// The port on which the application's pod listens.
const APP_PORT: u16 = 8000;
/// The ports of the data stores' pods.
pub(crate) const REDIS_PORT: u16 = 6379;
pub(crate) const POSTGRES_PORT: u16 = 5432;

/// The evidence for one check, as sentences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence(Vec<String>);

impl Evidence {
    /// Adds a sentence.
    pub(crate) fn add(&mut self, what: impl fmt::Display) {
        self.0.push(what.to_string());
    }

    /// Returns the sentences.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// A promise of the mesh and its check.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Title: the promise.
    pub title: &'static str,
    /// Makes the traffic and returns the evidence, or an error if the promise does not hold.
    pub check: fn(&Demo) -> Result<Evidence>,
}

/// The running shop in its mesh, with a capture between the nodes.
#[derive(Debug)]
pub struct Demo {
    /// The nginx front end.
    pub(crate) web: Nginx,
    /// The application behind nginx.
    pub(crate) app: Shop,
    #[expect(dead_code, reason = "held for their drop")]
    stores: [Proc; 2],
    /// Capture that starts before the first request.
    pub(crate) capture: Capture,
    items: AtomicU32,
    mesh: Mesh,
}

impl Deref for Demo {
    type Target = Mesh;
    fn deref(&self) -> &Mesh {
        &self.mesh
    }
}

impl Demo {
    /// Starts the mesh and the shop. With `enrolled` false, the only difference is that namespaces
    /// have no enrollment label. `progress` receives a message for each step.
    ///
    /// # Errors
    /// A program does not start.
    pub fn start(enrolled: bool, progress: impl Fn(&str)) -> Result<Self> {
        progress("creating two nodes and nine pods as network namespaces");
        let mut lab = Lab::builder(Topology::Routed).build()?;
        manifests(&lab, enrolled)?;
        for spec in pods() {
            lab.add_pod(spec)?;
        }
        progress("starting an agent on each node");
        let mesh = Mesh::start(lab)?;
        progress("starting Redis and PostgreSQL");
        let stores = [
            redis(&mesh.pod("redis"), REDIS_PORT)?,
            postgres(&mesh.pod("postgres"), POSTGRES_PORT, SHOP_SQL)?,
        ];
        progress("starting the application and its nginx front end");
        let app = Shop::start(
            &mesh.pod("app"),
            APP_PORT,
            service::REDIS,
            service::POSTGRES,
        )?;
        let behind = format!("http://{}", service::APP);
        let web = Nginx::start(&mesh.pod("web"), WEB_PORT, Content::Proxy(&behind))?;
        let capture = mesh.capture_wire()?;
        Ok(Self {
            web,
            app,
            stores,
            capture,
            items: AtomicU32::new(0),
            mesh,
        })
    }

    /// Returns a unique word to search for in logs, answers and captures.
    pub(crate) fn word(&self) -> String {
        let number = self.items.fetch_add(1, Ordering::Relaxed);
        format!("teapot{}x{number:04}", std::process::id())
    }
}

/// Returns the pods: clients on node 1, servers on node 2, so that most traffic crosses nodes.
fn pods() -> [PodSpec; 9] {
    let client = |name, node, app| {
        PodSpec::new(name, node)
            .namespace("clients")
            .label("app", app)
            .service_account(app)
    };
    let server = |name, node| PodSpec::new(name, node).namespace("shop");
    [
        client("client", 1, "client"),
        client("neighbour", 2, "client"),
        client("intruder", 1, "intruder"),
        client("insider", 2, "intruder"),
        server("app", 1),
        server("web", 2),
        server("redis", 2),
        server("postgres", 2),
        // This pod is not enrolled.
        client("plain", 1, "client").namespace("outside"),
    ]
}

/// Returns the directory deploy/examples/shop.
fn examples() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .context("workspace")?;
    Ok(root.join("deploy/examples/shop"))
}

/// Adds the example's manifests to those of the lab's nodes and pods.
fn manifests(lab: &Lab, enrolled: bool) -> Result<()> {
    let dir = examples()?;
    let read = |name: &str| {
        let path = dir.join(name).with_extension("yaml");
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    for name in ["serviceaccounts", "services", "policies", "authentication"] {
        lab.apply_text(name, &read(name)?)?;
    }
    let (key, value) = ENROLLED;
    let label = format!("{key}: {value}");
    for namespace in read("namespaces")?.split("---\n") {
        let name = namespace
            .lines()
            .find_map(|line| line.strip_prefix("  name: "));
        let name = name.context("a namespace has a name")?;
        let text = if enrolled {
            namespace.to_owned()
        } else {
            namespace.replace("  labels:\n", "").replace(&label, "")
        };
        lab.apply_text(&format!("namespace-{name}"), &text)?;
    }
    Ok(())
}
