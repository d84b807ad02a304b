// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask image`: an OCI image of the agent and `meshctl`, without docker.
//!
//! One layer with two static programs and nothing else: no shell, no libc, no package to update.
//! Linked statically with glibc, because the toolchains at hand have no musl target; only the last
//! step differs from a plain build. The same programs give the same image, bit for bit. So does a
//! build of the same sources elsewhere, by the same Rust, C compiler, linker and glibc: of where it
//! was built nothing is in it. Only with `--dev`, which builds everything below the programs once
//! for plain builds and for itself, programs name the directories of this machine.

mod archive;
mod paths;
mod sbom;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{build, run};
use archive::{Blob, Tar};
use paths::Dirs;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory in which the image is written
    #[arg(long, default_value = "target/image", value_name = "DIR")]
    output: PathBuf,
    /// Name of the image
    #[arg(long, default_value = concat!("localhost/mesh:", env!("CARGO_PKG_VERSION")))]
    name: String,
    /// Build without optimization and reproducibility: quicker, for tests
    #[arg(long)]
    dev: bool,
    /// Take the programs from this directory instead of building them
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Creation time of the image in seconds since 1970, so that it does not depend on the build
    #[arg(
        long,
        env = "SOURCE_DATE_EPOCH",
        default_value_t = 0,
        value_name = "SECONDS"
    )]
    created: i64,
}

impl Args {
    /// Returns the arguments for the image of the tests.
    pub(crate) fn for_tests(dev: bool) -> Self {
        Self {
            output: PathBuf::from("target/image"),
            name: concat!("localhost/mesh:", env!("CARGO_PKG_VERSION")).to_owned(),
            dev,
            programs: None,
            created: 0,
        }
    }
}

/// The package and name of each program.
const PROGRAMS: [(&str, &str); 3] = [
    ("mesh-agent", "mesh-agent"),
    ("mesh-controller", "mesh-controller"),
    ("mesh-cli", "meshctl"),
];

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The default user of containers, without privileges. The pods of the agent run as root.
const USER: &str = "65532:65532";

pub(crate) fn run(args: &Args) -> Result<()> {
    let programs = match &args.programs {
        Some(dir) => dir.clone(),
        None => run::timed("build", || build(args.dev))?,
    };
    let sbom = sbom::sbom()?;
    let image = Image::new(&args.name, args.created, &layer(&programs, &sbom)?)?;
    let output = run::root().join(&args.output);
    image.write(&output)?;
    fs::write(output.join("sbom.cdx.json"), &sbom)?;
    println!("image {} {}", args.name, image.manifest.digest);
    println!("layer {}", image.layer.digest);
    println!("wrote {}: oci/, image.tar, sbom.cdx.json", output.display());
    Ok(())
}

/// Builds the programs, static and without symbols, and returns their directory.
fn build(dev: bool) -> Result<PathBuf> {
    let target = std::env::current_exe()?;
    let target = target.ancestors().nth(2).context("no target directory")?;
    let (target, dirs) = if dev {
        (target.to_owned(), None)
    } else {
        // Flags that leave paths out make everything another build than a plain one.
        let target = target.join("image-build");
        let dirs = Dirs::of_build(&target)?;
        (target, Some(dirs))
    };
    for (package, name) in PROGRAMS {
        let mut cargo = run::cargo(["rustc", "--package", package, "--bin", name]);
        cargo.arg("--target-dir").arg(&target);
        if let Some(dirs) = &dirs {
            cargo.arg("--release");
            dirs.leave_out(&mut cargo);
        } else if package == "mesh-agent" {
            cargo.args(build::TEST_FEATURES);
        }
        cargo.args(["--", "-C", "target-feature=+crt-static"]);
        // The linker's id is a hash of more than what ends up in the program.
        cargo.args(["-C", "strip=symbols", "-C", "link-arg=-Wl,--build-id=none"]);
        run::show(&mut cargo)?;
    }
    let dir = target.join(if dev { "debug" } else { "release" });
    for (_, name) in PROGRAMS {
        let program = dir.join(name);
        ensure_static(&program)?;
        if let Some(dirs) = &dirs {
            dirs.ensure_left_out(&program)?;
        }
    }
    Ok(dir)
}

/// Checks that a program needs no dynamic linker, which the image does not have.
fn ensure_static(program: &PathBuf) -> Result<()> {
    let bytes = fs::read(program).with_context(|| format!("no {}", program.display()))?;
    let interpreter = bytes.windows(11).any(|part| part == b"/ld-linux-x");
    // The path stands in the code of every static glibc, too: what counts is the header that
    // names it, of type 3, in the table of program headers (ELF-64, little endian).
    let word = |at: usize, count: usize| {
        let bytes = bytes.get(at..at + count)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte)),
        )
    };
    let headers = || {
        let (start, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
        Some((0..count).any(|index| word(start + index * size, 4) == Some(3)))
    };
    ensure!(
        !interpreter || headers() == Some(false),
        "{} is linked dynamically",
        program.display()
    );
    Ok(())
}

