//! The owner's dealings with policies: takes them in, and puts in force what is planned.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_common::abi::{Address, Peer, PlainKey, Proxy, Verdict, VerdictKey, identity_of};
use tracing::{info, warn};

use super::Owner;
use crate::datapath::Datapath;
use crate::datapath::desired::map_address;
use crate::datapath::passages::Heartbeat;
use crate::policy::{Bearing, PolicyPlan, VerdictMaps};
use crate::snapshot::{Authorization, Changed, PolicyUpdate, Workload, journal};
use crate::xds::Versions;
use aya::maps::MapError;

/// Workloads whose addresses are tried again at a time.
const RETRIES: usize = 1_000;
/// As many of them are named in the log.
const NAMED: usize = 10;
/// What policies are called where resources of several types are listed.
const KIND: &str = "Authorization";

impl Owner {
    /// What is held, as a stream begins with it.
    pub(in crate::app) fn versions(&self) -> Versions {
        Versions { addresses: self.snapshot.versions(), policies: self.policies.versions() }
    }

    /// What a change of policies changes, for the journal; `None`: nothing that is to be written.
    pub(in crate::app) fn policy_news(&self, update: &PolicyUpdate, complete: bool) -> Option<Vec<u8>> {
        self.has_begun().then_some(())?;
        let turned = complete && !self.policies.are_complete();
        Some(journal::of_policies(&self.policies.news(update, complete)?, turned))
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
        for workload in &changed.workloads {
            let uid = workload.uid();
            if self.snapshot.workload(&uid).is_none() {
                self.peer(&uid, None);
            }
        }
    }

    /// Says in the log which policies do not come: who names them refuses everybody.
    fn tell_awaited(&mut self, now: Instant) {
        if let Some(names) = self.awaited.overdue(self.policies.awaited(), now) {
            let policies = names.iter().take(NAMED).map(|name| &**name).collect::<Vec<_>>().join(", ");
            let count = names.len();
            warn!(
                count,
                policies, "workloads name policies that have not come, and refuse everybody until they do"
            );
        }
    }

    /// Does again what failed.
    pub(super) fn tend_policies(&mut self, now: Instant) {
        self.tell_awaited(now);
        let plan = self.policies.tick(&self.snapshot, now);
        self.enforce(&plan);
        for (uid, proxy) in std::mem::take(&mut self.untold) {
            self.proxy(&uid, proxy);
        }
        for uid in self.unplaced.iter().take(RETRIES).cloned().collect::<Vec<_>>() {
            let workload = self.snapshot.workload(&uid).cloned();
            self.peer(&uid, workload.as_deref());
        }
    }

    /// Takes over what the kernel holds, before anything else.
    pub(in crate::app) fn adopt_policies(&mut self) -> anyhow::Result<()> {
        let peers = self.datapath.peers();
        let (verdicts, plain) = (peers.verdicts()?, peers.plain_verdicts()?);
        let sets: Vec<u32> = peers.sets().collect();
        self.policies.adopt(sets.into_iter(), verdicts.into_iter(), plain.into_iter());
        Ok(())
    }

    /// All that the kernel holds has been compared with what the control plane said: what is of an agent before this one goes.
    pub(super) fn drop_adopted(&mut self) {
        let addresses: Vec<Address> = self.datapath.peers().addresses().collect();
        for address in addresses {
            if let Err(error) = self.place_address(address) {
                warn!(%error, "an address of a workload that is no more could not be taken out of the kernel");
            }
        }
        let enrolled: HashSet<u64> = self.enrollment.list().iter().map(|of| identity_of(&of.uid).0).collect();
        let strangers: Vec<u64> =
            self.datapath.peers().proxied().filter(|workload| !enrolled.contains(workload)).collect();
        for workload in strangers {
            if let Err(error) = self.datapath.peers().set_proxy(workload, None) {
                warn!(%error, "what an earlier proxy had for a workload could not be taken out of the kernel");
            }
        }
        let plan = self.policies.drop_adopted();
        self.enforce(&plan);
    }

    /// Puts a plan in force: verdicts, then peers, then what no peer leads to any more goes.
    fn enforce(&mut self, plan: &PolicyPlan) {
        if plan.is_empty() {
            return;
        }
        self.policies.write(plan, &mut Kernel(&mut self.datapath));
        for (workload, _set) in &plan.sets {
            self.peer(&workload.uid(), Some(workload));
        }
        self.policies.clean(plan, &mut Kernel(&mut self.datapath));
        self.tell_guarded();
    }

    /// Tells the kernel whose a workload's addresses are, and those that it had: mostly its own, but several may claim one. What could
    /// not be told is tried again.
    pub(super) fn peer(&mut self, uid: &str, workload: Option<&Workload>) {
        let mut addresses: BTreeSet<Address> = self.datapath.peers().of(identity_of(uid).0).collect();
        let now = workload.map(|workload| &*workload.addresses).unwrap_or_default();
        addresses.extend(now.iter().map(|address| map_address(*address)));
        let done = addresses.into_iter().try_for_each(|address| self.place_address(address));
        match done {
            Ok(()) => drop(self.unplaced.remove(uid)),
            Err(error) => {
                if self.unplaced.is_empty() {
                    warn!(workload = uid, %error, "addresses of workloads are not in the kernel; they will be tried again");
                }
                self.unplaced.insert(uid.into());
            }
        }
    }

