// SPDX-License-Identifier: Apache-2.0
//! Elects the one agent of a node that writes the datapath. While an update replaces an agent two of them run, and
//! the newest one writes: its plan and its listeners must not be replaced by those of an agent that is about to
//! exit.
//!
//! An agent writes while it holds the lock of the seat. A successor takes the lock of the bid, by which the writer
//! learns of it and gives up the seat. The kernel releases both locks at a process's end, so that the writer of
//! before writes again if its successor dies.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time after which a successor writes although the writer of before has not given up the seat: it hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// The part that an agent has in the election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Waits for the seat, and holds the bid if no other agent does.
    Successor { since: Instant },
    /// Writes. The seat is missing if the writer of before hangs.
    Writer { has_seat: bool },
    /// A successor writes.
    Replaced,
    /// The agent shuts down and does not write again.
    Retired,
}

/// The election of this node, as one agent takes part in it.
#[derive(Debug)]
pub(super) struct Election {
    seat: File,
    bid: File,
    role: Role,
}

impl Election {
    /// Opens the locks, which are directories: files below bpffs are pins, which cannot be locked.
    pub(super) fn open(pins: &Path) -> io::Result<Self> {
        let lock = |name: &str| {
            let path = pins.join(name);
            fs::create_dir_all(&path)?;
            File::open(path)
        };
        Ok(Self {
            seat: lock("writer")?,
            bid: lock("successor")?,
            role: Role::Successor {
                since: Instant::now(),
            },
        })
    }

    /// Returns `true` if this agent is the one to write. Call it before each series of writes, and every few
    /// milliseconds while it returns `false`.
    ///
    /// # Errors
    /// A lock operation failed; the role is as before.
    pub(super) fn is_writer(&mut self, now: Instant) -> io::Result<bool> {
        match self.role {
            Role::Writer { has_seat: true } => {
                if try_lock(&self.bid)? {
                    self.bid.unlock()?;
                } else {
                    self.seat.unlock()?;
                    self.role = Role::Replaced;
                }
            }
            Role::Writer { has_seat: false } => {
                self.take_seat()?;
            }
            Role::Successor { since } => {
                let taken = try_lock(&self.bid)? && self.take_seat()?;
                if !taken && now.duration_since(since) >= PATIENCE {
                    self.role = Role::Writer { has_seat: false };
                }
            }
            Role::Replaced => {
                if try_lock(&self.bid)? && !self.take_seat()? {
                    self.bid.unlock()?;
                }
            }
            Role::Retired => {}
        }
        Ok(matches!(self.role, Role::Writer { .. }))
    }

    /// Gives up the seat for good.
    pub(super) fn retire(&mut self) -> io::Result<()> {
        self.role = Role::Retired;
        self.seat.unlock()?;
        self.bid.unlock()
    }

    /// Takes the seat if it is free, and releases the bid then.
    fn take_seat(&mut self) -> io::Result<bool> {
        let taken = try_lock(&self.seat)?;
        if taken {
            self.role = Role::Writer { has_seat: true };
            self.bid.unlock()?;
        }
        Ok(taken)
    }
}

fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn agents<const N: usize>(dir: &TempDir) -> [Election; N] {
        std::array::from_fn(|_| Election::open(dir.path()).unwrap())
    }

    fn poll(agent: &mut Election) -> bool {
        agent.is_writer(Instant::now()).unwrap()
    }

    #[test]
    fn newest_agent_writes_and_no_two_do() {
        let dir = TempDir::new().unwrap();
        let [mut old, mut new] = agents(&dir);
        assert!(poll(&mut old), "the only agent writes at once");
        assert!(!poll(&mut new), "the writer has not given up its seat");
        assert!(!poll(&mut old), "the writer learns of its successor");
        assert!(
            !poll(&mut old),
            "the seat is free, but the bid is its successor's"
        );
        assert!(poll(&mut new));
        assert!(!poll(&mut old));
        assert!(
            poll(&mut new),
            "the agent that was replaced does not come back"
        );
    }

    #[test]
    fn replaced_agent_writes_again_after_its_successor_ends() {
        let dir = TempDir::new().unwrap();
        let [mut old, mut new] = agents(&dir);
        assert!(poll(&mut old));
        assert!(!poll(&mut new));
        assert!(!poll(&mut old));
        drop(new);
        assert!(poll(&mut old), "the successor ended before it wrote");
        let [mut new] = agents(&dir);
        assert!(!poll(&mut new));
        assert!(!poll(&mut old));
        assert!(poll(&mut new));
        drop(new);
        assert!(
            poll(&mut old),
            "the successor ended while it was the writer"
        );
    }

    #[test]
    fn agent_that_shuts_down_leaves_the_seat() {
        let dir = TempDir::new().unwrap();
        let [mut old, mut new] = agents(&dir);
        assert!(poll(&mut old));
        old.retire().unwrap();
        assert!(!poll(&mut old));
        assert!(poll(&mut new));
    }

    #[test]
    fn successors_take_their_turns() {
        let dir = TempDir::new().unwrap();
        let [mut old, mut first, mut second] = agents(&dir);
        assert!(poll(&mut old));
        assert!(!poll(&mut first));
        assert!(!poll(&mut second));
        assert!(!poll(&mut old));
        assert!(poll(&mut first));
        assert!(!poll(&mut second));
        assert!(!poll(&mut first));
        assert!(poll(&mut second));
        assert!(!poll(&mut old) && !poll(&mut first) && poll(&mut second));
    }

    #[test]
    fn successor_does_not_wait_for_an_agent_that_hangs() {
        let dir = TempDir::new().unwrap();
        let [mut hung, mut new, mut next] = agents(&dir);
        assert!(poll(&mut hung));
        assert!(!poll(&mut new));
        let later = Instant::now() + PATIENCE;
        assert!(new.is_writer(later).unwrap());
        assert!(
            !poll(&mut hung),
            "the agent learns of its successor when it goes on"
        );
        assert!(poll(&mut new));
        assert!(!poll(&mut next));
        assert!(!poll(&mut new));
        assert!(poll(&mut next));
    }
}
