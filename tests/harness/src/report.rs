//! What `mesh-peer` reports, one JSON object a line: written by the program, read by the harness.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Percentiles of a duration, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// How many were measured.
    pub count: u64,
    /// Their mean.
    pub mean_us: f64,
    /// The median.
    pub p50_us: f64,
    /// Nine tenths were faster.
    pub p90_us: f64,
    /// Ninety-nine of a hundred were faster.
    pub p99_us: f64,
    /// The slowest.
    pub max_us: f64,
}

impl Latency {
    /// Percentiles of `samples`, which it sorts.
    pub fn of(samples: &mut [Duration]) -> Self {
        samples.sort_unstable();
        let Some(last) = samples.len().checked_sub(1) else { return Self::default() };
        let at = |part: f64| samples[((last as f64) * part).round() as usize].as_secs_f64() * 1e6;
        let total: Duration = samples.iter().sum();
        Self {
            count: samples.len() as u64,
            mean_us: total.as_secs_f64() * 1e6 / samples.len() as f64,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            max_us: at(1.0),
        }
    }
}

/// One attempt that went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Milliseconds since the loop began.
    pub at_ms: u64,
    /// `connect`, `send`, `receive`.
    pub stage: String,
    /// The error's symbolic name, such as `ECONNREFUSED`.
    pub error: String,
}

/// The outcome of a loop of attempts, over TCP or UDP.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Attempts {
    /// Tries in all.
    pub attempts: u64,
    /// Tries that got an answer.
    pub answered: u64,
    /// Answers by the name of the server.
    pub by_name: BTreeMap<String, u64>,
    /// What `getpeername` said (TCP, connected UDP), or the source of the reply (unconnected UDP).
    pub peers: BTreeMap<String, u64>,
    /// The client's address as the server saw it, without its port.
    pub seen_as: BTreeMap<String, u64>,
    /// Failures by error name.
    pub failed: BTreeMap<String, u64>,
    /// The first of the failures.
    pub failures: Vec<Failure>,
    /// Time to connect.
    pub connect: Latency,
    /// Time from the start of the attempt to its answer.
    pub whole: Latency,
    /// Time until a failure was reported to the application.
    pub failing: Latency,
    /// Wall time of the loop.
    pub elapsed_s: f64,
    /// Processor time of the client.
    pub cpu_s: f64,
}

impl Attempts {
    /// Attempts without an answer.
    pub fn failed_total(&self) -> u64 {
        self.failed.values().sum()
    }

    /// Answers of one server.
    pub fn of(&self, name: &str) -> u64 {
        self.by_name.get(name).copied().unwrap_or(0)
    }

    /// The part of the answers that one server gave.
    pub fn share(&self, name: &str) -> f64 {
        self.of(name) as f64 / (self.answered.max(1)) as f64
    }
}

/// An established connection used for a while.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Stream {
    /// Who answered.
    pub name: String,
    /// What `getpeername` said.
    pub peer: String,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received back.
    pub received: u64,
    /// Every byte was the right one.
    pub exact: bool,
    /// Round trips, where the client waits for each answer.
    pub round_trip: Latency,
    /// Wall time.
    pub elapsed_s: f64,
    /// Processor time of the client.
    pub cpu_s: f64,
}

/// Connections held open: the answer to one command.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Held {
    /// Connections that answered.
    pub alive: u64,
    /// Connections that failed, by error name.
    pub dead: BTreeMap<String, u64>,
    /// Who holds the other end.
    pub by_name: BTreeMap<String, u64>,
}

/// Connections of `mesh-peer raw`, all taken together.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Raw {
    /// Connections that came about.
    pub opened: u64,
    /// Bytes that were taken, without what was asked.
    pub said: u64,
    /// Bytes that came.
    pub heard: u64,
    /// Floods that nobody took to the end.
    pub blocked: u64,
    /// What came.
    pub lines: Vec<String>,
    /// How they ended: `end`, `silence`, `reset` (by themselves), or the name of an error.
    pub ends: BTreeMap<String, u64>,
}

impl Raw {
    /// One has ended so.
    pub fn ended(&mut self, how: &str) {
        *self.ends.entry(how.to_owned()).or_default() += 1;
    }

    /// How many have ended in one of these ways.
    pub fn of(&self, ways: &[&str]) -> u64 {
        ways.iter().filter_map(|way| self.ends.get(*way)).sum()
    }
}

/// Another server answers than before.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Change {
    /// When its first answer came, by the monotonic clock.
    pub at_ns: u64,
    /// Its name, or the name of the error.
    pub name: String,
}

/// A server says where it listens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listening {
    /// The bound addresses.
    pub listening: Vec<std::net::SocketAddr>,
}

/// The symbolic name of an error, as `errno(3)` has it.
pub fn error_name(error: &std::io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "ECONNREFUSED",
        Some(libc::ECONNRESET) => "ECONNRESET",
        Some(libc::ECONNABORTED) => "ECONNABORTED",
        Some(libc::ETIMEDOUT) => "ETIMEDOUT",
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH",
        Some(libc::ENETUNREACH) => "ENETUNREACH",
        Some(libc::EPERM) => "EPERM",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EPIPE) => "EPIPE",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EAGAIN) => "EAGAIN",
        Some(libc::EINVAL) => "EINVAL",
        Some(other) => return format!("errno {other}"),
        None => return error.kind().to_string(),
    };
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_hundred() {
        let mut samples: Vec<_> = (1..=101).rev().map(Duration::from_micros).collect();
        let latency = Latency::of(&mut samples);
        assert_eq!((latency.p50_us, latency.p90_us, latency.max_us), (51.0, 91.0, 101.0));
        assert_eq!(latency.mean_us, 51.0);
    }

    #[test]
    fn nothing_measured_is_all_zero() {
        assert_eq!(Latency::of(&mut []), Latency::default());
    }
}
