//! Whose an address is, when several workloads have it: agents judge who connects there by the policies of that one.
//!
//! A pod's address is told by its node, that of an entry by whoever writes manifests in some namespace, who must not take a pod out of its
//! own policies. Among equals the older one has it, and who is on its way out leaves it to who is not: addresses are given to others
//! before the pod that had them is gone. The order does not depend on which was read first.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use super::{Index, Origin, Problem};
use crate::manifest::{Key, Kind, Meta, NsName, Pod, ServiceEntry, WorkloadEntry};

/// Losers of an address that are named.
const MAX_NAMED: usize = 16;

/// A workload that has an address; the least has it for agents.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    /// What the address is known by: a pod, a WorkloadEntry, an endpoint of a ServiceEntry.
    kind: u8,
    leaving: bool,
    undated: bool,
    created: String,
    origin: Origin,
}

/// Claims by address.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    claimants: HashMap<IpAddr, Claimants>,
    contested: BTreeSet<IpAddr>,
}

/// Nearly always there is one, who needs no order.
#[derive(Debug)]
enum Claimants {
    One(Origin),
    Many(BTreeSet<Claim>),
}

impl Claim {
    fn new(kind: u8, leaving: bool, meta: &Meta, origin: Origin) -> Self {
        let created = meta.creation_timestamp.clone();
        Self { kind, leaving, undated: created.is_none(), created: created.unwrap_or_default(), origin }
    }
}

impl Addresses {
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.claimants.is_empty() && self.contested.is_empty()
    }

    fn holder(&self, address: IpAddr) -> Option<&Origin> {
        match self.claimants.get(&address)? {
            Claimants::One(origin) => Some(origin),
            Claimants::Many(claims) => claims.first().map(|claim| &claim.origin),
        }
    }

    /// Adds a claim; `claim_of` says that of who was alone until now.
    fn claim(&mut self, address: IpAddr, claim: Claim, claim_of: impl FnOnce(&Origin) -> Option<Claim>) {
        match self.claimants.remove(&address) {
            None => drop(self.claimants.insert(address, Claimants::One(claim.origin))),
            Some(Claimants::One(other)) => {
                let claims = claim_of(&other).into_iter().chain([claim]).collect();
                self.claimants.insert(address, Claimants::Many(claims));
                self.contested.insert(address);
            }
            Some(Claimants::Many(mut claims)) => {
                claims.insert(claim);
                self.claimants.insert(address, Claimants::Many(claims));
            }
        }
    }

    fn release(&mut self, address: IpAddr, claim: &Claim) {
        let Some(Claimants::Many(claims)) = self.claimants.get_mut(&address) else {
            self.claimants.remove(&address);
            return;
        };
        claims.remove(claim);
        if claims.len() == 1
            && let Some(last) = claims.pop_first()
        {
            self.claimants.insert(address, Claimants::One(last.origin));
            self.contested.remove(&address);
        }
    }
}

/// The claims of a pod. One on the host network shares its node's address, and agents know nobody by that.
pub(super) fn of_pod(name: &NsName, pod: Option<&Pod>) -> Vec<(IpAddr, Claim)> {
    let Some(pod) = pod.filter(|pod| !pod.is_finished() && !pod.spec.host_network) else { return Vec::new() };
    let claim = Claim::new(0, pod.is_terminating(), &pod.metadata, Origin::Pod(name.clone()));
    pod.addresses().collect::<BTreeSet<_>>().into_iter().map(|address| (address, claim.clone())).collect()
}

pub(super) fn of_workload_entry(name: &NsName, entry: Option<&WorkloadEntry>) -> Vec<(IpAddr, Claim)> {
    let claim = |entry: &WorkloadEntry| {
        let claim = Claim::new(1, false, &entry.metadata, Origin::WorkloadEntry(name.clone()));
        Some((entry.spec.ip()?, claim))
    };
    entry.and_then(claim).into_iter().collect()
}

