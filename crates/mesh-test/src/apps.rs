// SPDX-License-Identifier: Apache-2.0
//! Real applications as packaged by Debian, run in pods: nginx, Redis, PostgreSQL, and the shop
//! example.
//!
//! Each application keeps its configuration and data in the pod's directory, and its start function
//! returns once it answers a client in its own pod. The applications' logs are evidence that does
//! not come from the mesh.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::http_get;
use crate::pod::Pod;
use crate::process::{Cmd, Host, Proc, tail};
use crate::wait::eventually;
use mesh_sys::testbed::Rights;

const START: Duration = Duration::from_secs(20);

/// Directory in which Debian installs PostgreSQL, with a subdirectory for each version.
const POSTGRES: &str = "/usr/lib/postgresql";

fn own_address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Waits in the host's namespace until `answers` returns true, or fails if the process exits.
fn until_ready(
    host: &Host,
    process: &mut Proc,
    what: &str,
    answers: impl Fn() -> Result<bool> + Sync,
) -> Result<()> {
    let ready = eventually(what, START, || match process.ended() {
        Ok(None) => host
            .in_ns(&answers)
            .is_ok_and(|ready| ready)
            .then_some(Ok(())),
        Ok(Some(status)) => Some(Err(anyhow::anyhow!("{what} exited: {status}"))),
        Err(e) => Some(Err(e)),
    });
    ready
        .and_then(|ended| ended)
        .with_context(|| process.log_tail())
}

/// The content that nginx serves.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Static files by name; `index.html` is the front page.
    Files(&'a [(&'a str, &'a [u8])]),
    /// A reverse proxy to this upstream, e.g. `http://10.96.0.20:8080`.
    Proxy(&'a str),
}

/// A request as logged by nginx or the shop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's address as seen by the application.
    pub client: SocketAddr,
    /// HTTP status of the response.
    pub status: u16,
    /// The request line: method, path and version.
    pub line: String,
}

/// Parses a log of `ADDRESS PORT STATUS REQUEST` lines.
fn requests(log: &Path) -> Result<Vec<Request>> {
    let text = fs::read_to_string(log).with_context(|| log.display().to_string())?;
    let parse = |line: &str| {
        let mut words = line.splitn(4, ' ');
        let (address, port) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let status = words.next()?.parse().ok()?;
        let line = words.next()?.to_owned();
        Some(Request {
            client: SocketAddr::new(address, port),
            status,
            line,
        })
    };
    Ok(text.lines().filter_map(parse).collect())
}

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    /// The nginx master process.
    pub process: Proc,
    dir: PathBuf,
}

impl Nginx {
    /// Starts nginx on `port` of all the pod's addresses.
    ///
    /// # Errors
    /// nginx does not answer; the error contains the end of its log.
    pub fn start(pod: &Pod, port: u16, content: Content<'_>) -> Result<Self> {
        let dir = pod.dir().join(format!("nginx-{port}"));
        let html = dir.join("html");
        fs::create_dir_all(&html)?;
        let location = match content {
            Content::Files(files) => {
                for (name, bytes) in files {
                    fs::write(html.join(name), bytes)?;
                }
                format!("root {};", html.display())
            }
            Content::Proxy(url) => {
                format!("proxy_pass {url}; proxy_set_header X-Real-IP $remote_addr;")
            }
        };
        fs::write(dir.join("nginx.conf"), nginx_conf(&dir, port, &location))?;
        let cmd = Cmd::new("nginx")
            .args(["-e", "stderr", "-c"])
            .args([dir.join("nginx.conf")]);
        let mut process = pod.spawn(cmd)?;
        until_ready(pod, &mut process, "nginx", || {
            Ok(TcpStream::connect_timeout(&own_address(port), START).is_ok())
        })?;
        Ok(Self { process, dir })
    }

    /// Returns the requests that nginx has answered.
    ///
    /// # Errors
    /// The access log cannot be read.
    pub fn requests(&self) -> Result<Vec<Request>> {
        requests(&self.dir.join("access.log"))
    }

    /// Returns the end of nginx's error log.
    #[must_use]
    pub fn errors(&self) -> String {
        tail(&self.dir.join("error.log"), 20)
    }
}

fn nginx_conf(dir: &Path, port: u16, location: &str) -> String {
    let dir = dir.display();
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {dir}/{kind};\n"))
        .concat();
    format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {dir}/pid;\nerror_log {dir}/error.log;\n\
         events {{ worker_connections 4096; }}\nhttp {{\n{temp}\
         log_format peers '$remote_addr $remote_port $status $request';\n\
         access_log {dir}/access.log peers;\ndefault_type text/plain;\n\
         server {{ listen {port}; listen [::]:{port}; location / {{ {location} }} }}\n}}\n"
    )
}

/// Starts Redis on `port` of all the pod's addresses, without persistence.
///
/// # Errors
/// Redis does not answer; the error contains the end of its log.
pub fn redis(pod: &Pod, port: u16) -> Result<Proc> {
    let dir = pod.dir().join(format!("redis-{port}"));
    fs::create_dir_all(&dir)?;
    let (port_text, dir_text) = (port.to_string(), dir.display().to_string());
    let cmd = Cmd::new("redis-server").args([
        "--port",
        &port_text,
        "--dir",
        &dir_text,
        "--bind",
        "*",
        "-::*",
        "--save",
        "",
        "--appendonly",
        "no",
        "--protected-mode",
        "no",
    ]);
    let mut process = pod.spawn(cmd)?;
    until_ready(pod, &mut process, "redis-server", || {
        let mut stream = TcpStream::connect_timeout(&own_address(port), START)?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 7];
        stream.read_exact(&mut answer)?;
        Ok(&answer == b"+PONG\r\n")
    })?;
    Ok(process)
}

