//! Judges connections for whoever asks, on whatever task.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use mesh_common::policy::{Attempt, Decision, Principal, SourceIp, evaluate, rehearse};
use tokio::sync::watch;

use super::catalog::{Catalog, Cause, Entry, Hindrance};
use super::sets::asking;
use super::{NO_MATCH, NOT_ARRIVED};
use crate::identity::SpiffeId;
use crate::snapshot::Workload;

/// Policies as the proxies see them: one writer, many readers. The lock is held for one judgement, and never while anybody waits.
#[derive(Debug, Default)]
pub struct Shared {
    catalog: RwLock<Catalog>,
    changed: watch::Sender<u64>,
}

/// Whether a connection may be, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// It may be.
    pub allowed: bool,
    /// Why, or why not.
    pub cause: Cause,
    /// The policy that decides: `NAMESPACE/NAME`, or [`NOT_ARRIVED`]; all ALLOW policies where none of them matches. None: there is none to
    /// restrict it.
    pub policy: Option<Arc<str>>,
    /// The rule of the policy that decides, from 0.
    pub rule: Option<usize>,
    /// It is allowed, and would not be if this policy were more than a dry run, by that rule of it; without a rule: since none of
    /// these matches.
    pub would_deny: Option<(Arc<str>, Option<usize>)>,
}

impl Shared {
    /// Judges a connection to a workload. `source`: by its certificate or its cgroup; none for whom nobody knows.
    pub fn judge(
        &self,
        destination: &Workload,
        source: Option<&SpiffeId>,
        source_ip: IpAddr,
        destination_ip: IpAddr,
        port: u16,
    ) -> Judgement {
        let attempt = Attempt {
            source: source.map(principal),
            source_ip: SourceIp::One(source_ip),
            destination_ip,
            port,
        };
        self.read().judge(&destination.account().namespace, destination.policies(), &attempt)
    }

    /// Changes whenever a policy may judge otherwise than it did.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn tell(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    // Nothing in here panics half-way through a change; a reader that panicked with the lock has changed nothing.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Catalog> {
        self.catalog.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Catalog> {
        self.catalog.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An identity, as policies see it.
pub(super) fn principal(id: &SpiffeId) -> Principal<'_> {
    Principal {
        trust_domain: id.trust_domain(),
        namespace: id.namespace(),
        service_account: id.service_account(),
    }
}

impl Catalog {
    fn judge(&self, namespace: &str, named: &[Arc<str>], attempt: &Attempt<'_>) -> Judgement {
        if let Some(hindrance) = self.hindrance(namespace, named) {
            let (cause, policy) = match hindrance {
                Hindrance::NotArrived => (Cause::NotArrived, NOT_ARRIVED.into()),
                Hindrance::NotUnderstood(entry) => (Cause::NotUnderstood, Arc::clone(entry.name())),
                Hindrance::Awaited(name) => (Cause::Awaited, Arc::clone(name)),
            };
            let policy = Some(policy);
            return Judgement { allowed: false, cause, policy, rule: None, would_deny: None };
        }
        let policies = || self.applicable(namespace, named).filter_map(|entry| entry.policy());
        let named_at = |at: usize| -> Option<Arc<str>> {
            let understood = |entry: &&Arc<Entry>| entry.policy().is_some();
            self.applicable(namespace, named).filter(understood).nth(at).map(|entry| Arc::clone(entry.name()))
        };
        let (allowed, by) = match evaluate(policies(), attempt) {
            Decision::Allow { by } => (true, by),
            Decision::Deny { by } => (false, by),
        };
        let (cause, policy, rule) = match (allowed, by) {
            (_, Some(by)) => (Cause::Rule, named_at(by.policy), Some(by.rule)),
            (true, None) => (Cause::NoAllow, None, None),
            (false, None) => {
                let asking = asking(self.applicable(namespace, named), false);
                (Cause::NoMatch, Some(asking.unwrap_or_else(|| NO_MATCH.into())), None)
            }
        };
        let rehearsed =
            (allowed && policies().any(|policy| policy.dry_run)).then(|| rehearse(policies(), attempt));
        let would_deny = match rehearsed {
            None | Some(Decision::Allow { .. }) => None,
            Some(Decision::Deny { by: Some(by) }) => named_at(by.policy).map(|name| (name, Some(by.rule))),
            Some(Decision::Deny { by: None }) => {
                asking(self.applicable(namespace, named), true).map(|names| (names, None))
            }
        };
        Judgement { allowed, cause, policy, rule, would_deny }
    }
}

#[cfg(test)]
mod tests;
