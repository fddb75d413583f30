//! Connections that were refused by policy, or would have been, were its dry runs in force: counted, the last ones kept, and told in the log.
//!
//! Pure but for [`Denials::tell`], which logs. Whoever is refused again and again must not fill the log: a second has room for some
//! lines, and the next line says how many were left out.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::Cause;
use crate::identity::report::show;

/// How many are kept.
const KEPT: usize = 256;
/// Log lines a second.
const LINES: u32 = 10;
/// Policies that are counted by name; what more there are is counted together.
const NAMED: usize = 4096;
const OTHERS: &str = "others";
const REFUSED: &str = "a connection was refused by policy";
const REHEARSED: &str = "a connection was let in that a policy in dry run would have refused";

/// Where a connection was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// On the client's node, when it connected.
    Client,
    /// On the server's node, in the kernel.
    Server,
    /// On the server's node, by the proxy.
    Proxy,
}

impl Side {
    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Proxy => "proxy",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// UID of the workload, where it is known.
    pub workload: Option<String>,
    /// Identity, where it is known: by certificate, or by the workload's service account.
    pub identity: Option<String>,
    /// Address and port; the port is 0 where there was none yet.
    pub address: Option<SocketAddr>,
}

/// A connection that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// When.
    pub at: SystemTime,
    /// Where.
    pub side: Side,
    /// Who connected.
    pub source: Caller,
    /// To whom; its port is the workload's.
    pub destination: Caller,
    /// The policy that refused it, as in [`super::Judgement::policy`].
    pub policy: Arc<str>,
    /// The rule, from 0, where one refused it.
    pub rule: Option<usize>,
    /// Why, where that is known.
    pub cause: Option<Cause>,
    /// It was let in: the policy is a dry run.
    pub dry_run: bool,
}

/// `GET /denials`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenialsView {
    /// By policy and side.
    pub counts: Vec<CountView>,
    /// The last ones, newest first.
    pub last: Vec<DenialView>,
}

/// How often a policy refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountView {
    /// The policy.
    pub policy: String,
    /// Where.
    pub side: Side,
    /// How often since the agent started.
    pub denials: u64,
    /// Of connections that were let in, since the policy is a dry run.
    pub dry_run: bool,
}

/// One connection that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenialView {
    /// When, as in RFC 3339.
    pub time: String,
    /// Where.
    pub side: Side,
    /// Who connected.
    pub source: Caller,
    /// To whom.
    pub destination: Caller,
    /// The policy.
    pub policy: String,
    /// The rule, from 0.
    pub rule: Option<usize>,
    /// Why, where that is known.
    pub cause: Option<Cause>,
    /// It was let in: the policy is a dry run.
    pub dry_run: bool,
}

/// Of what is counted together: the policy, where, and whether it is a dry run.
type Counted = (Arc<str>, Side, bool);

/// See the module.
#[derive(Debug, Default)]
pub struct Denials {
    counts: BTreeMap<Counted, u64>,
    refused: Told,
    /// By policies in dry run: apart, so that they take no room from what was refused.
    rehearsed: Told,
}

#[derive(Debug, Default)]
struct Told {
    /// Newest first.
    last: VecDeque<Refusal>,
    /// The second that lines are counted in, and how many it had.
    second: Option<(Instant, u32)>,
    suppressed: u64,
}

impl Denials {
    /// Takes a refusal in. Whether there is room for a line in the log, and then how many had none since the last one.
    pub fn record(&mut self, refusal: Refusal, now: Instant) -> Option<u64> {
        let key = (Arc::clone(&refusal.policy), refusal.side, refusal.dry_run);
        let full = self.counts.len() >= NAMED && !self.counts.contains_key(&key);
        let key = if full { (OTHERS.into(), refusal.side, refusal.dry_run) } else { key };
        *self.counts.entry(key).or_default() += 1;
        if refusal.dry_run { &mut self.rehearsed } else { &mut self.refused }.record(refusal, now)
    }

    /// All that are kept, newest first.
    fn last(&self) -> impl Iterator<Item = &Refusal> {
        let mut all: Vec<_> = self.refused.last.iter().chain(&self.rehearsed.last).collect();
        all.sort_by_key(|refusal| std::cmp::Reverse(refusal.at));
        all.into_iter()
    }
}