/// Starts PostgreSQL on `port` of all the pod's addresses, without passwords or durability, and
/// runs `sql` in it.
///
/// # Errors
/// PostgreSQL is not installed or does not answer, or the SQL fails.
pub fn postgres(pod: &Pod, port: u16, sql: &str) -> Result<Proc> {
    let binaries = postgres_binaries()?;
    let user = postgres_user();
    let data = pod.dir().join(format!("postgres-{port}"));
    let template = postgres_template(pod, &binaries, user)?;
    let copy = Cmd::new("cp").args(["--archive"]).args([&template, &data]);
    pod.run(copy, START)?.ok()?;
    let (port_text, data_text) = (port.to_string(), data.display().to_string());
    let sockets = format!("unix_socket_directories={data_text}");
    let cmd = Cmd::new(binaries.join("postgres"))
        .rights(user)
        .dir(&data)
        .args([
            "-D",
            &data_text,
            "-p",
            &port_text,
            "-c",
            &sockets,
            "-c",
            "listen_addresses=*",
            "-c",
            "fsync=off",
            "-c",
            "shared_buffers=16MB",
            "-c",
            "autovacuum=off",
        ]);
    let mut process = pod.spawn(cmd)?;
    let ready =
        || Cmd::new(binaries.join("pg_isready")).args(["-h", "127.0.0.1", "-p", &port_text]);
    until_ready(pod, &mut process, "postgres", || {
        Ok(pod.run(ready(), START)?.status.success())
    })?;
    let psql = [
        "-h",
        "127.0.0.1",
        "-p",
        &port_text,
        "-U",
        "postgres",
        "-v",
        "ON_ERROR_STOP=1",
    ];
    pod.run(
        Cmd::new(binaries.join("psql")).args(psql).args(["-c", sql]),
        START,
    )?
    .ok()?;
    Ok(process)
}

/// Returns the program directory of the newest installed PostgreSQL version.
fn postgres_binaries() -> Result<PathBuf> {
    let versions = fs::read_dir(POSTGRES).with_context(|| format!("no {POSTGRES}"))?;
    let names = versions
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let newest = names.filter_map(|name| name.parse::<u32>().ok()).max();
    let newest = newest.with_context(|| format!("no version in {POSTGRES}"))?;
    let bin = Path::new(POSTGRES).join(newest.to_string()).join("bin");
    ensure!(
        bin.join("initdb").is_file(),
        "no initdb in {}",
        bin.display()
    );
    Ok(bin)
}

/// Returns the user that runs PostgreSQL, which refuses to run as root.
fn postgres_user() -> Rights {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let line = users
        .lines()
        .find_map(|line| line.strip_prefix("postgres:"));
    let ids = line.and_then(|line| {
        let mut fields = line.split(':').skip(1);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    ids.map_or(Rights::Nobody, |(user, group)| Rights::User(user, group))
}

/// Creates an empty database cluster once per lab: `initdb` takes a second, copying is fast.
fn postgres_template(pod: &Pod, binaries: &Path, user: Rights) -> Result<PathBuf> {
    let lab = pod
        .dir()
        .parent()
        .context("the pod's directory has no parent")?;
    let template = lab.join("postgres-template");
    if template.exists() {
        return Ok(template);
    }
    let draft = lab.join(format!("postgres-template-{}", pod.uid()));
    fs::create_dir(&draft)?;
    let (uid, gid) = match user {
        Rights::User(uid, gid) => (uid, gid),
        Rights::Root | Rights::Nobody | Rights::NetRawOnly => {
            (mesh_sys::testbed::NOBODY, mesh_sys::testbed::NOBODY)
        }
    };
    chown(&draft, Some(uid), Some(gid))?;
    let cmd = Cmd::new(binaries.join("initdb"))
        .rights(user)
        .dir(&draft)
        .args([
            "-U",
            "postgres",
            "--auth=trust",
            "--no-sync",
            "--locale=C",
            "--encoding=UTF8",
            "-D",
            ".",
        ]);
    pod.run(cmd, Duration::from_secs(60))?
        .ok()
        .context("initdb")?;
    let mut access = fs::OpenOptions::new()
        .append(true)
        .open(draft.join("pg_hba.conf"))?;
    access.write_all(b"host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")?;
    fs::rename(&draft, &template)?;
    Ok(template)
}

/// SQL that creates the table that [`Shop`] needs.
pub const SHOP_SQL: &str = "CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL)";

/// The shop example in deploy/examples: an HTTP application between nginx and its data stores.
#[derive(Debug)]
pub struct Shop {
    /// The shop's process; its log is the access log.
    pub process: Proc,
}

impl Shop {
    /// Starts the shop with the addresses of Redis and PostgreSQL as `host:port`.
    ///
    /// # Errors
    /// The shop does not answer; the error contains the end of its log.
    pub fn start(pod: &Pod, port: u16, redis: &str, postgres: &str) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .context("workspace")?;
        let script = root.join("deploy/examples/shop/app.py");
        let listen = format!("[::]:{port}");
        let cmd = Cmd::new("/usr/bin/python3")
            .args([script])
            .env("LISTEN", listen);
        let mut process = pod.spawn(cmd.env("REDIS", redis).env("POSTGRES", postgres))?;
        until_ready(pod, &mut process, "the shop", || {
            Ok(http_get(own_address(port), "/healthz")?.0 == 200)
        })?;
        Ok(Self { process })
    }

    /// Returns the requests that the shop has answered, without the checks of [`Shop::start`].
    ///
    /// # Errors
    /// The access log cannot be read.
    pub fn requests(&self) -> Result<Vec<Request>> {
        let mut all = requests(self.process.log())?;
        all.retain(|request| !request.client.ip().is_loopback());
        Ok(all)
    }
}
