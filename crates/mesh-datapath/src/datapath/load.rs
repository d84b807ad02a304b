// SPDX-License-Identifier: Apache-2.0
//! Loads the eBPF object with its pinned maps, and attaches or updates the cgroup programs.

use std::fs;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, SchedClassifier, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use mesh_common::maps::VERSION;

use super::writer::Election;
use super::{Config, Datapath, Error, Events, Handles, links, tables};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-bpf"));

/// The names of all maps, under which they are pinned.
pub const NAMES: &[&str] = &[
    "PODS",
    "PODS_BY_NETNS",
    "PODS_BY_ADDR",
    "PODS_BY_LINK",
    "PEERS",
    "POD_CIDRS",
    "POLICY_SETS",
    "POLICY_SELECT",
    "POLICY_CIDRS",
    "POLICY_PORTS",
    "PORT_MODES",
    "SERVICES",
    "BACKENDS",
    "LISTENERS",
    "FLOWS",
    "CONFIG_GENERATION",
    "CAPTURED",
    "OLD_CONNECTIONS",
    "TUNNELS",
    "MARKED",
    "FRAGMENTS",
    "DROP_RATE",
    "EVENTS",
    "COUNTERS",
    "EXEMPT",
    "SOCKETS",
    "VIPS",
];

/// Maps that had another name in an earlier version: (earlier pin, current pin).
const RENAMED: [(&str, &str); 1] = [("FACTS", "CONFIG_GENERATION")];

/// The cgroup programs in update order: those that enforce policy first, those that capture last.
const CGROUP_PROGRAMS: &[&str] = &[
    "getpeername4",
    "getpeername6",
    "recvmsg4",
    "recvmsg6",
    "sendmsg4",
    "sendmsg6",
    "connect4",
    "connect6",
];

/// The name of the sk_lookup program.
pub(super) const INBOUND: &str = "inbound";
/// The names of the gate's two programs.
pub(super) const GATES: [&str; 2] = ["gate_from_pod", "gate_to_pod"];

/// Returns the pin directory of this layout version.
#[must_use]
pub fn pin_directory(bpffs: &Path) -> PathBuf {
    bpffs.join("mesh").join(VERSION)
}

/// Returns the pin directory of a pod's links.
pub(super) fn pod_directory(bpffs: &Path, index: u32) -> PathBuf {
    pin_directory(bpffs).join("pods").join(index.to_string())
}

impl Datapath {
    /// Loads the programs, reuses the pins of an earlier agent, and attaches the cgroup programs. Updates links in
    /// the order gate, sk_lookup, sock_ops, connect, so that each program is ready before traffic is sent to it.
    ///
    /// # Errors
    /// The BPF file system or the cgroup cannot be used, or the kernel rejects a program.
    pub fn load(config: &Config) -> Result<(Self, Events), Error> {
        let pins = pin_directory(&config.bpffs);
        fs::create_dir_all(pins.join("pods")).map_err(|source| Error::Bpffs {
            path: config.bpffs.clone(),
            source,
        })?;
        link_renamed(&pins).map_err(|source| Error::Bpffs {
            path: config.bpffs.clone(),
            source,
        })?;
        let mut object = open(&pins, config.trace)?;
        load_programs(&mut object)?;
        let maps = tables::Maps::take(&mut object)?;
        let events = Events::take(&mut object, &pins)?;
        let handles = Handles::open(&pins).map_err(|source| Error::Bpffs {
            path: config.bpffs.clone(),
            source,
        })?;
        let election = Election::open(&pins).map_err(|source| Error::Bpffs {
            path: config.bpffs.clone(),
            source,
        })?;
        let mut datapath = Self {
            config: config.clone(),
            object,
            maps,
            handles,
            by_uid: std::collections::BTreeMap::new(),
            revision: 0,
            election,
        };
        datapath.revision = datapath.latest_revision();
        datapath.update_pod_links()?;
        attach_cgroup(&mut datapath.object, config, &pins)?;
        Ok((datapath, events))
    }
}

