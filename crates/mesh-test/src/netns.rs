// SPDX-License-Identifier: Apache-2.0
//! Network namespaces with a file in /run/netns, so that `ip -n`, agents and manifests can name
//! them.
//!
//! This module creates, enters and removes namespaces and sets their sysctls; it adds no links.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::names::NETNS_DIR;
use mesh_sys::testbed;

/// Sysctls set in every new namespace. The congestion control is fixed because bbr, a possible
/// default of the machine, is far too slow on veth. Duplicate address detection would delay
/// addresses by a second.
const SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/tcp_congestion_control", CUBIC),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/dad_transmits", "0"),
];

/// Congestion control used in every namespace.
const CUBIC: &str = "cubic";

/// Sysctl with the congestion controls that namespaces other than the initial one may use.
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// A network namespace with a file in /run/netns.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    cookie: u64,
}

impl Netns {
    /// Creates a namespace called `name`.
    pub(crate) fn create(name: &str) -> Result<Self> {
        allow_cubic()?;
        let dir = File::open(prepare_dir()?)?;
        testbed::lock(&dir)?;
        let path = Path::new(NETNS_DIR).join(name);
        File::create_new(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let made = on_thread(|| {
            testbed::new_netns().context("unshare(CLONE_NEWNET)")?;
            testbed::mount_bind(Path::new("/proc/thread-self/ns/net"), &path)
                .context("bind mount")?;
            for (key, value) in SYSCTLS {
                write_sysctl(key, value)?;
            }
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            Ok(testbed::netns_cookie(&socket)?)
        });
        let cookie = match made {
            Ok(cookie) => cookie,
            Err(e) => {
                remove_file(&path)?;
                return Err(e.context(format!("cannot make network namespace {name}")));
            }
        };
        Ok(Self {
            name: name.to_owned(),
            path,
            cookie,
        })
    }

    /// Returns the namespace of this process, which has no file in /run/netns.
    pub(crate) fn of_this_process() -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{}/ns/net", std::process::id()));
        let cookie = testbed::netns_cookie(&std::net::UdpSocket::bind("127.0.0.1:0")?)?;
        Ok(Self {
            name: String::new(),
            path,
            cookie,
        })
    }

    /// Returns the file name in /run/netns, as used by `ip -n`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the namespace's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the kernel's cookie of the namespace, which is never reused.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Returns the inode of the namespace, as in `readlink /proc/PID/ns/net`.
    ///
    /// # Errors
    /// The namespace was removed.
    pub fn inode(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
    }

    /// Opens the namespace. Callers close the descriptor soon, because it keeps a deleted pod's
    /// namespace alive.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd> {
        let file = File::open(&self.path);
        Ok(file
            .with_context(|| format!("namespace {} is gone", self.name))?
            .into())
    }

    /// Runs `f` on a new thread inside the namespace and returns its result.
    ///
    /// The thread stays in the harness's cgroup, because a single thread cannot join a domain
    /// cgroup. A node's cgroup hooks do not see its sockets; use a process where they must.
    ///
    /// # Errors
    /// `f` fails, or the namespace cannot be entered.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = self.descriptor()?;
        on_thread(|| {
            testbed::enter_netns(&netns)
                .with_context(|| format!("cannot enter namespace {}", self.name))?;
            f()
        })
    }

    /// Writes a sysctl of this namespace, e.g. `ipv4/ip_forward`.
    ///
    /// # Errors
    /// The sysctl does not exist, or the kernel rejects the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.enter(|| write_sysctl(key, value))
    }

    /// Returns whether a link with this name currently exists.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn has_link(&self, link: &str) -> Result<bool> {
        self.enter(|| Ok(testbed::packet::ifindex(link).is_ok()))
    }
}

fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net").join(key);
    fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
}

/// Allows cubic in namespaces on machines with another default. The list is global, so the change
/// remains; it only adds an allowed value.
fn allow_cubic() -> Result<()> {
    let allowed = fs::read_to_string(ALLOWED).with_context(|| ALLOWED)?;
    if allowed.split_ascii_whitespace().any(|name| name == CUBIC) {
        return Ok(());
    }
    fs::write(ALLOWED, format!("{} {CUBIC}", allowed.trim())).with_context(|| ALLOWED)
}

fn on_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let ended = std::thread::scope(|scope| scope.spawn(f).join());
    match ended {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Makes /run/netns a shared mount, as iproute2 does. Otherwise the first `ip netns add` by another
/// program would hide the mounts made here.
fn prepare_dir() -> Result<&'static Path> {
    let dir = Path::new(NETNS_DIR);
    fs::create_dir_all(dir)?;
    let lock = File::open(dir)?;
    testbed::lock(&lock)?;
    match testbed::make_shared(dir) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            testbed::mount_self(dir).context("cannot bind-mount /run/netns on itself")?;
            testbed::make_shared(dir).context("cannot make /run/netns shared")?;
        }
        Err(e) => bail!("cannot make /run/netns shared: {e}"),
    }
    Ok(dir)
}

/// Removes a namespace's file; the namespace lives on while processes or sockets use it.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match testbed::unmount(path) {
        Ok(()) => {}
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {}
        Err(e) => return Err(e).with_context(|| format!("cannot unmount {}", path.display())),
    }
    ignore_absent(fs::remove_file(path))
        .with_context(|| format!("cannot remove {}", path.display()))
}

/// Treats "not found" as success when removing.
pub(crate) fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
