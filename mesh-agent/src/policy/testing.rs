//! For tests: policies and workloads as the wire brings them, and a kernel that is two maps.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::abi::{Address, PlainKey, Verdict, VerdictKey, identity_of};
use mesh_common::api::istio::security as wire;
use mesh_common::api::istio::security::string_match::MatchType;
use mesh_common::api::istio::workload::Workload as WireWorkload;

use super::{Policies, PolicyPlan, VerdictMaps};
use crate::snapshot::fixtures::{of_policy, of_workload, removal, update, workload};
use crate::snapshot::{Authorization, PolicyUpdate, Snapshot, Workload};

/// The node of the tests' agent.
pub(crate) const HERE: &str = "node-a";

/// A policy `NS/NAME` of one rule of these matches.
pub(crate) fn policy(
    name: &str,
    scope: wire::Scope,
    action: wire::Action,
    matches: Vec<wire::Match>,
) -> wire::Authorization {
    let clauses = vec![wire::Clause { matches }];
    wire::Authorization {
        action: action.into(),
        rules: vec![wire::Rule { clauses }],
        ..crate::snapshot::fixtures::policy(name, scope)
    }
}

pub(crate) fn ports(ports: &[u32]) -> wire::Match {
    wire::Match { destination_ports: ports.into(), ..wire::Match::default() }
}

pub(crate) fn from_namespace(namespace: &str) -> wire::Match {
    let exact = wire::StringMatch { match_type: Some(MatchType::Exact(namespace.to_owned())) };
    wire::Match { namespaces: vec![exact], ..wire::Match::default() }
}

pub(crate) fn no_identity() -> wire::Match {
    let present = wire::StringMatch { match_type: Some(MatchType::Presence(())) };
    wire::Match { not_principals: vec![present], ..wire::Match::default() }
}

pub(crate) fn block(text: &str) -> wire::Address {
    let (address, length) = text.split_once('/').unwrap();
    let address = match address.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    wire::Address { address, length: length.parse().unwrap() }
}

pub(crate) fn received(policies: &[wire::Authorization]) -> Vec<Arc<Authorization>> {
    policies.iter().map(|one| Arc::new(Authorization::read(of_policy(one.clone(), "")))).collect()
}

pub(crate) fn updated(policies: &[wire::Authorization]) -> PolicyUpdate {
    PolicyUpdate { updated: received(policies), removed: Vec::new() }
}

pub(crate) fn removed(names: &[&str]) -> PolicyUpdate {
    PolicyUpdate { updated: Vec::new(), removed: names.iter().map(|name| (*name).to_owned()).collect() }
}

/// A pod `NS/NAME` that names these policies.
pub(crate) fn pod(name: &str, address: &str, node: &str, policies: &[&str]) -> WireWorkload {
    let uid = format!("c//Pod/{name}");
    WireWorkload {
        authorization_policies: policies.iter().map(|name| (*name).to_owned()).collect(),
        service_account: "sa".to_owned(),
        ..workload(&uid, address, node, &[])
    }
}

/// The maps, and the sets that peers have.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    pub(crate) verdicts: BTreeMap<VerdictKey, Verdict>,
    pub(crate) plain: BTreeMap<(u32, PlainKey), Verdict>,
    pub(crate) peers: BTreeMap<String, u32>,
    /// More than this many of a kind cannot be written.
    pub(crate) full_at: Option<usize>,
    /// After this many more writes, one fails.
    pub(crate) stumbles_after: Option<usize>,
}

impl VerdictMaps for Kernel {
    fn put(&mut self, key: &VerdictKey, verdict: &Verdict) -> Result<(), String> {
        if self.full_at.is_some_and(|full| self.verdicts.len() >= full && !self.verdicts.contains_key(key)) {
            return Err("full".to_owned());
        }
        self.stumble()?;
        self.verdicts.insert(*key, *verdict);
        Ok(())
    }

    fn remove(&mut self, key: &VerdictKey) -> Result<(), String> {
        self.verdicts.remove(key);
        Ok(())
    }

    fn put_plain(&mut self, prefix: u32, key: &PlainKey, verdict: &Verdict) -> Result<(), String> {
        if self.full_at.is_some_and(|full| self.plain.len() >= full) {
            return Err("full".to_owned());
        }
        self.stumble()?;
        self.plain.insert((prefix, *key), *verdict);
        Ok(())
    }

