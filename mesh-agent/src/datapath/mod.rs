//! The kernel side: the one place that calls bpf(2).
//!
//! [`desired`] says what should be there, [`ledger`] knows what is and plans the writes, [`Datapath`] does them, counts what
//! fails and leaves it to be tried again. [`adopt`] reads the kernel back after a restart; [`load`] and [`migrate`] put
//! programs and maps in the place of older ones.

pub mod adopt;
pub mod desired;
mod fullness;
pub mod guard;
pub mod ledger;
pub mod load;
pub mod maglev;
pub mod maps;
pub mod migrate;
pub mod moves;
pub mod object;
pub mod passages;
pub mod peers;
pub mod pins;
pub mod pool;
pub mod show;
mod sys;
pub mod tree;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use aya::maps::MapError;
use mesh_common::abi::{CounterKey, Counters, Reason, ServiceKey, WorkloadIdentity, identity_of};
use tracing::{error, info, warn};

use self::desired::Frontend;
pub use self::fullness::{Counted, Fullness};
use self::guard::Guard;
use self::ledger::{Change, Ledger, Refusal};
use self::load::{Attached, Loaded};
use self::maps::Maps;
use self::passages::{Heartbeat, Passages};
use self::peers::Peers;
use crate::config::{DatapathConfig, MapSizes};
use crate::workloads;

/// How often refused services are tried again, and how many at a time: each costs as much as putting it in force.
const RETRY: std::time::Duration = std::time::Duration::from_secs(5);
const RETRIES: usize = 100;

/// Programs, maps, and what is known of their contents.
pub struct Datapath {
    loaded: Loaded,
    maps: Maps,
    peers: Peers,
    ledger: Ledger,
    sizes: MapSizes,
    enrolled: HashMap<u64, Arc<str>>,
    /// In the kernel from before, not yet confirmed.
    found: HashSet<u64>,
    identities: HashMap<WorkloadIdentity, Arc<str>>,
    /// Why services are not in force as they should be.
    refused: BTreeMap<Arc<str>, String>,
    programs: Vec<Attached>,
    /// Service ports that nobody has any more.
    orphans: HashSet<ServiceKey>,
    /// When refused services are tried again, whether there seems to be room or not.
    try_again: Instant,
    /// The last one that was.
    tried: Option<Arc<str>>,
    failures: u64,
    retries: u64,
    /// Entries, as they were last counted.
    counted: Counted,
    counters: usize,
}

impl Datapath {
    /// Loads the programs and adopts what is pinned; call [`Datapath::attach`] to put them in force.
    pub fn prepare(config: &DatapathConfig) -> Result<Self> {
        let loaded = load::load(config)?;
        let maps = loaded.maps()?;
        let peers = Peers::open(loaded.pins())?;
        let contents = maps.contents().context("reading the maps")?;
        let (ports, broken) = adopt::adopt(&contents);
        if !ports.is_empty() || !broken.is_empty() {
            info!(services = ports.len(), broken = broken.len(), "adopted what is in the kernel");
        }
        // A map that has just been made holds nothing, and reading an array takes a system call for each entry.
        let slots = if loaded.begins() { Vec::new() } else { maps.slots().context("reading BACKENDS")? };
        let ledger = Ledger::new(config.sizes, ports, broken, &slots, first_incarnation());
        drop(contents);
        let found =
            maps.enrolled().context("reading the enrolled workloads")?.into_iter().map(|(cgroup, _)| cgroup);
        Ok(Self {
            found: found.collect(),
            loaded,
            maps,
            peers,
            ledger,
            sizes: config.sizes,
            enrolled: HashMap::new(),
            identities: HashMap::new(),
            refused: BTreeMap::new(),
            programs: Vec::new(),
            orphans: HashSet::new(),
            try_again: Instant::now(),
            tried: None,
            failures: 0,
            retries: 0,
            counted: Counted::default(),
            counters: 0,
        })
    }

    /// Puts the programs in force.
    pub fn attach(&mut self) -> Result<()> {
        self.programs = self.loaded.attach()?;
        let replaced = self.programs.iter().filter(|program| program.replaced).count();
        info!(programs = self.programs.len(), replaced, "kernel programs are in force");
        Ok(())
    }

    /// The object, for its log.
    pub fn ebpf(&mut self) -> &mut aya::Ebpf {
        self.loaded.ebpf()
    }

    /// Puts the frontends of a service in force and takes out those that it no longer has. What cannot be done now is
    /// remembered in [`Datapath::refused`], and the rest is done all the same.
    pub fn put(&mut self, service: &Arc<str>, frontends: &[Frontend], now: Instant) -> Result<(), String> {
        let done = self.place(service, frontends, now);
        self.sweep(now);
        done
    }

