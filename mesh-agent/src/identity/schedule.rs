//! When which certificate is fetched. Pure: time and random numbers are arguments.
//!
//! Two clocks: what certificates say is wall-clock time, as peers judge it, and is compared anew at each decision, so that a
//! clock that was moved changes the decision and nothing else; waits between attempts are monotonic, and over when the clock was set.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use super::SpiffeId;

/// Fetches at a time.
pub const CONCURRENT: usize = 8;
/// Wait after the first failure; each further one doubles it.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Longest wait.
const LAST_RETRY: Duration = Duration::from_secs(150);
/// A certificate of a second's life is not renewed without end.
const SOONEST_RENEWAL: Duration = Duration::from_millis(500);
/// How often the wall clock is looked at, for it may have been moved.
const LOOK: Duration = Duration::from_secs(5);
/// A wall clock that moves so far between two looks was set.
const SET: Duration = Duration::from_secs(5);

/// Whose certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// This node's own, for the control plane.
    Node,
    /// A workload's.
    Workload(SpiffeId),
}

/// The time, by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Never jumps.
    pub monotonic: Instant,
    /// What certificates are measured by.
    pub wall: SystemTime,
}

impl Now {
    /// Now.
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// From.
    pub not_before: SystemTime,
    /// To.
    pub not_after: SystemTime,
}

impl Validity {
    /// Whether it is valid then.
    pub fn holds(&self, wall: SystemTime) -> bool {
        self.not_before <= wall && wall < self.not_after
    }
}

/// One fetch that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Whose certificate.
    pub subject: Subject,
    /// Tells its outcome from that of another order for the same subject. Grows with each order.
    pub ticket: u64,
}

/// What is known of one certificate.
#[derive(Debug)]
pub struct Entry {
    /// The certificate that is held.
    pub held: Option<Validity>,
    /// When it is to be renewed.
    pub renewal: Option<SystemTime>,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
    /// Under way.
    pub fetching: Option<u64>,
    failures: u32,
    /// The last failure says nothing of this identity: the authority was never asked.
    unasked: bool,
    /// Not before.
    retry: Option<Instant>,
    /// Whatever the renewal's time is.
    at_once: bool,
    /// In order of announcement.
    since: u64,
}

/// What is wanted, and what became of it.
#[derive(Debug, Default)]
pub struct Schedule {
    entries: BTreeMap<Subject, Entry>,
    running: BTreeSet<u64>,
    counter: u64,
    /// When the clocks were looked at last.
    looked: Option<Now>,
}

/// The more urgent, the smaller: the node's first, which all others need less than it them; then who has none, in order of
/// announcement; then by what is left.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    Node,
    Without(u64),
    Until(SystemTime),
}

impl Schedule {
    /// Wants a certificate for it from now on.
    pub fn want(&mut self, subject: Subject) {
        self.counter += 1;
        let since = self.counter;
        self.entries.entry(subject).or_insert_with(|| Entry {
            held: None,
            renewal: None,
            last_error: None,
            fetching: None,
            failures: 0,
            unasked: false,
            retry: None,
            at_once: false,
            since,
        });
    }

    /// Wants none any more.
    pub fn forget(&mut self, subject: &Subject) {
        self.entries.remove(subject);
    }

    /// What to fetch next, if anything is due and there is room for one more.
    pub fn next(&mut self, now: Now) -> Option<Order> {
        self.look(now);
        if self.running.len() >= CONCURRENT {
            return None;
        }
        let node_waits = self.node_waits();
        let due = self.entries.iter().filter(|(_, entry)| entry.is_due(now));
        // The node's first attempt is made alone: with what it brings, the others need no token.
        let due = due.filter(|(subject, _)| **subject == Subject::Node || !node_waits);
        let (subject, _) = due.min_by_key(|(subject, entry)| entry.urgency(subject, now.wall))?;
        let subject = subject.clone();
        self.counter += 1;
        let ticket = self.counter;
        self.entries.get_mut(&subject)?.fetching = Some(ticket);
        self.running.insert(ticket);
        Some(Order { subject, ticket })
    }

    /// An order brought a certificate. Whether it is still wanted.
    pub fn succeeded(&mut self, order: &Order, validity: Validity, now: Now, random: u64) -> bool {
        let Some(entry) = self.finish(order) else { return false };
        entry.held = Some(validity);
        entry.renewal = Some(renewal(validity, now.wall, random));
        (entry.failures, entry.retry, entry.last_error, entry.at_once) = (0, None, None, false);
        entry.unasked = false;
        // The authority is back: those that found it away need not wait as if it were not.
        for entry in self.entries.values_mut().filter(|entry| entry.unasked) {
            (entry.failures, entry.retry, entry.unasked) = (0, None, false);
        }
        true
    }

