// SPDX-License-Identifier: Apache-2.0
//! Network namespaces for unit tests. They have no name, so that a test cannot leave one behind. All functions
//! panic on errors.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::thread;

use super::netns::NetNs;

/// Creates a network namespace with `lo` up, which lives as long as its descriptor.
pub fn fresh() -> NetNs {
    static ALLOWED: Once = Once::new();
    ALLOWED.call_once(allow_cubic);
    thread::spawn(|| {
        // SAFETY: unshare() changes this thread only.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "needs root");
        ip(&["link", "set", "lo", "up"]);
        let control = Path::new("/proc/sys/net/ipv4/tcp_congestion_control");
        fs::write(control, "cubic").expect("it is allowed");
        NetNs::own().expect("/proc is there")
    })
    .join()
    .expect("create a network namespace")
}

/// Allows network namespaces to use cubic on a machine with another default congestion control, which they inherit.
/// The kernel has one list of allowed algorithms; this only adds to it.
fn allow_cubic() {
    let list = Path::new("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
    let allowed = fs::read_to_string(list).expect("it can be read");
    if !allowed.split_ascii_whitespace().any(|name| name == "cubic") {
        let more = format!("{} cubic", allowed.trim());
        fs::write(list, more).expect("cubic is built in");
    }
}

/// Runs a test in a new network namespace.
pub fn alone<T>(f: impl FnOnce() -> T) -> T {
    fresh().run(f).expect("a fresh namespace can be entered")
}

/// Returns a path by which this process can open the namespace.
pub fn path(netns: &NetNs) -> PathBuf {
    use std::os::fd::AsFd as _;
    let fd = netns.as_fd().as_raw_fd();
    PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()))
}

/// Runs `ip ARGS` in this thread's network namespace and returns its output.
pub fn ip(args: &[&str]) -> String {
    let output = Command::new("ip")
        .args(args)
        .output()
        .expect("iproute2 is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {args:?}: {error}");
    text
}
