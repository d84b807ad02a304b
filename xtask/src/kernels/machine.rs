// SPDX-License-Identifier: Apache-2.0
//! A machine of a kernel: an initial file system with the few modules that reach this machine's files,
//! and one program as all that it runs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::packages::{Kernel, directory};
use crate::run;

/// The time limit of a program: an emulated processor is twenty times slower.
const PATIENCE: &str = "900";

/// Serves files to the machine.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Features that are built into a kernel are not modules. Dependencies differ by version, so they are
/// tried again and again.
const MODULES: [&str; 8] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "fuse",
    "virtiofs",
    "overlay",
];

/// The first program: the host's files, and memory over them.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /host /layer /new
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for again in 1 2 3; do
for m in MODULES; do [ -e /m/$m.ko ] && $b insmod /m/$m.ko 2>/dev/null; done
done
$b mount -t virtiofs host /host
$b mount -t tmpfs layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /new
for d in proc sys dev; do $b mount --move /$d /new/$d; done
exec $b switch_root /new /bin/sh -c '. SCRIPT'
"#;

/// The second: what a machine has that has been set up, then the program.
const SCRIPT: &str = r#"export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=1
mkdir -p /lib/modules
mount --bind LIB /lib/modules
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ip link set lo up
for m in veth bridge sctp nf_tables; do modprobe $m; done
cd ROOT
LINE
echo "machine: exit $?"
echo o > /proc/sysrq-trigger
sleep 60
"#;

/// The result of a program.
pub(super) struct Said {
    pub(super) text: String,
    /// `None` = it did not come to its end.
    pub(super) status: Option<i32>,
}

pub(super) struct Machine<'k> {
    kernel: &'k Kernel,
    place: PathBuf,
}

impl<'k> Machine<'k> {
    /// Makes the initial file system.
    pub(super) fn of(kernel: &'k Kernel) -> Result<Self> {
        let place = directory().join(format!("machine-{}", kernel.version));
        let root = place.join("root");
        if root.is_dir() {
            fs::remove_dir_all(&root)?;
        }
        for dir in ["bin", "m"] {
            fs::create_dir_all(root.join(dir))?;
        }
        let busybox = run::find("busybox").context("busybox was installed")?;
        fs::copy(&busybox, root.join("bin/busybox"))?;
        copy_libraries(&busybox, &root)?;
        for module in MODULES {
            let modules = kernel.modules.join(&kernel.version).join("kernel");
            let find = format!("{module}.ko*");
            let found = run::capture(run::command("find").arg(modules).args(["-name", &find]))?;
            let Some(path) = found.lines().next() else {
                continue;
            };
            let to = root.join("m").join(format!("{module}.ko"));
            fs::copy(path, to.with_extension("ko.xz"))?;
            if path.ends_with(".xz") {
                run::capture(run::command("xz").arg("-d").arg(to.with_extension("ko.xz")))?;
            } else {
                fs::rename(to.with_extension("ko.xz"), to)?;
            }
        }
        let script = place.join("script.sh").display().to_string();
        let init = INIT.replace("MODULES", &MODULES.join(" "));
        fs::write(root.join("init"), init.replace("SCRIPT", &script))?;
        fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
        let pack = "find . | cpio --quiet --create --format=newc | gzip -1 > ../initrd";
        run::capture(run::command("sh").args(["-c", pack]).current_dir(&root))?;
        Ok(Self { kernel, place })
    }

    /// Starts it for one command line, and waits for its end.
    pub(super) fn run(&self, line: &str) -> Result<Said> {
        let script = SCRIPT
            .replace("LIB", &self.kernel.modules.display().to_string())
            .replace("ROOT", &run::root().display().to_string())
            .replace("LINE", line);
        fs::write(self.place.join("script.sh"), script)?;
        let socket = self.place.join("files.sock");
        let _files = Files::serve(&socket)?;
        let mut qemu = run::command("timeout");
        qemu.args([PATIENCE, "qemu-system-x86_64"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35"])
            .args(["-smp", "2", "-m", "3072", "-nographic", "-nodefaults"])
            .args(["-object", "memory-backend-memfd,id=m,size=3072M,share=on"])
            .args(["-numa", "node,memdev=m", "-serial", "stdio", "-no-reboot"])
            .arg("-chardev")
            .arg(format!("socket,id=c,path={}", socket.display()))
            .args(["-device", "vhost-user-fs-pci,chardev=c,tag=host"])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(self.place.join("initrd"))
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 sysctl.kernel.sysrq=1",
            ])
            .stdin(Stdio::null());
        let output = run::output(&mut qemu)?;
        let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let status = text
            .lines()
            .find_map(|line| line.strip_prefix("machine: exit "))
            .and_then(|code| code.parse().ok());
        Ok(Said { text, status })
    }
}

/// A program's libraries, where it has any.
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    let listed = run::output(run::command("ldd").arg(program))?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a library lies in a directory")?)?;
        fs::copy(library, to)?;
    }
    Ok(())
}

/// This machine's files, for one start; ended on drop.
struct Files(Child);

impl Files {
    fn serve(socket: &Path) -> Result<Self> {
        let _absent = fs::remove_file(socket);
        let child = run::command(VIRTIOFSD)
            .arg(format!("--socket-path={}", socket.display()))
            .args([
                "-o",
                "source=/",
                "-o",
                "sandbox=chroot",
                "-o",
                "cache=always",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {VIRTIOFSD}"))?;
        let files = Self(child);
        let begun = Instant::now();
        while !socket.exists() {
            if begun.elapsed() > Duration::from_secs(10) {
                bail!("{VIRTIOFSD} does not serve");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(files)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}
