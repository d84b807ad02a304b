// SPDX-License-Identifier: Apache-2.0
//! Keeps where a program was built out of it: panics name the file they are in, by its path.
//!
//! The kernel programs inside the agent are built by another cargo, which leaves paths out by
//! itself (crates/mesh-datapath/build.rs).

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::run;

/// A directory of this machine.
struct Dir {
    path: PathBuf,
    /// The path that replaces it in programs. It is relative, so that it names no real directory.
    name: &'static str,
    /// The start of what sources below it are called: `/src` alone stands in every program.
    below: &'static str,
}

/// The directories that have no place in a program which is built in `target`.
pub(crate) struct Dirs(Vec<Dir>);

impl Dirs {
    pub(crate) fn of_build(target: &Path) -> Result<Self> {
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
            .context("neither CARGO_HOME nor HOME is set")?;
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let sysroot = run::capture(run::command(rustc).args(["--print", "sysroot"]))?;
        Ok(Self::new(&home, Path::new(sysroot.trim()), target))
    }

    fn new(home: &Path, sysroot: &Path, target: &Path) -> Self {
        let dir = |path: &Path, name, below| Dir {
            path: path.to_owned(),
            name,
            below,
        };
        let mut dirs = vec![
            dir(home, "cargo", "/registry/"),
            dir(sysroot, "rust", "/lib"),
            dir(run::root(), "mesh", "/mesh-"),
            dir(target, "target", "/"),
        ];
        // Of several that fit rustc takes the last: one that lies in another comes after it.
        dirs.sort_by_key(|dir| dir.path.components().count());
        Self(dirs)
    }

    /// Makes this cargo leave them out. Flags of the environment and of configuration files no
    /// longer count, which is as well: they are not in the sources.
    pub(crate) fn leave_out(&self, cargo: &mut Command) {
        let mut flags = OsString::new();
        for Dir { path, name, .. } in &self.0 {
            if !flags.is_empty() {
                flags.push("\x1f");
            }
            flags.push("--remap-path-prefix=");
            flags.push(path);
            flags.push(format!("={name}"));
        }
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags);
    }

    /// Fails if the program names one of them all the same.
    pub(crate) fn ensure_left_out(&self, program: &Path) -> Result<()> {
        let bytes = fs::read(program).with_context(|| format!("no {}", program.display()))?;
        for dir in &self.0 {
            let mut path = dir.path.clone().into_os_string().into_encoded_bytes();
            path.extend(dir.below.as_bytes());
            let found = bytes.windows(path.len()).position(|part| part == path);
            let text = found.map(|at| {
                let end = bytes.len().min(at + path.len() + 80);
                String::from_utf8_lossy(&bytes[at..end]).into_owned()
            });
            ensure!(
                text.is_none(),
                "{} is not the same when built elsewhere: it names {:?}",
                program.display(),
                text.unwrap_or_default()
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> Dirs {
        Dirs::new(
            Path::new("/src"),
            Path::new("/opt/rust"),
            &run::root().join("target/x"),
        )
    }

    #[test]
    fn nested_build_directory_is_replaced_by_its_own_name() {
        let mut cargo = Command::new("cargo");
        dirs().leave_out(&mut cargo);
        let flags = cargo.get_envs().next().and_then(|(_, flags)| flags);
        let flags = flags.and_then(|flags| flags.to_str()).expect("flags");
        let flags: Vec<&str> = flags.split('\x1f').collect();
        let root = run::root().display();
        assert_eq!(flags[0], "--remap-path-prefix=/src=cargo");
        let of = |flag: String| flags.iter().position(|other| *other == flag);
        let outer = of(format!("--remap-path-prefix={root}=mesh")).expect("the workspace");
        let inner = of(format!("--remap-path-prefix={root}/target/x=target")).expect("the target");
        assert!(outer < inner, "{flags:?}");
    }

    #[test]
    fn program_with_build_paths_is_refused() {
        let root = run::root().display();
        let file = env::temp_dir().join(format!("xtask-paths-{}", std::process::id()));
        for (text, refused) in [
            (
                "\0cargo/registry/src/x/y/lib.rsmesh/mesh-agent/lib.rs".to_owned(),
                false,
            ),
            // Not a path of the machine: part of the name of another source.
            ("\0rust/lib/core/src".to_owned(), false),
            ("called unwrap/src/registry/src/x/lib.rs".to_owned(), true),
            ("\0/opt/rust/lib/rustlib/src/core.rs".to_owned(), true),
            (format!("\0{root}/mesh-agent/src/main.rs"), true),
            (format!("\0{root}/target/x/release/build/out.rs"), true),
        ] {
            fs::write(&file, &text).expect("the file is ours");
            let result = dirs().ensure_left_out(&file);
            assert_eq!(result.is_err(), refused, "{text}: {result:?}");
        }
        fs::remove_file(file).expect("the file is ours");
    }
}
