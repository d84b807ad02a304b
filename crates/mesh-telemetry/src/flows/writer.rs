// SPDX-License-Identifier: Apache-2.0
//! The writer thread of the flow log. It may block on a slow disk or a full pipe; no other thread waits
//! for it.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::{Error, Message, Target};
use crate::metrics::Metrics;
use crate::record::FlowRecord;

/// Interval of checking whether the file was renamed or removed.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Time that the first record of a batch waits for others: a sender pays for a wake-up of this thread
/// only if the thread waits.
const GATHER: Duration = Duration::from_millis(5);

enum Output {
    Stdout(BufWriter<io::Stdout>),
    File {
        path: PathBuf,
        file: BufWriter<File>,
        checked: Instant,
    },
    Off,
}

pub(super) struct Writer {
    output: Output,
    /// The last records; the memory of the oldest is reused for the next.
    recent: VecDeque<String>,
    max_recent: usize,
    metrics: Metrics,
}

fn open(path: &Path) -> io::Result<BufWriter<File>> {
    OpenOptions::new()
        .append(true)
        .create(true)
        // Addresses and workload names are confidential.
        .mode(0o640)
        .open(path)
        .map(BufWriter::new)
}

impl Writer {
    pub(super) fn open(
        target: &Target,
        max_recent: usize,
        metrics: Metrics,
    ) -> Result<Self, Error> {
        let output = match target {
            Target::Stdout => Output::Stdout(BufWriter::new(io::stdout())),
            Target::Off => Output::Off,
            Target::File(path) => Output::File {
                file: open(path).map_err(|source| Error::Open {
                    path: path.clone(),
                    source,
                })?,
                path: path.clone(),
                checked: Instant::now(),
            },
        };
        Ok(Self {
            output,
            recent: VecDeque::with_capacity(max_recent),
            max_recent,
            metrics,
        })
    }

    /// Writes until every sink is dropped.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        while let Some(first) = queue.blocking_recv() {
            std::thread::sleep(GATHER);
            self.check_file();
            let mut written = self.take(first);
            // All waiting records are written together.
            while let Ok(next) = queue.try_recv() {
                written += self.take(next);
            }
            self.flush(written);
        }
    }

    /// Handles a message; returns 1 if it put a record into the buffer.
    fn take(&mut self, message: Message) -> u64 {
        match message {
            Message::Record(record) => return self.record(&record),
            Message::Reopen => self.reopen(),
            Message::Recent(answer) => {
                // The request may have been canceled.
                drop(
                    answer.send(
                        self.recent
                            .iter()
                            .map(|line| line.as_str().into())
                            .collect(),
                    ),
                );
            }
        }
        0
    }

    fn record(&mut self, record: &FlowRecord) -> u64 {
        let mut line = match self.recent.len() {
            full if full == self.max_recent => self.recent.pop_front().unwrap_or_default(),
            _ => String::new(),
        }
        .into_bytes();
        line.clear();
        if let Err(error) = serde_json::to_writer(&mut line, record) {
            self.lost(1, &error);
            return 0;
        }
        line.push(b'\n');
        let written = match &mut self.output {
            Output::Stdout(out) => out.write_all(&line),
            Output::File { file, .. } => file.write_all(&line),
            Output::Off => Ok(()),
        };
        line.pop();
        self.recent
            .push_back(String::from_utf8(line).unwrap_or_default());
        match written {
            Ok(()) => 1,
            Err(error) => {
                self.lost(1, &error);
                0
            }
        }
    }

    fn flush(&mut self, written: u64) {
        let flushed = match &mut self.output {
            Output::Stdout(out) => out.flush(),
            Output::File { file, .. } => file.flush(),
            Output::Off => Ok(()),
        };
        if let Err(error) = flushed {
            self.lost(written, &error);
            // The buffer would be retried forever and block all later records.
            self.reopen();
        }
    }

    fn lost(&self, records: u64, error: &dyn std::error::Error) {
        self.metrics.lost(records);
        mesh_log::warn_limited!(
            "flow_log",
            error,
            "cannot write to the flow log; records are lost"
        );
    }

    /// Reopens the file if it was renamed or removed.
    fn check_file(&mut self) {
        let Output::File {
            path,
            file,
            checked,
        } = &mut self.output
        else {
            return;
        };
        if checked.elapsed() < CHECK_EVERY {
            return;
        }
        *checked = Instant::now();
        let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let there = std::fs::metadata(&*path).map(id).ok();
        let ours = file.get_ref().metadata().map(id).ok();
        if there != ours {
            self.reopen();
        }
    }

    fn reopen(&mut self) {
        let Output::File { path, file, .. } = &mut self.output else {
            return;
        };
        match open(path) {
            // Dropping the old file flushes it.
            Ok(new) => *file = new,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                mesh_log::warn_limited!("flow_log_open", error, "cannot reopen the flow log");
            }
        }
    }
}