pub(super) fn of_service_entry(name: &NsName, entry: Option<&ServiceEntry>) -> Vec<(IpAddr, Claim)> {
    let Some(entry) = entry else { return Vec::new() };
    let addresses: BTreeSet<_> = entry.spec.endpoints.iter().filter_map(|endpoint| endpoint.ip()).collect();
    let claim =
        |address| (address, Claim::new(2, false, &entry.metadata, Origin::Inline(name.clone(), address)));
    addresses.into_iter().map(claim).collect()
}

impl Index {
    /// Replaces the claims of an object, and marks whoever gains or loses an address by that.
    pub(super) fn move_claims(&mut self, before: Vec<(IpAddr, Claim)>, after: Vec<(IpAddr, Claim)>) {
        if before == after {
            return;
        }
        let touched: BTreeSet<_> = before.iter().chain(&after).map(|(address, _)| *address).collect();
        let former: Vec<_> =
            touched.into_iter().map(|address| (address, self.addresses.holder(address).cloned())).collect();
        for (address, claim) in &before {
            self.addresses.release(*address, claim);
        }
        for (address, claim) in after {
            let inputs = &self.inputs;
            let claim_of = |origin: &Origin| {
                let all = match origin {
                    Origin::Pod(name) => of_pod(name, inputs.pods.get(name).map(AsRef::as_ref)),
                    Origin::WorkloadEntry(name) => {
                        of_workload_entry(name, inputs.workload_entries.get(name).map(AsRef::as_ref))
                    }
                    Origin::Inline(name, _) => {
                        of_service_entry(name, inputs.service_entries.get(name).map(AsRef::as_ref))
                    }
                    Origin::Slice(..) => Vec::new(),
                };
                all.into_iter().find(|(own, _)| *own == address).map(|(_, claim)| claim)
            };
            self.addresses.claim(address, claim, claim_of);
        }
        for (address, former) in former {
            let holder = self.addresses.holder(address).cloned();
            if former != holder {
                former.into_iter().chain(holder).for_each(|origin| self.workloads.push(origin));
            }
        }
    }

    /// Whether another workload has one of its addresses for agents.
    pub(super) fn is_outdone(&self, origin: &Origin, addresses: impl IntoIterator<Item = IpAddr>) -> bool {
        let outdone = |address| self.addresses.holder(address).is_some_and(|holder| holder != origin);
        !self.addresses.contested.is_empty() && addresses.into_iter().any(outdone)
    }

    /// Who has an address that is another's for agents. Endpoints of a ServiceEntry are mostly meant to be somebody else's.
    pub(super) fn outdone(&self) -> impl Iterator<Item = Problem> {
        self.addresses.contested.iter().flat_map(|address| {
            let Some(Claimants::Many(claims)) = self.addresses.claimants.get(address) else {
                return Vec::new();
            };
            let holder = claims.first().and_then(|claim| key_of(&claim.origin));
            let losers = claims.iter().skip(1).filter_map(|claim| key_of(&claim.origin));
            let problem = |(key, field): (Key, &str)| Problem {
                key,
                field: field.to_owned(),
                reason: format!(
                    "{address} belongs to {}: who connects there is judged by the policies of that one",
                    holder.as_ref().map_or(String::new(), |(key, _)| key.to_string())
                ),
            };
            losers.take(MAX_NAMED).map(problem).collect()
        })
    }
}

/// The object, and the field in which it says its address.
fn key_of(origin: &Origin) -> Option<(Key, &'static str)> {
    match origin {
        Origin::Pod(name) => Some((Key { kind: Kind::Pod, name: name.clone() }, "status.podIPs")),
        Origin::WorkloadEntry(name) => {
            Some((Key { kind: Kind::WorkloadEntry, name: name.clone() }, "spec.address"))
        }
        Origin::Inline(..) | Origin::Slice(..) => None,
    }
}
