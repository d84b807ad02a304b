// SPDX-License-Identifier: Apache-2.0
//! Logs to standard error as text or JSON. The level can be changed at run time, and repeated warnings are
//! limited to one a minute for each cause.

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
    /// Human-readable text.
    Text,
    /// One JSON object per line.
    Json,
}

/// The log configuration of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// The format of log lines.
    pub format: LogFormat,
    /// A level, or directives of the form `target=level`, separated by commas.
    pub level: String,
}

/// A handle that changes the log level of the process.
#[derive(Clone, Debug)]
pub struct Level(reload::Handle<EnvFilter, Registry>);

impl Level {
    /// Returns the current directives.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Replaces the directives: a level, or `target=level`, separated by commas.
    ///
    /// # Errors
    /// The directives are invalid; the previous ones stay.
    pub fn set(&self, directives: &str) -> Result<(), String> {
        let filter = filter(directives)?;
        self.0.reload(filter).map_err(|error| error.to_string())
    }
}

/// Parses a level, or `target=level` directives separated by commas.
///
/// # Errors
/// The message for the operator: what was expected, and which part of the directives is invalid.
pub fn filter(directives: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(directives)
        .map_err(|error| format!("expected a level, or TARGET=LEVEL,..: {error}"))
}

/// Why logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The directives are invalid.
    #[error("invalid log level: {0}")]
    Level(String),
    /// The process has a logger already.
    #[error("logging is already set up")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Sets up logging for the process. Call it once.
///
/// # Errors
/// The level is invalid, or logging is already set up.
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

/// The shortest time between two warnings of a cause.
const INTERVAL: Duration = Duration::from_secs(60);

/// A rate limiter that allows one warning of a cause a minute, and counts the suppressed ones.
#[derive(Debug)]
pub struct Limit {
    /// The time of the last warning in milliseconds since the first call of [`Self::pass`], plus 1; 0 = never.
    last: AtomicU64,
    held_back: AtomicU64,
}

impl Default for Limit {
    fn default() -> Self {
        Self::new()
    }
}

impl Limit {
    /// Creates a limiter that allows the next warning.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            held_back: AtomicU64::new(0),
        }
    }

    /// Returns the number of suppressed warnings since the last one if a warning may be logged now, else `None`.
    #[must_use]
    pub fn pass(&self) -> Option<u64> {
        static BEGAN: OnceLock<Instant> = OnceLock::new();
        self.pass_at(BEGAN.get_or_init(Instant::now).elapsed())
    }

    fn pass_at(&self, now: Duration) -> Option<u64> {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let interval = u64::try_from(INTERVAL.as_millis()).unwrap_or(u64::MAX);
        let last = self.last.load(Relaxed);
        let due = last == 0 || now.saturating_sub(last) >= interval;
        // Only one of several concurrent threads succeeds.
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

/// Displays an error with all its causes in one line.
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

/// `warn_limited!("cause", error, "message")`: logs a warning at most once a minute for each call site, with the
/// number of suppressed ones. `error` is any type that implements `Display`.
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
    fn limit_allows_one_warning_a_minute_and_counts_others() {
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
    fn invalid_directives_are_rejected_with_a_reason() {
        assert!(filter("info,mesh_agent::proxy=debug").is_ok());
        assert!(
            filter("mesh=loud")
                .unwrap_err()
                .contains("expected a level")
        );
    }

    #[test]
    fn chain_displays_every_cause() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the flow log")]
        struct Outer(#[source] io::Error);

        let text = Chain(&Outer(io::Error::other("disk on fire"))).to_string();
        assert_eq!(text, "cannot open the flow log: disk on fire");
    }
}
