//! Which identities this node needs: those of the workloads that the control plane has announced for it.
//!
//! Pods in the node's own network and processes of the host are workloads like others: a cgroup is what has an identity here,
//! and not an address.
//!
//! Pure but for publishing the set. Certificates are wanted from the announcement on, so that they are there when the pod
//! makes its first connection, and until the last workload of an identity has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::warn;

use super::report::Report;
use super::{InvalidSpiffeId, SpiffeId};
use crate::snapshot::Workload;

/// Longest that one identity keeps the node from being ready, see [`Announced::ready`].
pub const PATIENCE: Duration = Duration::from_secs(10);
/// What the API means by leaving these empty.
const TRUST_DOMAIN: &str = "cluster.local";
const SERVICE_ACCOUNT: &str = "default";

/// The identities that this node needs.
pub type Wanted = Arc<BTreeSet<SpiffeId>>;

/// See the module.
#[derive(Debug)]
pub struct Announced {
    node: Box<str>,
    by_workload: BTreeMap<Box<str>, SpiffeId>,
    /// How many workloads have it, and since when it is wanted.
    identities: BTreeMap<SpiffeId, (usize, Instant)>,
    changed: bool,
    publish: watch::Sender<Wanted>,
    report: watch::Receiver<Arc<Report>>,
    /// Has been ready once.
    settled: AtomicBool,
}

impl Announced {
    /// For `node`; who fetches certificates listens to `publish` and answers by `report`.
    pub fn new(node: &str, publish: watch::Sender<Wanted>, report: watch::Receiver<Arc<Report>>) -> Self {
        Self {
            node: node.into(),
            by_workload: BTreeMap::new(),
            identities: BTreeMap::new(),
            changed: false,
            publish,
            report,
            settled: AtomicBool::new(false),
        }
    }

    /// Where nobody fetches certificates, because there is no control plane.
    pub fn without_authority(node: &str) -> Self {
        let announced = Self::new(node, watch::Sender::default(), watch::Sender::default().subscribe());
        announced.settled.store(true, Ordering::Relaxed);
        announced
    }

    /// Takes in a workload as it is now; `None` when it is gone.
    pub fn workload(&mut self, uid: &str, workload: Option<&Workload>, now: Instant) {
        let identity = workload.filter(|w| *w.node == *self.node).map(spiffe_of);
        let identity = identity.transpose().unwrap_or_else(|error| {
            warn!(workload = %uid, %error, "it can have no certificate");
            None
        });
        if self.by_workload.get(uid) == identity.as_ref() {
            return;
        }
        if let Some(new) = &identity {
            self.identities.entry(new.clone()).or_insert((0, now)).0 += 1;
        }
        let old = match identity {
            Some(new) => self.by_workload.insert(uid.into(), new),
            None => self.by_workload.remove(uid),
        };
        if let Some(old) = old
            && let Some((workloads, _)) = self.identities.get_mut(&old)
        {
            *workloads -= 1;
            if *workloads == 0 {
                self.identities.remove(&old);
            }
        }
        self.changed = true;
    }

    /// Tells what has changed.
    pub fn publish(&mut self) {
        if std::mem::take(&mut self.changed) {
            self.publish.send_replace(Arc::new(self.identities.keys().cloned().collect()));
        }
    }

    /// What became of the fetches.
    pub fn report(&self) -> Arc<Report> {
        Arc::clone(&self.report.borrow())
    }

    /// Whether every identity has had a certificate once; else which one has not, and why.
    ///
    /// Readiness is what roll-outs and load balancers go by; whether a connection is permitted is decided elsewhere, and fails
    /// closed. So this waits for no identity longer than [`PATIENCE`] from its announcement: enough for five attempts (an
    /// authority may learn of a pod later than the agent does), and then a workload that the authority refuses shows in
    /// `/certificates` and in metrics, and does not keep the others' node unready for ever. For the same reason a node that has been
    /// ready once stays so, as far as certificates go, when another workload is announced.
    pub fn ready(&self, now: Instant) -> Result<(), String> {
        if self.settled.load(Ordering::Relaxed) {
            return Ok(());
        }
        let report = self.report.borrow();
        let waiting = self.identities.iter().find(|(identity, (_, since))| {
            !report.had(identity) && now.saturating_duration_since(*since) < PATIENCE
        });
        let Some((identity, _)) = waiting else {
            self.settled.store(true, Ordering::Relaxed);
            return Ok(());
        };
        let reason = report.error(identity).or(report.node_error()).unwrap_or("it is being fetched");
        Err(format!("no certificate for {identity} yet: {reason}"))
    }
}

/// The identity of a workload; an error where its names can be no identity.
pub fn spiffe_of(workload: &Workload) -> Result<SpiffeId, InvalidSpiffeId> {
    let or = |text: &'_ Arc<str>, default: &'static str| -> Arc<str> {
        if text.is_empty() { default.into() } else { Arc::clone(text) }
    };
    let account = workload.account();
    let trust_domain = or(&account.trust_domain, TRUST_DOMAIN);
    SpiffeId::new(&trust_domain, &account.namespace, &or(&account.service_account, SERVICE_ACCOUNT))
}

#[cfg(test)]
mod tests;
