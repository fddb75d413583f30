//! By what the outcome of policies can differ, so that it can be tabulated.

use std::collections::BTreeSet;

use super::{Block, Match, Policy};

/// What the enforced ones of some policies mention. Ports that none mentions are all alike, and so are addresses that lie in the
/// same of the blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mentions {
    /// Ports of the workload.
    pub ports: BTreeSet<u16>,
    /// Blocks of source addresses.
    pub source_blocks: BTreeSet<Block>,
    /// The workload's own address counts.
    pub destination_ips: bool,
}

impl Mentions {
    /// What `policies` mention; those of a dry run decide nothing, so that theirs do not count.
    pub fn of<'p>(policies: impl Iterator<Item = &'p Policy>) -> Self {
        let mut all = Self::default();
        for policy in policies.filter(|policy| !policy.dry_run) {
            let matches =
                policy.rules.iter().flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches);
            matches.for_each(|one| all.add(one));
        }
        all
    }

    /// Whether the source's address counts.
    pub fn source_ips(&self) -> bool {
        !self.source_blocks.is_empty()
    }

    /// A port that none mentions.
    pub fn other_port(&self) -> Option<u16> {
        (1..=u16::MAX).find(|port| !self.ports.contains(port))
    }

    fn add(&mut self, one: &Match) {
        self.ports.extend(one.destination_ports.iter().chain(&one.not_destination_ports));
        self.source_blocks.extend(one.source_ips.iter().chain(&one.not_source_ips));
        self.destination_ips |= !(one.destination_ips.is_empty() && one.not_destination_ips.is_empty());
    }
}

#[cfg(test)]
mod tests;
