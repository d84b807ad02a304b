// SPDX-License-Identifier: Apache-2.0
//! Loads the embedded object: the kernel's verifier accepts every program, hooks attach, and a second
//! start takes over the maps and links of the first.
//!
//! Needs root, cgroup2, bpffs and a kernel with BTF; without them the tests fail.

#![expect(clippy::print_stderr, reason = "a test reports what it leaves behind")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use aya::maps::{Array, Map, MapData};
use aya::programs::{Program, loaded_links};
use aya::{Ebpf, EbpfLoader};
use mesh_datapath::datapath::{MAP_NAMES, pin_directory};
use mesh_datapath::{Config, Datapath};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-bpf"));

/// The most instructions that the verifier may process for one program, loops and branches counted each
/// time: a third of the time budget of a start, and far below the kernel's limit of a million.
const VERIFIER_BUDGET: u32 = 70_000;

/// A cgroup without processes and a directory in bpffs, both removed on drop.
struct Place {
    cgroup: PathBuf,
    bpffs: PathBuf,
}

impl Place {
    fn create(name: &str) -> Self {
        let root = mount_of("cgroup2").expect("cgroup2 is mounted");
        let bpf = mount_of("bpf").expect("bpffs is mounted: run `cargo xtask setup`");
        let name = format!("mesh-load-{name}-{}", process::id());
        let place = Self {
            cgroup: root.join(&name),
            bpffs: bpf.join(&name),
        };
        fs::create_dir(&place.cgroup).expect("root may make a cgroup");
        fs::create_dir(&place.bpffs).expect("root may make a directory in bpffs");
        place
    }

    fn config(&self) -> Config {
        Config {
            bpffs: self.bpffs.clone(),
            cgroup: self.cgroup.clone(),
            trace: cfg!(feature = "trace"),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for result in [
            fs::remove_dir_all(&self.bpffs),
            fs::remove_dir(&self.cgroup),
        ] {
            if let Err(err) = result {
                eprintln!("something is left behind: {err}");
            }
        }
    }
}

fn mount_of(kind: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts are readable");
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find(|(_, fs)| *fs == kind)
        .map(|(path, _)| PathBuf::from(path))
}

/// Returns the links pinned in a directory: link ID to program ID.
fn pinned(directory: &Path) -> BTreeMap<u32, u32> {
    let pins: Vec<_> = fs::read_dir(directory)
        .expect("pins are readable")
        .map(|entry| entry.expect("pins are readable").path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("link_"))
        })
        .map(|path| aya::programs::links::PinnedLink::from_pin(&path).expect("a pinned link"))
        .map(|link| {
            aya::programs::links::FdLink::from(link)
                .info()
                .expect("link info")
                .id()
        })
        .collect();
    loaded_links()
        .filter_map(Result::ok)
        .filter(|link| pins.contains(&link.id()))
        .map(|link| (link.id(), link.program_id()))
        .collect()
}

#[test]
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "every other kind of program is a mistake"
)]
fn every_program_verifies_within_its_budget() {
    let mut object = Ebpf::load(OBJECT).expect("the object loads");
    let mut programs = 0;
    for (name, program) in object.programs_mut() {
        let info = match program {
            Program::CgroupSockAddr(p) => p.load().and_then(|()| p.info()),
            Program::SockOps(p) => p.load().and_then(|()| p.info()),
            Program::SkLookup(p) => p.load().and_then(|()| p.info()),
            Program::SchedClassifier(p) => p.load().and_then(|()| p.info()),
            _ => unreachable!("{name} is not a hook of the mesh"),
        };
        let info = info.unwrap_or_else(|err| panic!("{name} is refused: {err:?}"));
        let verified = info.verified_instruction_count().unwrap_or(0);
        let bytes = info.size_translated().unwrap_or(0);
        println!("{name}: {verified} instructions verified, {bytes} bytes");
        assert!(
            verified <= VERIFIER_BUDGET,
            "{name}: {verified} instructions to verify"
        );
        programs += 1;
    }
    assert_eq!(programs, 12);
}

#[test]
fn every_map_is_pinned_under_its_name() {
    let place = Place::create("maps");
    let object = EbpfLoader::new().load(OBJECT).expect("the object loads");
    let mut declared: Vec<&str> = object
        .maps()
        .map(|(name, _)| name)
        .filter(|name| !name.starts_with('.') && *name != "AYA_LOGS")
        .collect();
    let mut listed = MAP_NAMES.to_vec();
    declared.sort_unstable();
    listed.sort_unstable();
    assert_eq!(declared, listed);

    let (_datapath, _events) = Datapath::load(&place.config()).expect("the datapath loads");
    for name in MAP_NAMES {
        assert!(
            pin_directory(&place.bpffs).join(name).exists(),
            "{name} is not pinned"
        );
    }
}

/// An agent that takes over from one with the earlier name goes on with its map, and leaves the earlier
/// pin to it.
#[test]
fn renamed_map_is_taken_over_with_its_value() {
    let place = Place::create("renamed");
    let pins = pin_directory(&place.bpffs);
    let pin = |name: &str| {
        let map = MapData::from_pin(pins.join(name)).expect("the map is pinned");
        let id = map.info().expect("the map has info").id();
        let array = Array::<_, u64>::try_from(Map::Array(map)).expect("an array");
        (id, array)
    };
    drop(Datapath::load(&place.config()).expect("the datapath loads"));
    let (id, mut array) = pin("CONFIG_GENERATION");
    array.set(0, 4_711, 0).expect("the map takes the value");
    let [earlier, present] = ["FACTS", "CONFIG_GENERATION"].map(|name| pins.join(name));
    fs::rename(present, earlier).expect("bpffs renames pins");

    let _loaded = Datapath::load(&place.config()).expect("the datapath loads again");
    for name in ["CONFIG_GENERATION", "FACTS"] {
        let (found, array) = pin(name);
        assert_eq!(found, id, "{name} is the same map");
        assert_eq!(array.get(&0, 0).expect("the map has the element"), 4_711);
    }
}

#[test]
fn second_start_updates_links_in_place() {
    let place = Place::create("restart");
    let pins = pin_directory(&place.bpffs);
    let first = {
        let _loaded = Datapath::load(&place.config()).expect("the datapath loads");
        pinned(&pins)
    };
    assert_eq!(first.len(), 9, "eight hooks of sockets and sock_ops");
    assert_eq!(
        pinned(&pins),
        first,
        "the links live on without the process that made them"
    );

    let _loaded = Datapath::load(&place.config()).expect("the datapath loads again");
    let second = pinned(&pins);
    assert!(first.keys().eq(second.keys()), "the same links");
    for (link, program) in &second {
        assert_ne!(first[link], *program, "link {link} has the old program");
    }
}