impl Told {
    fn record(&mut self, refusal: Refusal, now: Instant) -> Option<u64> {
        if self.last.len() == KEPT {
            self.last.pop_back();
        }
        self.last.push_front(refusal);
        let lines = match &mut self.second {
            Some((since, lines)) if now.saturating_duration_since(*since) < Duration::from_secs(1) => lines,
            second => &mut second.insert((now, 0)).1,
        };
        if *lines == LINES {
            self.suppressed += 1;
            return None;
        }
        *lines += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Denials {
    /// Takes a refusal in and logs it.
    pub fn tell(&mut self, refusal: Refusal, now: Instant) {
        let dry_run = refusal.dry_run;
        let Some(suppressed) = self.record(refusal, now) else { return };
        let told = if dry_run { &self.rehearsed } else { &self.refused };
        let Some(refusal) = told.last.front() else { return };
        let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
        let address = |address: Option<SocketAddr>| address.map_or_else(String::new, |a| a.to_string());
        warn!(
            source = text(&refusal.source.identity),
            source_workload = text(&refusal.source.workload),
            source_address = address(refusal.source.address),
            destination = text(&refusal.destination.identity),
            destination_workload = text(&refusal.destination.workload),
            destination_address = address(refusal.destination.address),
            port = refusal.destination.address.map_or(0, |address| address.port()),
            policy = %refusal.policy,
            rule = refusal.rule,
            cause = refusal.cause.map(Cause::name),
            side = refusal.side.name(),
            suppressed,
            "{}",
            if refusal.dry_run { REHEARSED } else { REFUSED }
        );
    }

    /// How often each policy refused, by side, or (`true`) would have.
    pub fn counts(&self) -> impl Iterator<Item = (&str, Side, bool, u64)> {
        self.counts.iter().map(|((policy, side, dry_run), count)| (&**policy, *side, *dry_run, *count))
    }

    /// For the admin interface.
    pub fn view(&self) -> DenialsView {
        let count = |(policy, side, dry_run, denials): (&str, Side, bool, u64)| CountView {
            policy: policy.to_owned(),
            side,
            denials,
            dry_run,
        };
        let one = |refusal: &Refusal| DenialView {
            time: show(refusal.at),
            side: refusal.side,
            source: refusal.source.clone(),
            destination: refusal.destination.clone(),
            policy: refusal.policy.to_string(),
            rule: refusal.rule,
            cause: refusal.cause,
            dry_run: refusal.dry_run,
        };
        DenialsView { counts: self.counts().map(count).collect(), last: self.last().map(one).collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn refusal(policy: &str, port: u16) -> Refusal {
        let end = |name: &str| Caller {
            workload: Some(format!("c//Pod/shop/{name}")),
            identity: Some(format!("spiffe://cluster.local/ns/shop/sa/{name}")),
            address: Some(([10, 0, 0, 1], port).into()),
        };
        Refusal {
            at: UNIX_EPOCH + Duration::from_millis(7_001),
            side: Side::Client,
            source: end("web"),
            destination: end("db"),
            policy: policy.into(),
            rule: Some(2),
            cause: Some(Cause::Rule),
            dry_run: false,
        }
    }

    #[test]
    fn refusals_are_counted_by_policy_and_side() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        denials.record(refusal("shop/a", 1), now);
        denials.record(refusal("shop/a", 2), now);
        denials.record(Refusal { side: Side::Server, ..refusal("shop/a", 3) }, now);
        denials.record(refusal("shop/b", 4), now);
        denials.record(Refusal { dry_run: true, ..refusal("shop/b", 5) }, now);
        let counts: Vec<_> = denials.counts().collect();
        let wanted = [
            ("shop/a", Side::Client, false, 2),
            ("shop/a", Side::Server, false, 1),
            ("shop/b", Side::Client, false, 1),
            ("shop/b", Side::Client, true, 1),
        ];
        assert_eq!(counts, wanted);
    }

    #[test]
    fn the_last_ones_are_kept_newest_first() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        for port in 0..1_000 {
            denials.record(refusal("shop/a", port), now);
        }
        let view = denials.view();
        let ports: Vec<_> = view.last.iter().map(|one| one.destination.address.unwrap().port()).collect();
        assert_eq!(ports, (744..1_000).rev().collect::<Vec<_>>());
        assert_eq!((&*view.last[0].time, view.last[0].rule), ("1970-01-01T00:00:07Z", Some(2)));
        let json = serde_json::to_string(&view).unwrap();
        assert!(
            json.contains(r#""policy":"shop/a","side":"client","denials":1000,"dry_run":false"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<DenialsView>(&json).unwrap(), view);
    }

    #[test]
    fn a_second_has_room_for_some_lines_and_the_next_says_what_was_left_out() {
        let (mut denials, begun) = (Denials::default(), Instant::now());
        let lines: Vec<_> = (0..25).map(|_| denials.record(refusal("a/b", 1), begun)).collect();
        assert!(lines[..10].iter().all(|line| *line == Some(0)) && lines[10..].iter().all(Option::is_none));
        let almost = begun + Duration::from_millis(999);
        assert_eq!(denials.record(refusal("a/b", 1), almost), None);
        let later = begun + Duration::from_secs(1);
        assert_eq!(denials.record(refusal("a/b", 1), later), Some(16));
        assert_eq!(denials.record(refusal("a/b", 1), later), Some(0));
    }

    #[test]
    fn a_dry_run_takes_no_room_from_what_was_refused() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let dry = |second: u64| Refusal {
            dry_run: true,
            at: UNIX_EPOCH + Duration::from_secs(second),
            ..refusal("shop/trial", 1)
        };
        denials.record(refusal("shop/a", 2), now);
        let lines = (0..1_000).filter(|second| denials.record(dry(*second), now).is_some()).count();
        assert_eq!(lines as u32, LINES);
        assert_eq!(denials.record(refusal("shop/a", 3), now), Some(0), "it has a line");
        let view = denials.view();
        assert_eq!(view.last.iter().filter(|one| !one.dry_run).count(), 2);
        assert!(view.last.len() == KEPT + 2 && view.last[0].time == "1970-01-01T00:16:39Z");
    }

    #[test]
    fn names_without_end_take_no_room_without_end() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        for number in 0..10_000 {
            denials.record(refusal(&format!("a/{number}"), 1), now);
        }
        assert_eq!(denials.counts.len(), NAMED + 1);
        assert_eq!(denials.counts[&(OTHERS.into(), Side::Client, false)], 10_000 - NAMED as u64);
    }
}
