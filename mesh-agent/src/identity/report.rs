//! What is known of the certificates, for people, metrics and readiness.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::SpiffeId;
use super::schedule::{Entry, Subject};

/// State of the certificates at one moment.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// One for each identity, and one for the node.
    pub certificates: Vec<Certificate>,
    /// Fetches by their outcome.
    pub fetches: BTreeMap<&'static str, u64>,
    /// Identities that have had a certificate.
    had: BTreeSet<SpiffeId>,
}

/// What is known of one.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// Whose it is.
    pub subject: Subject,
    /// The identity in it; for the node, as the authority says.
    pub identity: String,
    /// Its X.509 serial number.
    pub number: Option<String>,
    /// From when to when it is valid.
    pub validity: Option<(SystemTime, SystemTime)>,
    /// When it will be renewed.
    pub renewal: Option<SystemTime>,
    /// Under way.
    pub fetching: bool,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
}

impl Certificate {
    /// Of what the schedule knows.
    pub(super) fn new(subject: &Subject, entry: &Entry, identity: String, number: Option<String>) -> Self {
        Self {
            subject: subject.clone(),
            identity,
            number,
            validity: entry.held.map(|held| (held.not_before, held.not_after)),
            renewal: entry.renewal,
            fetching: entry.fetching.is_some(),
            last_error: entry.last_error.clone(),
        }
    }

    /// What it is at that time. A certificate that serves is ready, whatever becomes of its renewal.
    pub fn state(&self, now: SystemTime) -> &'static str {
        match self.validity {
            Some((from, to)) if from <= now && now < to => "ready",
            Some((_, to)) if to <= now => "expired",
            Some(_) | None if self.last_error.is_some() => "failed",
            Some(_) | None => "fetching",
        }
    }
}

/// All states of [`Certificate::state`].
pub const STATES: [&str; 4] = ["ready", "fetching", "failed", "expired"];

impl Report {
    /// The same, of these certificates.
    pub(crate) fn with(&self, certificates: Vec<Certificate>) -> Self {
        Self { certificates, fetches: self.fetches.clone(), had: self.had.clone() }
    }

    /// Notes that there was a certificate.
    pub(super) fn note(&mut self, identity: SpiffeId) {
        self.had.insert(identity);
    }

    /// Forgets what is not wanted any more.
    pub(super) fn forget(&mut self, identity: &SpiffeId) {
        self.had.remove(identity);
    }

    /// Counts a fetch.
    pub(super) fn count(&mut self, outcome: &'static str) {
        *self.fetches.entry(outcome).or_default() += 1;
    }

    /// Whether there was a certificate once.
    pub fn had(&self, identity: &SpiffeId) -> bool {
        self.had.contains(identity)
    }

    /// Why the last attempt for it failed.
    pub fn error(&self, identity: &SpiffeId) -> Option<&str> {
        let of = |subject: &Subject| matches!(subject, Subject::Workload(id) if id == identity);
        self.certificates.iter().find(|c| of(&c.subject))?.last_error.as_deref()
    }

    /// Why this node has no certificate.
    pub fn node_error(&self) -> Option<&str> {
        self.certificates.iter().find(|c| c.subject == Subject::Node)?.last_error.as_deref()
    }

    /// Seconds until the first of those that serve expires.
    pub fn earliest_expiry(&self, now: SystemTime) -> Option<f64> {
        let left = self.certificates.iter().filter_map(|c| c.validity?.1.duration_since(now).ok());
        left.min().map(|left| left.as_secs_f64())
    }
}

/// A time as RFC 3339 has it.
pub fn show(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let shown = i64::try_from(seconds).ok().and_then(|s| x509_parser::time::ASN1Time::from_timestamp(s).ok());
    let Some(date) = shown.map(|shown| shown.to_datetime()) else { return "never".to_owned() };
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", date.hour(), date.minute(), date.second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_serves_is_ready_whatever_becomes_of_its_renewal() {
        let now = SystemTime::now();
        let minute = Duration::from_secs(60);
        let of = |validity, error: Option<&str>| Certificate {
            subject: Subject::Node,
            identity: String::new(),
            number: None,
            validity,
            renewal: None,
            fetching: true,
            last_error: error.map(str::to_owned),
        };
        assert_eq!(of(None, None).state(now), "fetching");
        assert_eq!(of(None, Some("no")).state(now), "failed");
        assert_eq!(of(Some((now - minute, now + minute)), Some("no")).state(now), "ready");
        assert_eq!(of(Some((now - minute, now)), Some("no")).state(now), "expired");
        // The clock went back.
        assert_eq!(of(Some((now + minute, now + minute * 2)), None).state(now), "fetching");
        let report = |certificates| Report { certificates, ..Report::default() };
        assert_eq!(
            report(vec![of(None, None), of(Some((now - minute * 2, now - minute)), None)])
                .earliest_expiry(now),
            None
        );
        let two = vec![of(Some((now, now + minute * 2)), None), of(Some((now, now + minute)), None)];
        assert_eq!(report(two).earliest_expiry(now), Some(60.0));
    }

    #[test]
    fn times_are_shown_for_people() {
        assert_eq!(show(UNIX_EPOCH + Duration::from_secs(1_700_000_000)), "2023-11-14T22:13:20Z");
        assert_eq!(show(UNIX_EPOCH + Duration::from_secs(u64::from(u32::MAX) * 1_000)), "never");
    }
}