/// Builds the layer of the image.
fn layer(programs: &std::path::Path, sbom: &[u8]) -> Result<Blob> {
    let mut tar = Tar::default();
    for (_, name) in PROGRAMS {
        let path = programs.join(name);
        let bytes = fs::read(&path).with_context(|| format!("no {}", path.display()))?;
        tar.file(name, 0o755, &bytes)?;
    }
    // Where the agent's own places are mounted: with a read-only root nobody can make them.
    for dir in ["run", "run/mesh", "var", "var/lib", "var/lib/mesh", "tmp"] {
        tar.directory(dir)?;
    }
    tar.directory("usr")?;
    tar.directory("usr/share")?;
    tar.directory("usr/share/doc")?;
    tar.file("usr/share/doc/sbom.cdx.json", 0o644, sbom)?;
    Ok(Blob::new(LAYER, tar.finish()))
}

/// The blobs of an image.
struct Image {
    name: String,
    layer: Blob,
    config: Blob,
    manifest: Blob,
}

impl Image {
    fn new(name: &str, created: i64, layer: &Blob) -> Result<Self> {
        let labels = json!({
            "org.opencontainers.image.title": "mesh",
            "org.opencontainers.image.description": "Agent and controller of a service mesh without sidecars",
            "org.opencontainers.image.licenses": "Apache-2.0 AND (MIT OR GPL-2.0-only OR Apache-2.0)",
            "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.image.revision": revision(),
        });
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": archive::date(created),
            "config": {
                "User": USER, "Entrypoint": ["/mesh-agent"], "WorkingDir": "/",
                "Env": ["PATH=/"], "Labels": labels,
            },
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
        });
        let config = Blob::new(CONFIG, serde_json::to_vec(&config)?);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor(),
            "layers": [layer.descriptor()], "annotations": labels,
        });
        Ok(Self {
            name: name.to_owned(),
            layer: layer.clone(),
            config,
            manifest: Blob::new(MANIFEST, serde_json::to_vec(&manifest)?),
        })
    }

    fn index(&self) -> Value {
        let mut manifest = self.manifest.descriptor();
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": tag,
        });
        json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] })
    }

    /// Writes the OCI layout as a directory and as an archive.
    fn write(&self, output: &std::path::Path) -> Result<()> {
        let layout = output.join("oci");
        if layout.exists() {
            fs::remove_dir_all(&layout)?;
        }
        fs::create_dir_all(layout.join("blobs/sha256"))?;
        let mut files = vec![
            (
                "oci-layout".to_owned(),
                br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
            ),
            ("index.json".to_owned(), serde_json::to_vec(&self.index())?),
        ];
        for blob in [&self.layer, &self.config, &self.manifest] {
            files.push((format!("blobs/sha256/{}", blob.hex()), blob.bytes.clone()));
        }
        let mut tar = Tar::default();
        for dir in ["blobs", "blobs/sha256"] {
            tar.directory(dir)?;
        }
        for (name, bytes) in &files {
            fs::write(layout.join(name), bytes)?;
            tar.file(name, 0o644, bytes)?;
        }
        fs::write(output.join("image.tar"), tar.finish())?;
        Ok(())
    }
}

/// Returns the commit of the sources, or `unknown` outside a git repository.
fn revision() -> String {
    let head =
        run::capture(run::command("git").args(["-c", "safe.directory=*", "rev-parse", "HEAD"]));
    head.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs(dir: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xtask-{dir}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("the directory is ours");
        for (_, name) in PROGRAMS {
            fs::write(dir.join(name), format!("program {name}")).expect("the directory is ours");
        }
        dir
    }

    #[test]
    fn image_is_reproducible_in_any_directory() {
        let mut images = Vec::new();
        for dir in ["one", "two"] {
            let dir = programs(dir);
            let image = Image::new("a:1", 0, &layer(&dir, b"{}").expect("layer")).expect("image");
            image.write(&dir.join("out")).expect("written");
            let archive = fs::read(dir.join("out/image.tar")).expect("archive");
            images.push((image.manifest.digest, archive));
            fs::remove_dir_all(dir).expect("the directory is ours");
        }
        assert!(images[0] == images[1], "images differ");
    }

    #[test]
    fn image_digest_depends_on_programs() {
        let dir = programs("three");
        let before = layer(&dir, b"{}").expect("layer").digest;
        fs::write(dir.join("meshctl"), "other").expect("the directory is ours");
        assert_ne!(layer(&dir, b"{}").expect("layer").digest, before);
        fs::remove_dir_all(dir).expect("the directory is ours");
    }

    #[test]
    fn image_config_has_labels_and_date() {
        let dir = programs("four");
        let image = Image::new("a:1", 86_400, &layer(&dir, b"{}").expect("layer")).expect("image");
        fs::remove_dir_all(dir).expect("the directory is ours");
        let read = |blob: &Blob| serde_json::from_slice::<Value>(&blob.bytes).expect("JSON");
        let (config, manifest) = (read(&image.config), read(&image.manifest));
        let labels = &config["config"]["Labels"];
        for (label, expected) in [
            ("title", "mesh"),
            ("version", env!("CARGO_PKG_VERSION")),
            (
                "licenses",
                "Apache-2.0 AND (MIT OR GPL-2.0-only OR Apache-2.0)",
            ),
        ] {
            let label = format!("org.opencontainers.image.{label}");
            assert_eq!(labels[&label], expected, "{label}");
        }
        assert_eq!(&manifest["annotations"], labels);
        assert_eq!(config["created"], "1970-01-02T00:00:00Z");
        assert_eq!(config["config"]["User"], USER);
    }

    #[test]
    fn dynamically_linked_program_is_refused() {
        let sh = PathBuf::from("/bin/sh");
        assert!(ensure_static(&sh).is_err(), "Debian's sh is dynamic");
    }
}
