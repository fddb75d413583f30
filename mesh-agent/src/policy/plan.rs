//! What is to be done to the kernel's maps, in an order in which no connection is allowed that neither the old policies nor the
//! new ones allow.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_common::abi::{PlainKey, Verdict, VerdictKey};

use crate::snapshot::Workload;

/// A change of what the kernel holds, in the order of its fields. Sets never change: a workload whose policies change gets another
/// set, which is written before any [`mesh_common::abi::Peer`] leads to it, and the old one goes after.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyPlan {
    /// To be removed first, to make room. Their connections are judged by the proxy.
    pub evicted: Vec<VerdictKey>,
    /// To be written.
    pub verdicts: Vec<(VerdictKey, Verdict)>,
    /// To be written, each with the length of its prefix.
    pub plain: Vec<(u32, PlainKey, Verdict)>,
    /// Then, the numbers of sets of these workloads: their peers are to be written.
    pub sets: Vec<(Arc<Workload>, u32)>,
    /// Last, to be removed.
    pub gone: Vec<VerdictKey>,
    /// Last, to be removed.
    pub gone_plain: Vec<(u32, PlainKey)>,
}

/// Where verdicts are written: the kernel's maps.
pub trait VerdictMaps {
    /// Writes a verdict.
    fn put(&mut self, key: &VerdictKey, verdict: &Verdict) -> Result<(), String>;
    /// Removes a verdict. That there is none is no failure.
    fn remove(&mut self, key: &VerdictKey) -> Result<(), String>;
    /// Writes a verdict for a block of addresses, of that prefix length.
    fn put_plain(&mut self, prefix: u32, key: &PlainKey, verdict: &Verdict) -> Result<(), String>;
    /// Removes a verdict for a block of addresses. That there is none is no failure.
    fn remove_plain(&mut self, prefix: u32, key: &PlainKey) -> Result<(), String>;
}

/// What could not be written, and why the first could not.
#[derive(Debug, Default)]
pub(super) struct Failed {
    /// One verdict of each set and source.
    pub(super) verdicts: Vec<VerdictKey>,
    /// Numbers of sets.
    pub(super) plain: BTreeSet<u32>,
    pub(super) reason: Option<String>,
}

impl PolicyPlan {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Writes what is to be there before peers lead to it. After a failure, the rest of the same set and source is left out: the
    /// verdict of all other ports must not stand without one that differs from it.
    pub(super) fn write(&self, maps: &mut impl VerdictMaps) -> Failed {
        let mut failed = Failed::default();
        let mut pairs = BTreeSet::new();
        for key in &self.evicted {
            if let Err(reason) = maps.remove(key) {
                failed.reason.get_or_insert(reason);
            }
        }
        for (key, verdict) in &self.verdicts {
            if !pairs.contains(&(key.policies, key.source))
                && let Err(reason) = maps.put(key, verdict)
            {
                pairs.insert((key.policies, key.source));
                failed.verdicts.push(*key);
                failed.reason.get_or_insert(reason);
            }
        }
        for (prefix, key, verdict) in &self.plain {
            if !failed.plain.contains(&key.policies)
                && let Err(reason) = maps.put_plain(*prefix, key, verdict)
            {
                failed.plain.insert(key.policies);
                failed.reason.get_or_insert(reason);
            }
        }
        failed
    }

    /// Removes what no peer leads to any more; why the first failure was one.
    pub(super) fn clean(&self, maps: &mut impl VerdictMaps) -> Result<(), String> {
        let verdicts = self.gone.iter().map(|key| maps.remove(key)).fold(Ok(()), Result::and);
        let plain = self
            .gone_plain
            .iter()
            .map(|(prefix, key)| maps.remove_plain(*prefix, key))
            .fold(Ok(()), Result::and);
        verdicts.and(plain)
    }
}
