// SPDX-License-Identifier: Apache-2.0
//! Logs to standard error as text or JSON. The level can be changed at run time, and repeated lines are limited to
//! one a minute for each cause, and for each pod or object that can repeat the cause at will.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal as _};
#[expect(
    clippy::disallowed_types,
    reason = "any thread logs, and holds the lock for one look-up"
)]
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{OnceLock, PoisonError};
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

/// The shortest time between two lines of a cause.
const INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of keys that a cause has limits of their own for; further keys share one.
const MAX_KEYS: usize = 1024;

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
        self.pass_at(uptime())
    }

    /// Returns `true` if the limiter is as good as new: it allows the next line, and has suppressed none.
    fn is_idle(&self, now: Duration) -> bool {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let interval = u64::try_from(INTERVAL.as_millis()).unwrap_or(u64::MAX);
        let is_due = now.saturating_sub(self.last.load(Relaxed)) >= interval;
        is_due && self.held_back.load(Relaxed) == 0
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

/// The time since the first use of a limiter.
fn uptime() -> Duration {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    BEGAN.get_or_init(Instant::now).elapsed()
}

/// A [`Limit`] for each key, such as a pod: one that repeats a cause silences no other.
#[expect(clippy::disallowed_types, reason = "see the import")]
#[derive(Debug, Default)]
pub struct KeyedLimit {
    limits: Mutex<BTreeMap<String, Limit>>,
    /// The limit of the keys that do not fit.
    others: Limit,
}

impl KeyedLimit {
    /// Creates a limiter without keys.
    #[must_use]
    #[expect(clippy::disallowed_types, reason = "see the import")]
    pub const fn new() -> Self {
        Self {
            limits: Mutex::new(BTreeMap::new()),
            others: Limit::new(),
        }
    }

    /// Returns the number of suppressed lines of the key since its last one if a line may be logged now, else
    /// `None`.
    #[must_use]
    pub fn pass(&self, key: &impl ToString) -> Option<u64> {
        self.pass_at(key.to_string(), uptime())
    }

    fn pass_at(&self, key: String, now: Duration) -> Option<u64> {
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if limits.len() >= MAX_KEYS && !limits.contains_key(&key) {
            limits.retain(|_, limit| !limit.is_idle(now));
            if limits.len() >= MAX_KEYS {
                return self.others.pass_at(now);
            }
        }
        limits.entry(key).or_default().pass_at(now)
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

/// `log_limited!(level, key, "message")`: logs a line at most once a minute for each call site and key, with the
/// number of suppressed ones. `key` is any type that implements `Display`.
#[macro_export]
macro_rules! log_limited {
    ($level:ident, $key:expr, $($message:tt)+) => {{
        static LIMIT: $crate::KeyedLimit = $crate::KeyedLimit::new();
        if let Some(held_back) = LIMIT.pass(&$key) {
            $crate::tracing::$level!(held_back, $($message)+);
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

    #[test]
    fn keyed_limit_is_for_each_key_and_bounded() {
        let limit = KeyedLimit::new();
        let seconds = Duration::from_secs;
        let pass = |key: &str, now| limit.pass_at(key.to_owned(), seconds(now));
        assert_eq!(pass("a", 0), Some(0));
        assert_eq!((pass("a", 1), pass("b", 1)), (None, Some(0)));
        for n in 0..2 * MAX_KEYS {
            let _ = pass(&n.to_string(), 2);
        }
        assert_eq!(limit.limits.lock().unwrap().len(), MAX_KEYS);
        assert_eq!(
            pass("new", 3),
            None,
            "the keys that do not fit share one limit"
        );
        assert_eq!(pass("a", 60), Some(1), "a key that has its limit keeps it");
        // Keys with nothing to report make room.
        assert_eq!(pass("new", 63), Some(0));
        assert!(limit.limits.lock().unwrap().len() <= 2);
    }
}
