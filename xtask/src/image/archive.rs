// SPDX-License-Identifier: Apache-2.0
//! Tar archives and blobs without a trace of when, where or by whom they were made.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Records of an archive.
const BLOCK: usize = 512;

/// A piece of an image, known by the hash of its bytes.
#[derive(Clone)]
pub(super) struct Blob {
    kind: &'static str,
    pub(super) bytes: Vec<u8>,
    /// `sha256:HEX`.
    pub(super) digest: String,
}

impl Blob {
    pub(super) fn new(kind: &'static str, bytes: Vec<u8>) -> Self {
        let hash = Sha256::digest(&bytes);
        let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            kind,
            bytes,
            digest: format!("sha256:{hex}"),
        }
    }

    pub(super) fn hex(&self) -> &str {
        &self.digest["sha256:".len()..]
    }

    pub(super) fn descriptor(&self) -> Value {
        json!({ "mediaType": self.kind, "digest": self.digest, "size": self.bytes.len() })
    }
}

/// A ustar archive: everything belongs to root and is as old as time.
#[derive(Default)]
pub(super) struct Tar(Vec<u8>);

impl Tar {
    pub(super) fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.header(name, mode, bytes.len(), b'0')?;
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    pub(super) fn directory(&mut self, name: &str) -> Result<()> {
        self.header(&format!("{name}/"), 0o755, 0, b'5')
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }

    /// Writes a header of POSIX.1-1988 (ustar): text fields end with NUL, numbers are octal.
    fn header(&mut self, name: &str, mode: u32, size: usize, kind: u8) -> Result<()> {
        ensure!(name.len() < 100, "{name}: too long a name");
        let mut header = [0_u8; BLOCK];
        let mut put = |at: usize, text: &str| {
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
        };
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{size:011o}"));
        put(136, "00000000000");
        put(148, "        ");
        put(156, &char::from(kind).to_string());
        put(257, "ustar\0");
        put(263, "00");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend_from_slice(&header);
        Ok(())
    }
}

/// Seconds since 1970 as RFC 3339, by the civil calendar.
pub(super) fn date(seconds: i64) -> String {
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let mut year = 1970;
    let mut left = day.max(0);
    let leap = |year: i64| (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    while left >= 365 + i64::from(leap(year)) {
        left -= 365 + i64::from(leap(year));
        year += 1;
    }
    let months = [
        31,
        28 + i64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for days in months {
        if left < days {
            break;
        }
        left -= days;
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}Z",
        left + 1,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_dates_are_calendar_dates() {
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(date(1_767_225_599), "2025-12-31T23:59:59Z");
    }

    #[test]
    fn tar_extracts_written_archive() {
        let mut tar = Tar::default();
        tar.directory("d").expect("short");
        tar.file("d/f", 0o755, b"hello").expect("short");
        let file = std::env::temp_dir().join(format!("xtask-tar-{}.tar", std::process::id()));
        std::fs::write(&file, tar.finish()).expect("the file is ours");
        let mut list = crate::run::command("tar");
        list.args(["--list", "--verbose", "--utc", "--file"])
            .arg(&file);
        let said = crate::run::capture(&mut list).expect("tar reads it");
        std::fs::remove_file(file).expect("the file is ours");
        let lines: Vec<&str> = said.lines().collect();
        assert!(
            lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with("d/"),
            "{said}"
        );
        assert!(
            lines[1].starts_with("-rwxr-xr-x") && lines[1].contains(" 5 1970-01-01"),
            "{said}"
        );
    }
}
