// SPDX-License-Identifier: Apache-2.0
//! Real programs on a host of the lab: in its network namespace and cgroup, with chosen capabilities.
//!
//! Each program has a cgroup of its own below that of its host (as a container has), so that killing
//! it kills everything that it started.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cgroup;
use crate::netns::{Netns, ignore_absent};
use mesh_sys::testbed::{self, Placement, Rights};

/// Unread lines of a program whose output is piped.
#[expect(
    clippy::disallowed_types,
    reason = "a receiver alone would keep threads of a test from sharing its lab"
)]
type Lines = std::sync::Mutex<Receiver<String>>;

/// Bound of the unread lines; the program blocks at it.
const LINES: usize = 65_536;

/// A program to start: its command line, input and capabilities.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    rights: Rights,
    input: Vec<u8>,
}

impl From<Command> for Cmd {
    fn from(command: Command) -> Self {
        Self {
            command,
            rights: Rights::Root,
            input: Vec::new(),
        }
    }
}

impl Cmd {
    /// A program found in PATH, or by its path.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Command::new(program).into()
    }

    /// A command line without quoting: words separated by blanks.
    #[must_use]
    pub fn line(line: &str) -> Self {
        let mut words = line.split_ascii_whitespace();
        Self::new(words.next().unwrap_or_default()).args(words)
    }

    /// A script for `/bin/sh -c`.
    #[must_use]
    pub fn shell(script: &str) -> Self {
        Self::new("/bin/sh").args(["-c", script])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item: AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Standard input of the program (default: empty).
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Runs the program as `nobody`, without capabilities.
    #[must_use]
    pub fn no_root(self) -> Self {
        self.rights(Rights::Nobody)
    }

    /// Runs the program as root without capabilities except CAP_NET_RAW.
    #[must_use]
    pub fn cap_net_raw_only(self) -> Self {
        self.rights(Rights::NetRawOnly)
    }

    /// Chooses the user and capabilities.
    #[must_use]
    pub fn rights(mut self, rights: Rights) -> Self {
        self.rights = rights;
        self
    }

    /// This program as the last arguments of another one, which replaces itself by it.
    #[must_use]
    pub(crate) fn after(self, first: Self) -> Self {
        let mut first = first;
        first.command.arg(self.command.get_program());
        first.command.args(self.command.get_args());
        for (key, value) in self.command.get_envs() {
            match value {
                Some(value) => first.command.env(key, value),
                None => first.command.env_remove(key),
            };
        }
        Self {
            rights: self.rights,
            input: self.input,
            ..first
        }
    }

    fn program(&self) -> String {
        let path = Path::new(self.command.get_program());
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

/// Result of a program that has exited.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Its standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The output if the program succeeded.
    ///
    /// # Errors
    /// The program failed; the error carries its output.
    pub fn ok(self) -> Result<Self> {
        if self.status.success() {
            Ok(self)
        } else {
            bail!("{self}")
        }
    }

    /// Its standard output as one JSON value, whether or not it succeeded.
    ///
    /// # Errors
    /// The output is not such a value.
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.stdout).with_context(|| self.to_string())
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = String::from_utf8_lossy(&self.stderr);
        write!(
            f,
            "{}; stdout: {}; stderr: {}",
            self.status,
            self.text().trim(),
            error.trim()
        )
    }
}

/// A host of the lab, on which programs run: a network namespace with a cgroup and a directory for
/// logs and data. Pods, nodes, the wire and the outside host are hosts.
#[derive(Debug)]
pub struct Host {
    name: String,
    netns: Arc<Netns>,
    cgroup: PathBuf,
    dir: PathBuf,
    started: AtomicU32,
}

