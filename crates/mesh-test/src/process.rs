// SPDX-License-Identifier: Apache-2.0
//! Programs on a host of the lab, in its network namespace and cgroup, with chosen capabilities.
//!
//! Each program has its own cgroup below its host's, as a container has, so that killing it also
//! kills everything that it started.

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

/// Unread lines of a program with piped output.
#[expect(
    clippy::disallowed_types,
    reason = "a receiver alone would keep threads of a test from sharing its lab"
)]
type Lines = std::sync::Mutex<Receiver<String>>;

/// Maximum number of unread lines, at which the program blocks.
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
    /// Returns a command for a program in PATH or at a path.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Command::new(program).into()
    }

    /// Returns a command for a command line of words separated by spaces, without quoting.
    #[must_use]
    pub fn line(line: &str) -> Self {
        let mut words = line.split_ascii_whitespace();
        Self::new(words.next().unwrap_or_default()).args(words)
    }

    /// Returns a command for a script, run by `/bin/sh -c`.
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

    /// Sets the program's standard input (default: empty).
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

    /// Sets the user and the capabilities.
    #[must_use]
    pub fn rights(mut self, rights: Rights) -> Self {
        self.rights = rights;
        self
    }

    /// Passes this command as the last arguments of another program, which executes it.
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

/// Output and exit status of a program.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Returns the standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Returns the output if the program succeeded.
    ///
    /// # Errors
    /// The program failed; the error contains its output.
    pub fn ok(self) -> Result<Self> {
        if self.status.success() {
            Ok(self)
        } else {
            bail!("{self}")
        }
    }

    /// Parses the standard output as one JSON value, whether or not the program succeeded.
    ///
    /// # Errors
    /// The output is not valid JSON of this type.
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

/// A host of the lab on which programs run: a network namespace with a cgroup and a directory for
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

    /// Creates another host in the same namespace, with its own cgroup and directory.
    pub(crate) fn beside(&self, name: &str) -> Result<Self> {
        let replace = |path: &Path| path.with_file_name(name);
        Self::new(
            name,
            Arc::clone(&self.netns),
            replace(&self.cgroup),
            replace(&self.dir),
        )
    }

    /// Returns the host's name within the lab.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.name
    }

    /// Returns the parent cgroup of the host's programs.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Returns the directory for the host's logs and application data.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs `f` on a new thread inside the namespace; see [`Netns::enter`] for the limitations.
    ///
    /// # Errors
    /// `f` fails, or the namespace cannot be entered.
    pub fn in_ns<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.netns.enter(f)
    }

    /// Starts a program whose output goes to a log file in [`Host::dir`].
    ///
    /// # Errors
    /// The program cannot be started.
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
    /// The program cannot be started.
    pub fn spawn_lines(&self, cmd: impl Into<Cmd>) -> Result<Proc> {
        let (number, group) = self.next_group();
        self.spawn_lines_in(cmd.into(), (number, group))
    }

    /// Starts a program like [`Host::spawn_lines`], in a shared cgroup that is killed with the
    /// program.
    pub(crate) fn spawn_lines_in(&self, cmd: Cmd, (number, group): (u32, PathBuf)) -> Result<Proc> {
        let log = self.dir.join(format!("{number}-{}.log", cmd.program()));
        let errors = File::create(&log)?;
        let mut process = self.launch(cmd, group, (Stdio::piped(), errors.into()), log)?;
        let stdout = process.child.stdout.take().context("stdout is piped")?;
        let (sender, lines) = sync_channel(LINES);
        // The thread ends when the program's cgroup is killed, which closes the pipe.
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
    /// The program cannot be started, or has not exited within `deadline` and is killed.
    pub fn run(&self, cmd: impl Into<Cmd>, deadline: Duration) -> Result<Output> {
        let cmd = cmd.into();
        let what = format!("{:?} in {}", cmd.command, self.name);
        let (_, group) = self.next_group();
        let pipes = (Stdio::piped(), Stdio::piped());
        let mut process = self.launch(cmd, group, pipes, PathBuf::new())?;
        let stdout = drain(process.child.stdout.take().context("stdout is piped")?);
        let stderr = drain(process.child.stderr.take().context("stderr is piped")?);
        let ended = testbed::wait_exit(process.id(), deadline)?;
        // Processes that the program left behind would keep the pipes open.
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

    /// Returns the number of the next program and the path of its cgroup.
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
            // A program may exit without reading its input.
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
        // `bytes` keeps the output that was read before an error.
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
    /// The reader of piped output; a lock lets threads share the lab, and one reads at a time.
    lines: Option<Lines>,
    status: Option<ExitStatus>,
}

impl Proc {
    /// Returns the process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the resident memory in bytes.
    ///
    /// # Errors
    /// The program has exited.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.bytes("VmRSS:")
    }

    /// Returns the peak of the resident memory in bytes.
    ///
    /// # Errors
    /// The program has exited.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.bytes("VmHWM:")
    }

    /// Reads a size from `/proc/PID/status`, in bytes.
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

    /// Returns the log file, which has only standard error if started with [`Host::spawn_lines`].
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the last lines of the log, for error messages.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, 40)
    }

    /// Returns the next line of a program started with [`Host::spawn_lines`], or `None` at its end.
    ///
    /// # Errors
    /// No line came within `deadline`, or the output goes to a log.
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

    /// Returns the next line of a program that must still be running.
    ///
    /// # Errors
    /// As [`Proc::line`], or the program has exited; the error contains the end of its log.
    pub fn next_line(&self, deadline: Duration) -> Result<String> {
        let line = self.line(deadline)?;
        line.with_context(|| format!("{} exited: {}", self.what, self.log_tail()))
    }

    /// Returns the exit status, or `None` while the program runs.
    ///
    /// # Errors
    /// `waitpid` fails.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits until the program exits.
    ///
    /// # Errors
    /// The program still runs after `deadline`.
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

    /// Sends a signal to the program, e.g. `libc::SIGTERM`.
    ///
    /// # Errors
    /// The program has already exited.
    pub fn signal(&self, signal: i32) -> Result<()> {
        anyhow::ensure!(self.status.is_none(), "{} has exited", self.what);
        testbed::signal(self.child.id(), signal).with_context(|| format!("signal to {}", self.what))
    }

    /// Kills the program and everything that it started (SIGKILL), and reaps it.
    ///
    /// # Errors
    /// A process cannot be killed.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        cgroup::kill(&self.group)?;
        let status = self.wait(Duration::from_secs(10))?;
        // The cgroup may be busy for a moment; the lab's removal deletes what remains.
        drop(ignore_absent(fs::remove_dir(&self.group)));
        Ok(status)
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // The lab's removal kills any process that remains.
        drop(self.kill());
    }
}

/// Returns the last `count` lines of a file; empty if the file does not exist.
#[must_use]
pub fn tail(path: &Path, count: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
