// SPDX-License-Identifier: Apache-2.0
//! The thread that writes the flow log. It may wait for a slow disk or a full pipe; nobody waits
//! for it.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::{Error, Message};
use crate::metrics::Metrics;
use crate::record::FlowRecord;
use mesh_config::FlowLog;

/// How often it is looked whether the file was renamed or removed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long the first record of a batch waits for others: who sends a record pays for a wake-up of
/// this thread only if it waits for one.
const GATHER: Duration = Duration::from_millis(5);

enum Target {
    Stdout(BufWriter<io::Stdout>),
    File {
        path: PathBuf,
        file: BufWriter<File>,
        looked: Instant,
    },
    Off,
}

pub(super) struct Writer {
    target: Target,
    /// The last lines; the oldest one's memory takes the next.
    recent: VecDeque<String>,
    most_recent: usize,
    metrics: Metrics,
}

fn open(path: &Path) -> io::Result<BufWriter<File>> {
    OpenOptions::new()
        .append(true)
        .create(true)
        // Addresses and names of workloads are not for everybody.
        .mode(0o640)
        .open(path)
        .map(BufWriter::new)
}

impl Writer {
    pub(super) fn open(log: &FlowLog, most_recent: usize, metrics: Metrics) -> Result<Self, Error> {
        let target = match log {
            FlowLog::Stdout => Target::Stdout(BufWriter::new(io::stdout())),
            FlowLog::Off => Target::Off,
            FlowLog::File(path) => Target::File {
                file: open(path).map_err(|source| Error::Open {
                    path: path.clone(),
                    source,
                })?,
                path: path.clone(),
                looked: Instant::now(),
            },
        };
        Ok(Self {
            target,
            recent: VecDeque::with_capacity(most_recent),
            most_recent,
            metrics,
        })
    }

    /// Writes until every sink is gone.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        while let Some(first) = queue.blocking_recv() {
            std::thread::sleep(GATHER);
            self.look();
            let mut written = self.take(first);
            // Whatever waits is written together.
            while let Ok(next) = queue.try_recv() {
                written += self.take(next);
            }
            self.flush(written);
        }
    }

    /// Handles a message; 1 if it put a record into the buffer.
    fn take(&mut self, message: Message) -> u64 {
        match message {
            Message::Record(record) => return self.record(&record),
            Message::Reopen => self.reopen(),
            Message::Recent(answer) => {
                // Who asked may have given up.
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
            full if full == self.most_recent => self.recent.pop_front().unwrap_or_default(),
            _ => String::new(),
        }
        .into_bytes();
        line.clear();
        if let Err(error) = serde_json::to_writer(&mut line, record) {
            self.lost(1, &error);
            return 0;
        }
        line.push(b'\n');
        let written = match &mut self.target {
            Target::Stdout(out) => out.write_all(&line),
            Target::File { file, .. } => file.write_all(&line),
            Target::Off => Ok(()),
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
        let flushed = match &mut self.target {
            Target::Stdout(out) => out.flush(),
            Target::File { file, .. } => file.flush(),
            Target::Off => Ok(()),
        };
        if let Err(error) = flushed {
            self.lost(written, &error);
            // What the buffer holds would be tried again for ever, and block what comes after it.
            self.reopen();
        }
    }

    fn lost(&self, records: u64, error: &dyn std::error::Error) {
        self.metrics.lost(records);
        mesh_log::warn_limited!("flow_log", error, "records of the flow log are lost");
    }

    /// Opens the file again if another program renamed or removed it.
    fn look(&mut self) {
        let Target::File { path, file, looked } = &mut self.target else {
            return;
        };
        if looked.elapsed() < LOOK_EVERY {
            return;
        }
        *looked = Instant::now();
        let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let there = std::fs::metadata(&*path).map(id).ok();
        let ours = file.get_ref().metadata().map(id).ok();
        if there != ours {
            self.reopen();
        }
    }

    fn reopen(&mut self) {
        let Target::File { path, file, .. } = &mut self.target else {
            return;
        };
        match open(path) {
            // The old one writes what it holds when it is dropped.
            Ok(new) => *file = new,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                mesh_log::warn_limited!("flow_log_open", error, "cannot open the flow log");
            }
        }
    }
}