    fn remove_plain(&mut self, prefix: u32, key: &PlainKey) -> Result<(), String> {
        self.plain.remove(&(prefix, *key));
        Ok(())
    }
}

impl Kernel {
    fn stumble(&mut self) -> Result<(), String> {
        let left = self.stumbles_after.take();
        self.stumbles_after = left.and_then(|left| left.checked_sub(1));
        if left == Some(0) { Err("once".to_owned()) } else { Ok(()) }
    }

    /// What the kernel programs would find for a connection from a workload of this node: its own port first, then all others.
    pub(crate) fn by_identity(&self, source: &str, to: &str, port: u16, family: u16) -> Option<Verdict> {
        let policies = self.set(to);
        let source = identity_of(&format!("c//Pod/{source}")).0;
        let at = |port| self.verdicts.get(&VerdictKey { source, policies, port, family }).copied();
        at(port).or_else(|| at(0))
    }

    /// The same for one from an address: the longest prefix that covers it.
    pub(crate) fn by_address(&self, source: IpAddr, to: &str, port: u16) -> Option<Verdict> {
        let bits = |address: Address| u128::from_be_bytes(address.bytes());
        let address = match source {
            IpAddr::V4(v4) => bits(Address::from_v4(v4.octets())),
            IpAddr::V6(v6) => bits(Address::new(v6.octets())),
        };
        let set = self.set(to);
        let at = |port| {
            let covers = |prefix: u32, key: &PlainKey| {
                let length = prefix - PlainKey::FIXED_BITS;
                let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
                key.policies == set && key.port == port && address & mask == bits(key.source)
            };
            let matching = self.plain.iter().filter(|((prefix, key), _)| covers(*prefix, key));
            matching.max_by_key(|((prefix, _), _)| *prefix).map(|(_, verdict)| *verdict)
        };
        at(port).or_else(|| at(0))
    }

    pub(crate) fn set(&self, name: &str) -> u32 {
        self.peers[&format!("c//Pod/{name}")]
    }
}

/// An agent's policies with the snapshot and the kernel beside them.
pub(crate) struct World {
    pub(crate) policies: Policies,
    pub(crate) snapshot: Snapshot,
    pub(crate) kernel: Kernel,
}

impl World {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { policies: Policies::new(HERE, capacity), snapshot: Snapshot::new(), kernel: Kernel::default() }
    }

    /// Puts a plan in force as the owner does.
    pub(crate) fn enforce(&mut self, plan: &PolicyPlan) {
        self.policies.write(plan, &mut self.kernel);
        for (workload, set) in &plan.sets {
            self.kernel.peers.insert(workload.uid(), *set);
        }
        self.policies.clean(plan, &mut self.kernel);
    }

    pub(crate) fn pods(&mut self, pods: &[WireWorkload]) -> PolicyPlan {
        let resources: Vec<_> = pods.iter().map(|pod| of_workload(pod.clone(), "1")).collect();
        let changed = self.snapshot.apply(update(&resources));
        let plan = self.policies.workloads(&changed, &self.snapshot);
        self.enforce(&plan);
        plan
    }

    pub(crate) fn pods_gone(&mut self, names: &[&str]) -> PolicyPlan {
        let uids: Vec<String> = names.iter().map(|name| format!("c//Pod/{name}")).collect();
        let uids: Vec<&str> = uids.iter().map(|uid| &**uid).collect();
        let changed = self.snapshot.apply(removal(&uids));
        let plan = self.policies.workloads(&changed, &self.snapshot);
        self.enforce(&plan);
        self.kernel.peers.retain(|uid, _| !uids.contains(&&**uid));
        plan
    }

    pub(crate) fn apply(&mut self, update: PolicyUpdate, complete: bool) -> PolicyPlan {
        let plan = self.policies.apply(update, complete, &self.snapshot);
        self.enforce(&plan);
        plan
    }

    pub(crate) fn pod(&self, name: &str) -> Arc<Workload> {
        Arc::clone(self.snapshot.workload(&format!("c//Pod/{name}")).unwrap())
    }
}
