//! Fetches what the schedule orders, for as long as the agent runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::access::{Access, Choice};
use super::announced::Wanted;
use super::answer::Answer;
use super::authority::{Burst, FetchError};
use super::report::{Certificate, Report};
use super::schedule::{Now, Order, Schedule, Subject, Validity};
use super::store::Store;
use super::{SpiffeId, names_node};
use crate::xds::random;

/// Reports are made no more often: each tells of every certificate.
const REPORT_PAUSE: Duration = Duration::from_millis(20);

/// What became of an order.
type Outcome = (Order, Arc<Burst>, Result<Answer, FetchError>);

struct Fetcher {
    access: Arc<Access>,
    node: Arc<str>,
    store: Arc<Store>,
    schedule: Schedule,
    choice: Choice,
    /// The connection that is in use; none while nothing is under way.
    burst: Option<Arc<Burst>>,
    wanted: BTreeSet<SpiffeId>,
    report: Report,
    /// The identity in the node's own certificate, and its number, as the authority gave them.
    own: Option<(String, String)>,
}

/// Keeps the certificates in `store` as `wanted` says, and `report` telling about them. Ends when nobody says what is wanted.
pub async fn run(
    access: Arc<Access>,
    node: Arc<str>,
    store: Arc<Store>,
    mut wanted: watch::Receiver<Wanted>,
    report: watch::Sender<Arc<Report>>,
) {
    let mut fetcher = Fetcher {
        access,
        node,
        store,
        schedule: Schedule::default(),
        choice: Choice::default(),
        burst: None,
        wanted: BTreeSet::new(),
        report: Report::default(),
        own: None,
    };
    fetcher.schedule.want(Subject::Node);
    let mut running: JoinSet<Outcome> = JoinSet::new();
    let mut reported: Option<Instant> = None;
    loop {
        let set = Arc::clone(&wanted.borrow_and_update());
        fetcher.follow(&set);
        while let Some(order) = fetcher.schedule.next(Now::read()) {
            running.spawn(fetcher.fetch(order));
        }
        let mut wait = fetcher.schedule.wait(Now::read());
        match reported.map(|at| REPORT_PAUSE.saturating_sub(at.elapsed())) {
            Some(rest) if !rest.is_zero() => wait = wait.min(rest),
            Some(_) | None => {
                report.send_replace(Arc::new(fetcher.report()));
                reported = Some(Instant::now());
            }
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            Some(joined) = running.join_next() => match joined {
                Ok(outcome) => fetcher.settle(outcome),
                // Nobody aborts it: a panic, and better loud than an order that never ends.
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

impl Fetcher {
    fn follow(&mut self, wanted: &BTreeSet<SpiffeId>) {
        for gone in self.wanted.difference(wanted) {
            self.schedule.forget(&Subject::Workload(gone.clone()));
            self.store.forget(gone);
            self.report.forget(gone);
        }
        for new in wanted.difference(&self.wanted) {
            self.schedule.want(Subject::Workload(new.clone()));
        }
        self.wanted.clone_from(wanted);
    }

    fn fetch(&mut self, order: Order) -> impl Future<Output = Outcome> + use<> {
        let own = || self.access.credential(&self.choice);
        let burst = self.burst.get_or_insert_with(|| Arc::new(Burst::new(&self.access, own())));
        let (burst, node) = (Arc::clone(burst), Arc::clone(&self.node));
        async move {
            let result = burst.fetch(&order.subject, &node).await;
            (order, burst, result)
        }
    }

    fn settle(&mut self, (order, burst, result): Outcome) {
        let now = Now::read();
        match result {
            Ok(answer) => {
                self.report.count("issued");
                self.accepted(burst.used());
                self.issued(&order, &answer, now);
            }
            Err(error) => {
                self.report.count(error.outcome());
                self.rejected(&burst, &error);
                let (reason, subject) = (error.to_string(), &order.subject);
                warn!(?subject, reason, "no certificate");
                self.schedule.failed(&order, reason, error.was_asked(), now, random());
            }
        }
        if self.schedule.is_idle() {
            self.burst = None;
        }
    }

    fn issued(&mut self, order: &Order, answer: &Answer, now: Now) {
        let validity = Validity { not_before: answer.not_before, not_after: answer.not_after };
        if !self.schedule.succeeded(order, validity, now, random()) {
            return;
        }
        debug!(identity = answer.uri, number = answer.number, "certificate");
        for strange in self.store.trust(&answer.roots, order.ticket, now.wall) {
            info!(identity = %strange, "its certificate does not lead to the new roots; renewing");
            self.schedule.renew(&Subject::Workload(strange));
        }
        match &order.subject {
            Subject::Workload(id) => {
                if !self.store.put(id.clone(), answer, now.wall) {
                    self.schedule.renew(&order.subject);
                }
                self.report.note(id.clone());
            }
            Subject::Node => {
                let ours = names_node(&answer.uri, &self.node);
                if self.own.as_ref().is_none_or(|(uri, _)| *uri != answer.uri) {
                    info!(identity = answer.uri, used = ours, "this node's certificate");
                }
                self.store.put_node(ours.then_some(answer));
                self.own = Some((answer.uri.clone(), answer.number.clone()));
                // From now on by certificate: those that follow need no token.
                self.burst = None;
            }
        }
    }

    fn accepted(&mut self, used: Option<u64>) {
        if self.choice.succeeded(used) {
            warn!(
                "the certificate authority does not take this node's certificate; the token serves until the next"
            );
        }
    }

    fn rejected(&mut self, burst: &Arc<Burst>, error: &FetchError) {
        if error.outcome() == "unauthenticated" {
            self.access.count_refusal();
        }
        // Said once by all fetches of a connection.
        let current = self.burst.as_ref().is_some_and(|now| Arc::ptr_eq(now, burst));
        if current && error.blames_credential() {
            self.choice.failed(burst.used());
        }
        if current && error.ends_connection() {
            self.burst = None;
        }
    }

    fn report(&self) -> Report {
        let certificate = |(subject, entry): (&Subject, &_)| {
            let (identity, number) = match subject {
                Subject::Node => {
                    self.own.clone().map(|(uri, number)| (uri, Some(number))).unwrap_or_default()
                }
                Subject::Workload(id) => (id.to_string(), self.store.numbers(id).map(|(number, _)| number)),
            };
            Certificate::new(subject, entry, identity, number)
        };
        let certificates = self.schedule.entries().map(certificate).collect();
        self.report.with(certificates)
    }
}

#[cfg(test)]
mod tests;
