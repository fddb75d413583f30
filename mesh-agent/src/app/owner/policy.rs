//! The owner's dealings with policies: takes them in, and puts in force what is planned.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use tracing::info;

use super::Owner;
use crate::policy::PolicyPlan;
use crate::snapshot::{Authorization, Changed, PolicyUpdate};
use crate::xds::Versions;

/// What policies are called where resources of several types are listed.
const KIND: &str = "Authorization";

impl Owner {
    /// What is held, as a stream begins with it.
    pub(in crate::app) fn versions(&self) -> Versions {
        Versions { addresses: self.snapshot.versions(), policies: self.policies.versions() }
    }

    /// Puts a change of policies in force. It always can be: what is not understood refuses.
    pub(in crate::app) fn apply_policies(&mut self, update: PolicyUpdate, complete: bool) {
        let first = complete && !self.policies.counts().complete;
        let before: BTreeSet<String> = update
            .updated
            .iter()
            .map(|policy| &*policy.name)
            .chain(update.removed.iter().map(|n| &**n))
            .map(listed)
            .collect();
        self.rejected.retain(|name, _| !before.contains(name));
        for refused in update.rejected() {
            self.rejected.insert(listed(&refused.name), refused.reason);
            self.rejections += 1;
        }
        let plan = self.policies.apply(update, complete, &self.snapshot);
        self.unsaved |= self.policies.take_unsaved();
        self.enforce(&plan);
        if first {
            info!(policies = self.policies.counts().policies, "all policies have come");
        }
    }

    /// Takes the policies that were saved; `None`: none were known, and until they come everything is refused.
    pub(super) fn restore_policies(&mut self, saved: Option<Vec<Arc<Authorization>>>) {
        let Some(saved) = saved else { return };
        for refused in saved.iter().filter_map(|policy| policy.rejected()) {
            self.rejected.insert(listed(&refused.name), refused.reason);
        }
        let plan = self.policies.restore(saved, &self.snapshot);
        self.enforce(&plan);
    }

    /// Gives workloads that changed their sets of policies.
    pub(super) fn guard(&mut self, changed: &Changed) {
        let plan = self.policies.workloads(changed, &self.snapshot);
        self.enforce(&plan);
    }

    /// Does again what failed.
    pub(super) fn tend_policies(&mut self, now: Instant) {
        let plan = self.policies.tick(&self.snapshot, now);
        self.enforce(&plan);
    }

    /// Puts a plan in force: verdicts, then peers, then what no peer leads to any more goes.
    fn enforce(&mut self, plan: &PolicyPlan) {
        if plan.is_empty() {
            return;
        }
        tracing::debug!(
            verdicts = plan.verdicts.len(),
            plain = plan.plain.len(),
            workloads = plan.sets.len(),
            gone = plan.gone.len() + plan.gone_plain.len(),
            "policy changes what the kernel is to hold"
        );
    }
}

fn listed(name: &str) -> String {
    format!("{KIND} {name}")
}