/// Pins renamed maps of an earlier version under their current names as well, so that both versions share the
/// map. Otherwise, the generations in UDP flows would belong to another counter, and a flow that policy now
/// denies could pass until it is idle.
fn link_renamed(pins: &Path) -> std::io::Result<()> {
    for (before, now) in RENAMED {
        match fs::hard_link(pins.join(before), pins.join(now)) {
            Ok(()) => {}
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::AlreadyExists) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn open(pins: &Path, trace: bool) -> Result<Ebpf, Error> {
    let tracing = u32::from(trace);
    let mut loader = EbpfLoader::new();
    loader.override_global("TRACING", &tracing, cfg!(feature = "trace"));
    for name in NAMES {
        loader.map_pin_path(name, pins.join(name));
    }
    loader
        .load(OBJECT)
        .map_err(|source| Error::Object(Box::new(source)))
}

fn load_programs(object: &mut Ebpf) -> Result<(), Error> {
    let failed = |program| {
        move |source| Error::Program {
            program,
            source: Box::new(source),
        }
    };
    for program in GATES {
        gate(object, program)?.load().map_err(failed(program))?;
    }
    inbound(object)?.load().map_err(failed(INBOUND))?;
    sock_ops(object)?.load().map_err(failed(ESTABLISHED))?;
    for program in CGROUP_PROGRAMS {
        sock_addr(object, program)?
            .load()
            .map_err(failed(program))?;
    }
    Ok(())
}

const ESTABLISHED: &str = "established";

/// Returns a program of the gate.
pub(super) fn gate<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, Error> {
    let program = object.program_mut(name).ok_or(Error::Missing(name))?;
    program.try_into().map_err(|source| Error::Program {
        program: name,
        source: Box::new(source),
    })
}

/// Returns the sk_lookup program.
pub(super) fn inbound(object: &mut Ebpf) -> Result<&mut SkLookup, Error> {
    let program = object.program_mut(INBOUND).ok_or(Error::Missing(INBOUND))?;
    program.try_into().map_err(|source| Error::Program {
        program: INBOUND,
        source: Box::new(source),
    })
}

fn sock_ops(object: &mut Ebpf) -> Result<&mut SockOps, Error> {
    let program = object
        .program_mut(ESTABLISHED)
        .ok_or(Error::Missing(ESTABLISHED))?;
    program.try_into().map_err(|source| Error::Program {
        program: ESTABLISHED,
        source: Box::new(source),
    })
}

fn sock_addr<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, Error> {
    let program = object.program_mut(name).ok_or(Error::Missing(name))?;
    program.try_into().map_err(|source| Error::Program {
        program: name,
        source: Box::new(source),
    })
}

/// Attaches or updates the cgroup programs.
fn attach_cgroup(object: &mut Ebpf, config: &Config, pins: &Path) -> Result<(), Error> {
    let target = config.cgroup.display().to_string();
    let attach_error = |program, source| Error::Attach {
        program,
        target: target.clone(),
        source,
    };
    let cgroup = File::open(&config.cgroup).map_err(|source| attach_error("connect4", source))?;

    let program = sock_ops(object)?;
    let fd = program_fd(program.fd(), ESTABLISHED)?;
    if !links::update(&pins.join("link_established"), fd.as_fd())
        .map_err(|source| attach_error(ESTABLISHED, source))?
    {
        let link = program
            .attach(&cgroup, CgroupAttachMode::Single)
            .and_then(|id| program.take_link(id))
            .map_err(std::io::Error::other)
            .and_then(|link| FdLink::try_from(link).map_err(std::io::Error::other))
            .map_err(|source| attach_error(ESTABLISHED, source))?;
        links::pin(link, &pins.join("link_established"))
            .map_err(|source| attach_error(ESTABLISHED, source))?;
    }
    for name in CGROUP_PROGRAMS {
        let path = pins.join(format!("link_{name}"));
        let program = sock_addr(object, name)?;
        let fd = program_fd(program.fd(), name)?;
        if links::update(&path, fd.as_fd()).map_err(|source| attach_error(name, source))? {
            continue;
        }
        // A cgroup link always allows other programs (flags 0). aya passes other modes as flags of the link,
        // which the kernel rejects.
        let link = program
            .attach(&cgroup, CgroupAttachMode::Single)
            .and_then(|id| program.take_link(id))
            .map_err(std::io::Error::other)
            .and_then(|link| FdLink::try_from(link).map_err(std::io::Error::other))
            .map_err(|source| attach_error(name, source))?;
        links::pin(link, &path).map_err(|source| attach_error(name, source))?;
    }
    Ok(())
}

/// Returns a duplicate of a loaded program's descriptor.
pub(super) fn program_fd(
    fd: Result<&aya::programs::ProgramFd, aya::programs::ProgramError>,
    program: &'static str,
) -> Result<std::os::fd::OwnedFd, Error> {
    let fd = fd.map_err(|source| Error::Program {
        program,
        source: Box::new(source),
    })?;
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|source| Error::Attach {
            program,
            target: "its descriptor".to_owned(),
            source,
        })
}