    /// [`Datapath::put`] for one service of several that change together: what it no longer has stays in the kernel until
    /// [`Datapath::sweep`], so that another service can take it over without a moment between.
    pub fn place(&mut self, service: &Arc<str>, frontends: &[Frontend], now: Instant) -> Result<(), String> {
        let mut wrong = Vec::new();
        for frontend in frontends {
            match self.ledger.plan_put(service, frontend) {
                Ok(Some(change)) => wrong.extend(self.execute(change, now).err()),
                Ok(None) => {}
                Err(refusal @ (Refusal::Full { .. } | Refusal::Taken { .. })) => {
                    wrong.push(refusal.to_string())
                }
            }
        }
        let wanted: HashSet<&ServiceKey> = frontends.iter().map(|frontend| &frontend.key).collect();
        let unwanted: Vec<_> =
            self.ledger.owned(service).into_iter().filter(|key| !wanted.contains(key)).collect();
        for key in unwanted {
            self.ledger.disown(&key);
            self.orphans.insert(key);
        }
        if wrong.is_empty() {
            self.refused.remove(service);
            return Ok(());
        }
        let reason = wrong.join("; ");
        if self.refused.get(service) != Some(&reason) {
            error!(%service, reason, "a service is not in force as it should be");
            self.refused.insert(Arc::clone(service), reason.clone());
        }
        Err(reason)
    }

    /// Takes out what no service has any more, and frees what that used.
    pub fn sweep(&mut self, now: Instant) {
        for key in std::mem::take(&mut self.orphans) {
            if !self.ledger.is_unowned(&key) {
                continue;
            }
            if let Some(change) = self.ledger.plan_remove(&key)
                && self.execute(change, now).is_err()
            {
                // Counted; again with the next tick.
                self.orphans.insert(key);
            }
        }
        self.free_backends(now);
    }

    /// Takes out everything that belongs to no service of the snapshot, once that is whole.
    pub fn retain(&mut self, known: impl Fn(&str) -> bool, now: Instant) {
        let strangers: Vec<Arc<str>> =
            self.ledger.owners().into_iter().filter(|owner| !known(owner)).cloned().collect();
        for service in strangers {
            for key in self.ledger.owned(&service) {
                self.ledger.disown(&key);
            }
            self.refused.remove(&service);
        }
        let unowned = self.ledger.unowned();
        if !unowned.is_empty() {
            info!(services = unowned.len(), "taking out services that are no more");
        }
        self.orphans.extend(unowned);
        self.sweep(now);
    }

    fn execute(&mut self, change: Change, now: Instant) -> Result<(), String> {
        let done = self
            .maps
            .forget(&change.reused)
            .and_then(|()| change.writes.iter().try_for_each(|w| self.maps.write(w)));
        match done {
            Ok(()) => {
                self.ledger.commit(change, now);
                Ok(())
            }
            Err(error) => Err(self.failed("a service", &error)),
        }
    }

    fn failed(&mut self, what: &str, error: &MapError) -> String {
        self.failures += 1;
        let text = format!("writing {what}: {error:#}{}", cause(error));
        warn!(error = text, "a map write failed; it will be tried again");
        text
    }

    fn free_backends(&mut self, now: Instant) {
        while let Some((number, slot)) = self.ledger.renounced() {
            if let Err(error) = self.maps.free(number, slot) {
                self.failed("a free backend slot", &error);
                return;
            }
            self.ledger.renewed();
        }
        while let Some((number, slot)) = self.ledger.leaving() {
            if let Err(error) = self.maps.free(number, slot) {
                self.failed("a free backend slot", &error);
                return;
            }
            self.ledger.left(now);
        }
    }

    /// Does what has been waiting; some services to try again, if there may be room for them.
    pub fn tick(&mut self, now: Instant) -> Vec<Arc<str>> {
        self.sweep(now);
        let room = self.ledger.wake(now);
        if self.refused.is_empty() || !(room || now >= self.try_again) {
            return Vec::new();
        }
        self.try_again = now + RETRY;
        // From where the last turn ended, so that every one has its turn.
        let after = self.tried.take().map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.refused.range((after, Bound::Unbounded));
        let again: Vec<Arc<str>> = next.map(|(service, _)| Arc::clone(service)).take(RETRIES).collect();
        self.tried = again.last().filter(|_| again.len() == RETRIES).cloned();
        self.retries += again.len() as u64;
        again
    }

    /// Puts a change of the enrolled workloads in force; `Err` names what could not be done.
    pub fn enroll(&mut self, change: &workloads::Change) -> Result<(), String> {
        match change {
            workloads::Change::Add { cgroup, uid } => {
                let identity = identity_of(uid);
                if let Some(other) = self.identities.get(&identity)
                    && other != uid
                {
                    return Err(format!("{uid} has the same identity as {other}"));
                }
                if let Err(error) = self.maps.enroll(*cgroup, identity) {
                    return Err(self.failed("a workload", &error));
                }
                self.found.remove(cgroup);
                self.identities.insert(identity, Arc::clone(uid));
                self.enrolled.insert(*cgroup, Arc::clone(uid));
                Ok(())
            }
            workloads::Change::Remove { cgroup } => {
                if let Err(error) = self.maps.dismiss(*cgroup) {
                    return Err(self.failed("a workload", &error));
                }
                self.enrolled.remove(cgroup);
                Ok(())
            }
        }
    }