    /// An order failed, before (`asked` is false) or after the authority heard of it. What is held stays.
    pub fn failed(&mut self, order: &Order, reason: String, asked: bool, now: Now, random: u64) {
        let Some(entry) = self.finish(order) else { return };
        entry.unasked = !asked;
        entry.retry = now.monotonic.checked_add(backoff(entry.failures, random));
        entry.failures = entry.failures.saturating_add(1);
        entry.last_error = Some(reason);
    }

    /// What is held is of no use any more, or soon will be: renew it as soon as a failure before permits.
    pub fn renew(&mut self, subject: &Subject) {
        if let Some(entry) = self.entries.get_mut(subject) {
            entry.at_once = true;
        }
    }

    /// How long nothing needs to be decided, if nothing happens.
    pub fn wait(&self, now: Now) -> Duration {
        if self.running.len() >= CONCURRENT {
            return LOOK;
        }
        let node_waits = self.node_waits();
        let idle = self.entries.iter().filter(|(subject, entry)| {
            entry.fetching.is_none() && (**subject == Subject::Node || !node_waits)
        });
        idle.map(|(_, entry)| entry.wait(now)).min().unwrap_or(LOOK).min(LOOK)
    }

    /// Everything that is wanted.
    pub fn entries(&self) -> impl Iterator<Item = (&Subject, &Entry)> {
        self.entries.iter()
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Forgets failures if the wall clock was set: what has failed by the old time may well succeed by the new one, or not be needed.
    fn look(&mut self, now: Now) {
        let Some(last) = self.looked.replace(now) else { return };
        let passed = now.monotonic.saturating_duration_since(last.monotonic);
        let expected = last.wall.checked_add(passed).unwrap_or(last.wall);
        let moved = now.wall.duration_since(expected).unwrap_or_else(|back| back.duration());
        if moved >= SET {
            for entry in self.entries.values_mut() {
                (entry.failures, entry.retry, entry.last_error) = (0, None, None);
            }
        }
    }

    fn node_waits(&self) -> bool {
        self.entries.get(&Subject::Node).is_some_and(|node| node.held.is_none() && node.failures == 0)
    }

    /// Closes an order; the entry that it is for, if nobody else's by now.
    fn finish(&mut self, order: &Order) -> Option<&mut Entry> {
        self.running.remove(&order.ticket);
        let entry = self.entries.get_mut(&order.subject)?;
        (entry.fetching == Some(order.ticket)).then(|| {
            entry.fetching = None;
            entry
        })
    }
}

impl Entry {
    /// Whether what is held serves.
    pub fn serves(&self, wall: SystemTime) -> bool {
        self.held.is_some_and(|held| held.holds(wall))
    }

    fn is_due(&self, now: Now) -> bool {
        self.fetching.is_none() && self.wait(now).is_zero()
    }

    /// How long until it is due.
    fn wait(&self, now: Now) -> Duration {
        let retry = self.retry.map(|at| at.saturating_duration_since(now.monotonic)).unwrap_or_default();
        let wanted = match self.renewal {
            Some(at) if self.serves(now.wall) && !self.at_once => {
                at.duration_since(now.wall).unwrap_or_default()
            }
            // None, or none that serves: expired, or the clock went back to before it began.
            Some(_) | None => Duration::ZERO,
        };
        retry.max(wanted)
    }

    fn urgency(&self, subject: &Subject, wall: SystemTime) -> Urgency {
        match (subject, self.held) {
            (Subject::Node, _) => Urgency::Node,
            (Subject::Workload(_), Some(held)) if held.holds(wall) => Urgency::Until(held.not_after),
            (Subject::Workload(_), Some(_) | None) => Urgency::Without(self.since),
        }
    }
}

/// When to renew what was received now: at half of what is left of it, give or take a tenth of that, so that what was
/// fetched together is not renewed together. What is left, and not the whole: a certificate begins before it is issued.
fn renewal(validity: Validity, wall: SystemTime, random: u64) -> SystemTime {
    let left = validity.not_after.duration_since(wall).unwrap_or_default();
    let wait = scale(left / 2, 0.9, 1.1, random).max(SOONEST_RENEWAL);
    wall.checked_add(wait).unwrap_or(validity.not_after)
}

/// The wait after a failure that follows so many others.
fn backoff(failures: u32, random: u64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX));
    scale(doubled.min(LAST_RETRY), 0.8, 1.2, random).min(LAST_RETRY)
}

fn scale(duration: Duration, low: f64, high: f64, random: u64) -> Duration {
    let part = (random >> 32) as f64 / f64::from(u32::MAX);
    duration.mul_f64(low + (high - low) * part)
}

#[cfg(test)]
mod tests;
