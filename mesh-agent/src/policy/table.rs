//! Verdicts of a set, worked out for every case that can occur.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use mesh_common::abi::{Address, PlainKey, Verdict, VerdictKey};
use mesh_common::policy::{Attempt, Block, Decision, SourceIp, evaluate};

use super::sets::{Set, SetKey};
use super::shared::principal;
use crate::identity::SpiffeId;
use crate::snapshot::Workload;

/// A family of addresses, by the number that stands for it in keys.
const FAMILIES: [u16; 2] = [4, 6];

/// A workload of this node, as a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) workload: Arc<Workload>,
    /// None: its names can be no identity, so that nobody knows it.
    pub(super) identity: Option<SpiffeId>,
}

impl Source {
    /// The families in which it connects to workloads of a set: those of its own addresses; all, where it shares its node's.
    pub(super) fn families(&self, set: &Set) -> impl Iterator<Item = u16> {
        FAMILIES.into_iter().filter(move |family| {
            let own = || self.workload.addresses.iter().any(|address| family_of(*address) == *family);
            (self.is_shared() || own()) && set.has_family(*family)
        })
    }

    /// From where it connects, where that counts. Which of its node's addresses a workload will use that shares them nobody knows before: it is
    /// judged as if it came from each there is.
    fn from(&self, set: &Set, family: u16) -> Vec<SourceIp> {
        if !set.mentions.source_ips() {
            return vec![SourceIp::One(Ipv4Addr::UNSPECIFIED.into())];
        }
        if self.is_shared() {
            let blocks = set.blocks().into_iter().filter(|block| family_of(block.address()) == family);
            return blocks.map(SourceIp::Block).collect();
        }
        let own = self.workload.addresses.iter().filter(|address| family_of(**address) == family);
        own.copied().map(SourceIp::One).collect()
    }

    fn is_shared(&self) -> bool {
        self.workload.host_network || self.workload.addresses.is_empty()
    }
}

impl Set {
    fn has_family(&self, family: u16) -> bool {
        self.addresses().is_none_or(|list| list.iter().any(|address| family_of(*address) == family))
    }

    /// The workload's own addresses, where they count.
    fn addresses(&self) -> Option<&[IpAddr]> {
        match &self.key {
            SetKey::Refuse(_) => None,
            SetKey::Enforce { addresses, .. } => addresses.as_deref(),
        }
    }

    /// Addresses of a family that stand for all that the workload may be reached at.
    fn destinations(&self, family: u16) -> Vec<IpAddr> {
        match self.addresses() {
            Some(list) => list.iter().copied().filter(|address| family_of(*address) == family).collect(),
            None => vec![Ipv4Addr::UNSPECIFIED.into()],
        }
    }

    /// The blocks that addresses are alike in, those of all among them. Both families in any case: an address without a verdict of its own would go
    /// by that of a wider block of the other family.
    fn blocks(&self) -> Vec<Block> {
        let listed = &self.mentions.source_blocks;
        let all = [Block::V4, Block::V6].into_iter().filter(|all| !listed.contains(all));
        listed.iter().copied().chain(all).collect()
    }

    /// The verdict that holds for all these; refused, if one of them is: which one it will be the key cannot tell.
    fn judge<'a>(&self, attempts: impl Iterator<Item = Attempt<'a>>) -> Verdict {
        if let SetKey::Refuse(policy) = self.key {
            return Verdict { policy, rule: 0, action: Verdict::DENY };
        }
        let mut verdict = None;
        for attempt in attempts {
            let decision = evaluate(self.policies(), &attempt);
            let (action, by) = match decision {
                Decision::Allow { by } => (Verdict::ALLOW, by),
                Decision::Deny { by } => (Verdict::DENY, by),
            };
            let policy = by.and_then(|by| self.policies.get(by.policy)).map_or(0, |entry| entry.number);
            let rule = by.and_then(|by| u16::try_from(by.rule).ok()).unwrap_or(0);
            let one = Verdict { policy, rule, action };
            if !one.allows() {
                return one;
            }
            verdict.get_or_insert(one);
        }
        // Nothing can come so; if it does, nobody has allowed it.
        verdict.unwrap_or(Verdict { policy: 0, rule: 0, action: Verdict::DENY })
    }
}

/// The verdicts for a workload of this node, in an order in which they may be written one by one.
pub(super) fn verdicts(number: u32, set: &Set, identity: u64, source: &Source) -> Vec<(VerdictKey, Verdict)> {
    let mut rows = Vec::new();
    for family in source.families(set) {
        let from = source.from(set, family);
        let to = set.destinations(family);
        for (key, port) in set.ports() {
            let attempts = from.iter().flat_map(|from| to.iter().map(move |to| (*from, *to)));
            let verdict = set.judge(attempts.map(|(from, to)| Attempt {
                source: source.identity.as_ref().map(principal),
                source_ip: from,
                destination_ip: to,
                port,
            }));
            rows.push((VerdictKey { source: identity, policies: number, port: key, family }, verdict));
        }
    }
    rows
}

/// The keys of the verdicts of a set for a source that come in these families.
pub(super) fn keys(number: u32, set: &Set, identity: u64, families: &[u16]) -> Vec<VerdictKey> {
    let key = |family, port| VerdictKey { source: identity, policies: number, port, family };
    let mut keys: Vec<VerdictKey> =
        families.iter().flat_map(|family| set.ports().map(move |(port, _)| key(*family, port))).collect();
    // The others first, for the reason for which they are written last.
    keys.reverse();
    keys
}

/// The verdicts for whoever comes without an identity, in an order in which they may be written one by one.
pub(super) fn plain(number: u32, set: &Set) -> Vec<(u32, PlainKey, Verdict)> {
    let mut blocks = set.blocks();
    // Narrow ones first, so that no address goes by a wider block while its own is not written.
    blocks.sort_by_key(|block| std::cmp::Reverse(prefix(block)));
    let mut rows = Vec::new();
    for (key, port) in set.ports() {
        for block in &blocks {
            let to = set.destinations(family_of(block.address()));
            let verdict = set.judge(to.iter().map(|to| Attempt {
                source: None,
                source_ip: SourceIp::Block(*block),
                destination_ip: *to,
                port,
            }));
            let source = mapped(block.address());
            rows.push((prefix(block), PlainKey { policies: number, port: key, zero: 0, source }, verdict));
        }
    }
    rows
}

/// How many rows [`plain`] has.
pub(super) fn plain_count(set: &Set) -> usize {
    let listed = &set.mentions.source_blocks;
    let all = [Block::V4, Block::V6].iter().filter(|block| !listed.contains(block)).count();
    set.port_count() * (listed.len() + all)
}

fn prefix(block: &Block) -> u32 {
    let mapped = if block.address().is_ipv4() { PlainKey::V4_BITS } else { 0 };
    PlainKey::FIXED_BITS + mapped + u32::from(block.length())
}

fn family_of(address: IpAddr) -> u16 {
    if address.is_ipv4() { 4 } else { 6 }
}

fn mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => Address::from_v4(v4.octets()),
        IpAddr::V6(v6) => Address::new(v6.octets()),
    }
}