    /// How many workloads have addresses that the kernel does not know.
    pub(in crate::app) fn unplaced(&self) -> usize {
        self.unplaced.len()
    }

    fn place_address(&mut self, address: Address) -> Result<(), MapError> {
        let owner = self.mesh.at(IpAddr::from(address.bytes()).to_canonical());
        let peer = owner.and_then(|workload| {
            let local = if *workload.node == *self.vantage.node { Peer::LOCAL } else { 0 };
            let meshed = if workload.meshed { Peer::MESHED } else { 0 };
            let policies = self.policies.set_of(&workload);
            let bearing = if local == 0 { Bearing::default() } else { self.policies.bearing(&workload) };
            let rehearsed = if bearing.rehearsed { Peer::REHEARSED } else { 0 };
            let steered = if bearing.steered { Peer::STEERED } else { 0 };
            let flags = local | meshed | rehearsed | steered;
            let peer = Peer { workload: identity_of(&workload.uid()).0, flags, policies };
            // Of any other the kernel would learn nothing: there may be very many, behind services without pods.
            (peer.flags != 0 || policies != 0).then_some(peer)
        });
        self.datapath.peers().set(address, peer)
    }

    /// The heartbeat that tells the kernel whether policies are in force, too.
    pub(in crate::app) fn beats_with(&mut self, heartbeat: Arc<Heartbeat>) {
        self.heartbeat = Some(heartbeat);
        self.tell_guarded();
    }

    /// Workloads that share this node's network have no proxy, and the kernel is to know.
    pub(super) fn tell_of_hosts(&mut self, changed: &Changed) {
        for workload in &changed.workloads {
            let uid: Arc<str> = workload.uid().into();
            let now = self.snapshot.workload(&uid);
            let here = |workload: &&Arc<Workload>| *workload.node == *self.vantage.node;
            let host = |workload: &Workload| workload.host_network || workload.addresses.is_empty();
            match now.filter(here) {
                Some(now) if host(now) => {
                    self.proxy(&uid, Some(Proxy { flags: Proxy::DIRECT, ..Proxy::default() }));
                }
                // It may have been taken out of the mesh, or in.
                Some(_) => {
                    if let Some(proxy) = self.proxies.get(&uid).copied() {
                        self.proxy(&uid, Some(proxy));
                    }
                }
                None if host(workload) && *workload.node == *self.vantage.node => self.proxy(&uid, None),
                None => {}
            }
        }
    }

    /// Takes in what the proxy has for a workload, and tells the kernel. What could not be told is tried again.
    pub(in crate::app) fn proxy(&mut self, uid: &Arc<str>, proxy: Option<Proxy>) {
        match proxy {
            Some(proxy) => drop(self.proxies.insert(Arc::clone(uid), proxy)),
            None => drop(self.proxies.remove(uid)),
        }
        let meshed = self.snapshot.workload(uid).is_some_and(|workload| workload.outbound_meshed);
        let told = proxy.map(|proxy| if meshed { proxy } else { Proxy { flags: Proxy::DIRECT, ..proxy } });
        match self.datapath.peers().set_proxy(identity_of(uid).0, told) {
            Ok(()) => drop(self.untold.remove(uid)),
            Err(error) => {
                warn!(workload = %uid, %error, "what the proxy has for a workload is not in the kernel; it will be tried again");
                self.untold.insert(Arc::clone(uid), proxy);
            }
        }
    }

    fn tell_guarded(&mut self) {
        // Whether the kernel has room for them or not.
        let guarded = self.policies.guard_here() || self.datapath.peers().is_guarded();
        if let Some(heartbeat) = &self.heartbeat
            && let Err(error) = heartbeat.guarded(guarded)
        {
            warn!(%error, "whether policies are in force could not be told the kernel");
        }
    }
}

/// The maps of policies, as plans want them.
struct Kernel<'a>(&'a mut Datapath);

impl VerdictMaps for Kernel<'_> {
    fn put(&mut self, key: &VerdictKey, verdict: &Verdict) -> Result<(), String> {
        self.0.peers().set_verdict(key, Some(*verdict)).map_err(|error| error.to_string())
    }

    fn remove(&mut self, key: &VerdictKey) -> Result<(), String> {
        self.0.peers().set_verdict(key, None).map_err(|error| error.to_string())
    }

    fn put_plain(&mut self, prefix: u32, key: &PlainKey, verdict: &Verdict) -> Result<(), String> {
        self.0.peers().set_plain(prefix, key, Some(*verdict)).map_err(|error| error.to_string())
    }

    fn remove_plain(&mut self, prefix: u32, key: &PlainKey) -> Result<(), String> {
        self.0.peers().set_plain(prefix, key, None).map_err(|error| error.to_string())
    }
}

fn listed(name: &str) -> String {
    format!("{KIND} {name}")
}