    /// Takes out the cgroups that an earlier agent had enrolled and that are none of ours.
    pub fn retain_enrolled(&mut self) {
        for cgroup in std::mem::take(&mut self.found) {
            if let Err(error) = self.maps.dismiss(cgroup) {
                self.failed("a workload", &error);
                self.found.insert(cgroup);
                return;
            }
        }
    }

    /// Forgets names that nothing is counted under; and counters of backends and workloads that have gone, when the map
    /// fills up.
    pub fn prune_counters(&mut self) {
        let keys = match self.maps.counted() {
            Ok(keys) => keys,
            Err(error) => {
                self.failed("counters", &error);
                return;
            }
        };
        let counted: HashSet<u32> = keys.iter().map(|key| key.backend).collect();
        self.ledger.forget_former(|backend| counted.contains(&backend));
        let sources: HashSet<u64> = keys.iter().map(|key| key.source).collect();
        let enrolled: HashSet<&Arc<str>> = self.enrolled.values().collect();
        self.identities.retain(|identity, uid| sources.contains(&identity.0) || enrolled.contains(uid));
        self.counters = keys.len();
        if keys.len() < self.sizes.counters as usize / 4 * 3 {
            return;
        }
        let backends: HashSet<u32> =
            self.ledger.ports().values().flat_map(|p| p.backends.iter().map(|b| b.number)).collect();
        let services: HashSet<u32> = self.ledger.ports().values().map(|port| port.number).collect();
        let live: HashSet<u64> = self.enrolled.values().map(|uid| identity_of(uid).0).collect();
        let gone = |key: &CounterKey| {
            (key.backend != 0 && !backends.contains(&key.backend))
                || (key.service != 0 && !services.contains(&key.service))
                || (key.source != 0 && !live.contains(&key.source))
        };
        match self.maps.prune(gone) {
            Ok(0) => {}
            Ok(removed) => info!(removed, "removed counters of what has gone"),
            Err(error) => {
                self.failed("counters", &error);
            }
        }
    }

    /// What is known of the services in the kernel.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The maps, to read.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// What the kernel knows of the workloads of the mesh, of this node's proxy and of policy.
    pub fn peers(&mut self) -> &mut Peers {
        &mut self.peers
    }

    /// For the proxy's tasks: the connections that they share with the kernel programs.
    pub fn passages(&self) -> Result<Passages> {
        Passages::open(self.loaded.pins())
    }

    /// For the proxy's tasks: the program of the network namespaces of pods.
    pub fn guard(&self) -> Result<Guard> {
        self.loaded.guard()
    }

    /// The heartbeat of the proxy, which is not alive before it beats. The calling thread must be in the node's own network namespace.
    pub fn heartbeat(&self) -> Result<Heartbeat> {
        let netns = sys::netns_cookie().context("asking for the cookie of the network namespace")?;
        Heartbeat::open(self.loaded.pins(), netns)
    }

    /// Denials that the kernel programs tell of.
    pub fn denials(&self) -> Result<aya::maps::RingBuf<aya::maps::MapData>> {
        Ok(maps::open(self.loaded.pins(), mesh_common::abi::map::DENIALS)?.try_into()?)
    }

    /// Services that are not in force as they should be, and why.
    pub fn refused(&self) -> &BTreeMap<Arc<str>, String> {
        &self.refused
    }

    /// The workload of an identity, as long as the agent has known it.
    pub fn workload(&self, identity: u64) -> Option<&Arc<str>> {
        self.identities.get(&WorkloadIdentity(identity))
    }

    /// The programs in force.
    pub fn programs(&self) -> &[Attached] {
        &self.programs
    }

    /// Map writes that failed, and services tried again.
    pub fn failures(&self) -> (u64, u64) {
        (self.failures, self.retries)
    }

    /// All counters.
    pub fn counters(&self) -> Result<Vec<(CounterKey, Counters)>> {
        self.maps.counters().context("reading COUNTERS")
    }

    /// Takes how many [`Datapath::counters`] there were.
    pub fn set_counters(&mut self, counters: usize) {
        self.counters = counters;
    }

    /// How often each reason was met.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        self.maps.reasons().context("reading REASONS")
    }
}

/// Of backend slots that were never used: another one at each start, so that what sockets remember of slots whose map had to
/// begin anew is never taken for the present.
fn first_incarnation() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |since| since.as_secs() as u32 | 1)
}

/// What the operating system said.
fn cause(error: &MapError) -> String {
    std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"))
}
