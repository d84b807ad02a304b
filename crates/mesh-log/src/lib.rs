// SPDX-License-Identifier: Apache-2.0
//! Logs on standard error: text or JSON, a level that can be changed at run time, and warnings
//! that come at most once a minute for each cause.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub use tracing;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, reload};

/// The format of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// How a process logs on standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// The format of a line.
    pub format: LogFormat,
    /// A level, or directives of the form `target=level`, separated by commas.
    pub level: String,
}

/// Changes the level of the process's logs.
#[derive(Clone, Debug)]
pub struct Level(reload::Handle<EnvFilter, Registry>);

impl Level {
    /// The directives in force.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Puts directives in force: a level, or `target=level`, separated by commas.
    ///
    /// # Errors
    /// What is wrong with them; the old ones stay in force.
    pub fn set(&self, directives: &str) -> Result<(), String> {
        let filter = filter(directives)?;
        self.0.reload(filter).map_err(|error| error.to_string())
    }
}

/// Parses a level, or `target=level` directives separated by commas.
///
/// # Errors
/// The text that the operator reads: what was expected, and where the directives are wrong.
pub fn filter(directives: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(directives)
        .map_err(|error| format!("expected a level, or TARGET=LEVEL,..: {error}"))
}

/// Why there are no logs.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The directives are wrong.
    #[error("log level: {0}")]
    Level(String),
    /// The process has logs already.
    #[error("logs were set up before")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Sets up the process's logs, once.
///
/// # Errors
/// If the level is wrong, or this was called before.
pub fn init(config: &LogConfig) -> Result<Level, InitError> {
    let (filter, handle) = reload::Layer::new(filter(&config.level).map_err(InitError::Level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(InitError::Twice)?;
    Ok(Level(handle))
}

/// One warning of a cause is logged in this time.
const ONCE_IN: Duration = Duration::from_secs(60);

/// Lets one warning of a cause through in a minute, and counts the others.
#[derive(Debug)]
pub struct Limit {
    /// Milliseconds of the process's life, plus 1; 0 = never.
    last: AtomicU64,
    held_back: AtomicU64,
}

impl Default for Limit {
    fn default() -> Self {
        Self::new()
    }
}

impl Limit {
    /// Lets the next one through.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            held_back: AtomicU64::new(0),
        }
    }

    /// `Some(how many were held back since the last)` if one may be logged now.
    #[must_use]
    pub fn pass(&self) -> Option<u64> {
        static BEGAN: OnceLock<Instant> = OnceLock::new();
        self.pass_at(BEGAN.get_or_init(Instant::now).elapsed())
    }

    fn pass_at(&self, now: Duration) -> Option<u64> {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let once_in = u64::try_from(ONCE_IN.as_millis()).unwrap_or(u64::MAX);
        let last = self.last.load(Relaxed);
        let due = last == 0 || now.saturating_sub(last) >= once_in;
        // Of several threads that find it due, one wins.
        if due
            && self
                .last
                .compare_exchange(last, now, Relaxed, Relaxed)
                .is_ok()
        {
            Some(self.held_back.swap(0, Relaxed))
        } else {
            self.held_back.fetch_add(1, Relaxed);
            None
        }
    }
}

/// An error with everything that caused it, in one line.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// `warn_limited!("cause", error, "message")`: logs a warning, at most one a minute from this
/// place, with how many were held back. `error` is anything that can be displayed.
#[macro_export]
macro_rules! warn_limited {
    ($cause:literal, $error:expr, $($message:tt)+) => {{
        static LIMIT: $crate::Limit = $crate::Limit::new();
        if let Some(held_back) = LIMIT.pass() {
            $crate::tracing::warn!(cause = $cause, error = %$error, held_back, $($message)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_a_minute_with_a_count() {
        let limit = Limit::new();
        let seconds = Duration::from_secs;
        assert_eq!(limit.pass_at(seconds(0)), Some(0));
        for second in 1..60 {
            assert_eq!(limit.pass_at(seconds(second)), None);
        }
        assert_eq!(limit.pass_at(seconds(60)), Some(59));
        assert_eq!(limit.pass_at(seconds(61)), None);
        assert_eq!(limit.pass_at(seconds(500)), Some(1));
    }

    #[test]
    fn wrong_directives_are_refused_with_a_reason() {
        assert!(filter("info,mesh_agent::proxy=debug").is_ok());
        assert!(
            filter("mesh=loud")
                .unwrap_err()
                .contains("expected a level")
        );
    }

    #[test]
    fn a_chain_names_every_cause() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the flow log")]
        struct Outer(#[source] io::Error);

        let text = Chain(&Outer(io::Error::other("disk on fire"))).to_string();
        assert_eq!(text, "cannot open the flow log: disk on fire");
    }
}