impl Deref for Host {
    type Target = Netns;
    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Host {
    pub(crate) fn new(
        name: &str,
        netns: Arc<Netns>,
        cgroup: PathBuf,
        dir: PathBuf,
    ) -> Result<Self> {
        cgroup::create(&cgroup)?;
        fs::create_dir_all(&dir)?;
        let started = AtomicU32::new(0);
        Ok(Self {
            name: name.to_owned(),
            netns,
            cgroup,
            dir,
            started,
        })
    }

    /// Another host in the same namespace, with a cgroup and a directory of its own.
    pub(crate) fn beside(&self, name: &str) -> Result<Self> {
        let replace = |path: &Path| path.with_file_name(name);
        Self::new(
            name,
            Arc::clone(&self.netns),
            replace(&self.cgroup),
            replace(&self.dir),
        )
    }

    /// Name within the lab.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.name
    }

    /// The cgroup below which its programs live.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The directory for its logs and its applications' data.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs `f` on a fresh thread inside the namespace; see [`Netns::enter`] for what it is not.
    ///
    /// # Errors
    /// What `f` returns, or that the namespace cannot be entered.
    pub fn in_ns<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.netns.enter(f)
    }

    /// Starts a program whose output goes to a log file in [`Host::dir`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, cmd: impl Into<Cmd>) -> Result<Proc> {
        let cmd = cmd.into();
        let (number, group) = self.next_group();
        let log = self.dir.join(format!("{number}-{}.log", cmd.program()));
        let file = File::create(&log)?;
        let out = file.try_clone()?;
        self.launch(cmd, group, (out.into(), file.into()), log)
    }

    /// Starts a program whose output is read line by line with [`Proc::line`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_lines(&self, cmd: impl Into<Cmd>) -> Result<Proc> {
        let (number, group) = self.next_group();
        self.spawn_lines_in(cmd.into(), (number, group))
    }

    /// As [`Host::spawn_lines`], in a cgroup that may hold others too; all end with this one.
    pub(crate) fn spawn_lines_in(&self, cmd: Cmd, (number, group): (u32, PathBuf)) -> Result<Proc> {
        let log = self.dir.join(format!("{number}-{}.log", cmd.program()));
        let errors = File::create(&log)?;
        let mut process = self.launch(cmd, group, (Stdio::piped(), errors.into()), log)?;
        let stdout = process.child.stdout.take().context("stdout is piped")?;
        let (sender, lines) = sync_channel(LINES);
        // Ends with the pipe, which ends with the program's cgroup.
        let _reader = spawn(move || {
            let lines = BufReader::new(stdout).lines();
            lines
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        process.lines = Some(Lines::new(lines));
        Ok(process)
    }

    /// Runs a program until it exits and returns its output.
    ///
    /// # Errors
    /// It cannot be started, or is killed because it has not exited within `deadline`.
    pub fn run(&self, cmd: impl Into<Cmd>, deadline: Duration) -> Result<Output> {
        let cmd = cmd.into();
        let what = format!("{:?} in {}", cmd.command, self.name);
        let (_, group) = self.next_group();
        let pipes = (Stdio::piped(), Stdio::piped());
        let mut process = self.launch(cmd, group, pipes, PathBuf::new())?;
        let stdout = drain(process.child.stdout.take().context("stdout is piped")?);
        let stderr = drain(process.child.stderr.take().context("stderr is piped")?);
        let ended = testbed::wait_exit(process.id(), deadline)?;
        // Whatever it left behind would hold the pipes open.
        let status = process.kill()?;
        let collect = |pipe: JoinHandle<Vec<u8>>| pipe.join().unwrap_or_default();
        let output = Output {
            status,
            stdout: collect(stdout),
            stderr: collect(stderr),
        };
        if ended {
            Ok(output)
        } else {
            bail!("{what} has not exited after {deadline:?}: {output}")
        }
    }

    /// The number of the next program, and the cgroup of its own.
    fn next_group(&self) -> (u32, PathBuf) {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        (number, self.cgroup.join(number.to_string()))
    }

    fn launch(
        &self,
        mut cmd: Cmd,
        group: PathBuf,
        (stdout, stderr): (Stdio, Stdio),
        log: PathBuf,
    ) -> Result<Proc> {
        cgroup::create(&group)?;
        let placement = Placement {
            netns: self.netns.descriptor()?,
            cgroup_procs: Some(cgroup::open_procs(&group)?),
            rights: cmd.rights,
        };
        let what = format!("{:?} in {}", cmd.command, self.name);
        testbed::place(&mut cmd.command, placement);
        let stdin = if cmd.input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        };
        cmd.command.stdin(stdin).stdout(stdout).stderr(stderr);
        let mut child = cmd
            .command
            .spawn()
            .with_context(|| format!("cannot start {what}"))?;
        if let Some(mut pipe) = child.stdin.take() {
            let input = cmd.input;
            // A program that ends without reading its input is not the harness's failure.
            let _writer = spawn(move || pipe.write_all(&input));
        }
        Ok(Proc {
            what,
            child,
            group,
            log,
            lines: None,
            status: None,
        })
    }
}

fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is in `bytes`.
        drop(pipe.read_to_end(&mut bytes));
        bytes
    })
}

/// A running program; dropping it kills it and everything that it started.
#[derive(Debug)]
pub struct Proc {
    what: String,
    child: Child,
    group: PathBuf,
    log: PathBuf,
    /// Behind a lock so that threads may share the lab; one reads at a time.
    lines: Option<Lines>,
    status: Option<ExitStatus>,
}

impl Proc {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// The program has exited.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.bytes("VmRSS:")
    }

    /// Peak of its resident memory in bytes.
    ///
    /// # Errors
    /// The program has exited.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.bytes("VmHWM:")
    }

    /// A size of `/proc/PID/status`.
    fn bytes(&self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib: u64 = line
            .with_context(|| format!("no {name}: the process has exited"))?
            .trim_end_matches("kB")
            .trim()
            .parse()?;
        Ok(kib << 10)
    }

    /// File of its output; of its standard error only, if started with [`Host::spawn_lines`].
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines of its log, for error messages.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, 40)
    }

    /// The next line of a program started with [`Host::spawn_lines`]; none at its end.
    ///
    /// # Errors
    /// No line came within `deadline`, or its output goes to a log.
    pub fn line(&self, deadline: Duration) -> Result<Option<String>> {
        let lines = self.lines.as_ref().context("its output goes to a log")?;
        let received = match lines.lock() {
            Ok(lines) => lines.recv_timeout(deadline),
            Err(poisoned) => poisoned.into_inner().recv_timeout(deadline),
        };
        match received {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "{} printed no line within {deadline:?}: {}",
                    self.what,
                    self.log_tail()
                )
            }
        }
    }

    /// The next line of a program that must not have exited.
    ///
    /// # Errors
    /// As of [`Proc::line`], or the program has exited; the error carries the end of its log.
    pub fn next_line(&self, deadline: Duration) -> Result<String> {
        let line = self.line(deadline)?;
        line.with_context(|| format!("{} exited: {}", self.what, self.log_tail()))
    }

    /// Exit status, or none while it runs.
    ///
    /// # Errors
    /// Whatever `waitpid` reports.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits until the program exits.
    ///
    /// # Errors
    /// It still runs after `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        if !testbed::wait_exit(self.child.id(), deadline)? {
            bail!(
                "{} still runs after {deadline:?}: {}",
                self.what,
                self.log_tail()
            );
        }
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// Sends it a signal, e.g. `libc::SIGTERM`.
    ///
    /// # Errors
    /// The program has exited already.
    pub fn signal(&self, signal: i32) -> Result<()> {
        anyhow::ensure!(self.status.is_none(), "{} has exited", self.what);
        testbed::signal(self.child.id(), signal).with_context(|| format!("signal to {}", self.what))
    }

    /// Kills the program and everything that it started (SIGKILL), and reaps it.
    ///
    /// # Errors
    /// A process survives.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        cgroup::kill(&self.group)?;
        let status = self.wait(Duration::from_secs(10))?;
        // Busy for a moment after its last process; the lab's own removal takes what stays.
        drop(ignore_absent(fs::remove_dir(&self.group)));
        Ok(status)
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // The lab's removal kills what resists here.
        drop(self.kill());
    }
}

/// The last `count` lines of a file; empty if there is none.
#[must_use]
pub fn tail(path: &Path, count: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
