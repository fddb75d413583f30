//! The one owner of snapshot, policies, enrolment and datapath: everything that changes them passes through here, one at a time.

mod awaited;
mod policy;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use mesh_common::abi::Proxy;
use tracing::{info, warn};

use self::awaited::Awaited;
use crate::admin::view::Source;
use crate::config::NodeConfig;
use crate::datapath::Datapath;
use crate::datapath::desired::{Vantage, frontends};
use crate::datapath::passages::Heartbeat;
use crate::identity::Announced;
use crate::pods::mesh::Mesh;
use crate::policy::{Denials, Policies};
use crate::snapshot::{Changed, Delta, Held, Locality, Rejected, Snapshot, Workload, journal};
use crate::workloads::{CgroupEvent, Change, Enrollment};

/// See the module.
pub(super) struct Owner {
    /// The kernel side.
    pub(super) datapath: Datapath,
    /// What the control plane said.
    pub(super) snapshot: Snapshot,
    /// Who may connect to whom.
    pub(super) policies: Policies,
    /// Which cgroups are which workloads.
    pub(super) enrollment: Enrollment,
    /// Which identities the workloads of this node have.
    pub(super) identities: Announced,
    /// Where the snapshot came from.
    pub(super) source: Source,
    /// Whether a stream is open, and why the last one ended.
    pub(super) connection: Result<(), String>,
    /// Resources that were refused, and why; an entry goes when the resource is taken or removed.
    pub(super) rejected: BTreeMap<String, String>,
    /// How many were refused in all.
    pub(super) rejections: u64,
    /// Streams that ended, or could not be had.
    pub(super) disconnects: u64,
    /// Times that the snapshot could not be saved.
    pub(super) save_failures: u64,
    vantage: Vantage,
    fixed: NodeConfig,
    /// Enrolments that failed, by cgroup: the newest counts.
    waiting: BTreeMap<u64, Change>,
    /// Cgroups whose failed enrolment has been logged.
    complained: BTreeSet<u64>,
    /// Workloads whose addresses the kernel does not have as it should.
    unplaced: BTreeSet<Box<str>>,
    /// What the proxies have for workloads.
    proxies: BTreeMap<Arc<str>, Proxy>,
    /// The same, where the kernel does not have it as it should.
    untold: BTreeMap<Arc<str>, Option<Proxy>>,
    /// What the proxies are told of services and workloads.
    pub(super) mesh: Arc<Mesh>,
    /// Told whether policies are in force.
    pub(super) heartbeat: Option<Arc<Heartbeat>>,
    /// What the proxies have for workloads was not yet asked for since it changed.
    enrolled_changed: bool,
    /// Connections that policy refused.
    pub(super) denials: Denials,
    /// Policies that workloads name and that have not come.
    awaited: Awaited,
    /// Services of which not all could be put in force before the control plane has said everything.
    held_back: BTreeSet<Arc<str>>,
    unsaved: bool,
}

impl Owner {
    /// One that knows what the kernel holds and nothing else.
    pub(super) fn new(
        datapath: Datapath,
        node: &NodeConfig,
        identities: Announced,
        policies: Policies,
        mesh: Arc<Mesh>,
    ) -> Self {
        let locality = Locality {
            region: node.region.as_deref().unwrap_or_default().into(),
            zone: node.zone.as_deref().unwrap_or_default().into(),
            subzone: "".into(),
        };
        let vantage = Vantage {
            node: node.name.as_str().into(),
            locality,
            cluster: node.cluster_id.as_str().into(),
            network: "".into(),
        };
        Self {
            datapath,
            snapshot: Snapshot::new(),
            policies,
            enrollment: Enrollment::new(&node.name),
            identities,
            source: Source::None,
            connection: Err("not connected yet".to_owned()),
            rejected: BTreeMap::new(),
            rejections: 0,
            disconnects: 0,
            save_failures: 0,
            vantage,
            fixed: node.clone(),
            waiting: BTreeMap::new(),
            complained: BTreeSet::new(),
            unplaced: BTreeSet::new(),
            proxies: BTreeMap::new(),
            untold: BTreeMap::new(),
            mesh,
            heartbeat: None,
            enrolled_changed: true,
            denials: Denials::default(),
            awaited: Awaited::default(),
            held_back: BTreeSet::new(),
            unsaved: false,
        }
    }

    /// Takes what was saved. What the kernel holds already is newer or the same, and stays until the control plane speaks.
    pub(super) fn restore(&mut self, mut saved: Held, now: Instant) {
        self.restore_policies(saved.take_policies());
        let changed = self.snapshot.restore(saved);
        self.look_around(&changed);
        self.mesh.apply(&changed, &self.snapshot, &self.vantage, now);
        self.guard(&changed);
        self.source = Source::Disk;
        self.enroll_changed(&changed);
        // Where nothing was adopted there is nothing newer than what was saved, which was whole.
        let partial = self.datapath.ledger().entries() > 0;
        for service in &changed.services {
            self.place(service, partial, now);
        }
        self.datapath.sweep(now);
        info!(
            services = self.snapshot.service_count(),
            workloads = self.snapshot.workload_count(),
            "serving from the saved snapshot"
        );
    }

    /// Whether the control plane has told everything once, and every workload of this node that is to have a proxy has a cgroup.
    pub(super) fn is_complete(&self) -> bool {
        self.source == Source::ControlPlane && super::pods::is_whole(&self.enrollment, &self.snapshot)
    }

    /// What a change changes, for the journal; `None`: nothing that is to be written.
    pub(super) fn news(&self, delta: &Delta) -> Option<Vec<u8>> {
        self.has_begun().then_some(())?;
        self.snapshot.news(delta).map(|news| journal::of_addresses(&news))
    }

    /// Whether there is a whole snapshot for what is in the journal to go on from. Before, the next process has what the kernel holds, and
    /// its proxies let nobody in.
    fn has_begun(&self) -> bool {
        self.source != Source::None
    }

    /// Puts a change in force; the resources that could not be.
    pub(super) fn apply(
        &mut self,
        delta: Delta,
        rejected: &[Rejected],
        synced: bool,
        now: Instant,
    ) -> Vec<Rejected> {
        for name in delta.updated.iter().map(|update| &update.name).chain(&delta.removed) {
            self.rejected.remove(name);
        }
        for Rejected { name, reason } in rejected {
            warn!(resource = name, reason, "refused a resource");
            self.rejected.insert(name.clone(), reason.clone());
            self.rejections += 1;
        }
        let changed = self.snapshot.apply(delta);
        self.unsaved |= !changed.is_empty();
        let moved = self.look_around(&changed);
        self.mesh.apply(&changed, &self.snapshot, &self.vantage, now);
        self.guard(&changed);
        let mut refused = self.enroll_changed(&changed);
        let first = synced && self.source != Source::ControlPlane;
        // Before the first answer is whole, a service may lack backends that are still to come.
        let partial = !synced && self.source != Source::ControlPlane;
        let mut again: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut services = changed.services;
        if moved {
            // Localities are compared anew.
            services.extend(self.snapshot.services().map(|service| Arc::clone(&service.key)));
        }
        if !partial {
            // What had to wait while the snapshot was older than the kernel, or was not yet whole.
            services.append(&mut self.held_back);
        }
        for service in &services {
            if self.place(service, partial, now).is_some() {
                again.insert(Arc::clone(service));
            }
        }
        // An address may have gone from one of these services to another, whatever their order.
        refused.extend(again.iter().filter_map(|service| self.place(service, partial, now)));
        self.datapath.sweep(now);
        if first {
            let snapshot = &self.snapshot;
            self.datapath.retain(|service| snapshot.service(service).is_some(), now);
            self.datapath.retain_enrolled();
            self.drop_adopted();
            self.source = Source::ControlPlane;
            info!(
                services = self.snapshot.service_count(),
                workloads = self.snapshot.workload_count(),
                "synced with the control plane"
            );
        }
        self.rejections += refused.len() as u64;
        refused
    }

    /// The stream to the control plane ended, or there was none to be had.
    pub(super) fn disconnected(&mut self, reason: String) {
        self.connection = Err(reason);
        self.disconnects += 1;
    }

    /// Whether connections are balanced as the control plane said, now or before a restart, and the workloads of this node have
    /// certificates; else why not.
    pub(super) fn ready(&self) -> Result<(), String> {
        match (&self.source, &self.connection) {
            (Source::Disk | Source::ControlPlane, _) if !self.policies.are_complete() => {
                Err("policies have not come yet: every workload of this node refuses connections".to_owned())
            }
            (Source::Disk | Source::ControlPlane, _) => self.identities.ready(Instant::now()),
            (Source::None, Ok(())) => Err("the control plane has not yet sent everything".to_owned()),
            (Source::None, Err(reason)) => Err(format!("no snapshot yet, and no control plane: {reason}")),
        }
    }

    /// A cgroup came or went.
    pub(super) fn cgroup(&mut self, event: CgroupEvent) {
        for change in self.enrollment.cgroup(event) {
            self.enroll(change);
        }
    }

    /// Does again what failed, and what has waited for its time.
    pub(super) fn tick(&mut self, now: Instant) {
        let partial = self.source != Source::ControlPlane;
        for service in self.datapath.tick(now) {
            self.place(&service, partial, now);
        }
        self.datapath.sweep(now);
        for (_, change) in std::mem::take(&mut self.waiting) {
            self.enroll(change);
        }
        self.tend_policies(now);
        self.mesh.tick(now);
    }

    /// Whether other workloads may be to have a proxy than when this was last asked.
    pub(super) fn take_enrolled_changed(&mut self) -> bool {
        std::mem::take(&mut self.enrolled_changed)
    }

    /// The snapshot to save, if it has changed since it was last asked for.
    pub(super) fn take_unsaved(&mut self) -> Option<Held> {
        // What came so far of a first answer is less than what is saved.
        (self.source == Source::ControlPlane && std::mem::take(&mut self.unsaved))
            .then(|| self.snapshot.held().with_policies(self.policies.held()))
    }

    /// Saving failed: try again.
    pub(super) fn not_saved(&mut self) {
        self.unsaved = true;
        self.save_failures += 1;
    }

    /// Puts a service in force as the snapshot has it, which is not at all when it has none. Where the snapshot is `partial`,
    /// or older than the kernel, what the kernel holds stays, and a service is not made one that refuses.
    fn place(&mut self, key: &Arc<str>, partial: bool, now: Instant) -> Option<Rejected> {
        let mut wanted = match self.snapshot.service(key) {
            Some(service) => frontends(service, self.snapshot.members(key), &self.vantage),
            None => Vec::new(),
        };
        if partial {
            let ledger = self.datapath.ledger();
            let all = wanted.len();
            wanted.retain(|frontend| {
                !ledger.found_different(frontend)
                    && (!frontend.backends.is_empty() || ledger.holds(&frontend.key))
            });
            if wanted.len() < all {
                self.held_back.insert(Arc::clone(key));
            }
        }
        let reason = self.datapath.place(key, &wanted, now).err()?;
        Some(Rejected { name: key.to_string(), reason })
    }

    fn enroll_changed(&mut self, changed: &Changed) -> Vec<Rejected> {
        let mut refused = Vec::new();
        self.tell_of_hosts(changed);
        self.enrolled_changed |=
            changed.workloads.iter().any(|workload| *workload.node == *self.vantage.node);
        for workload in &changed.workloads {
            let uid = workload.uid();
            let now = self.snapshot.workload(&uid).cloned();
            self.identities.workload(&uid, now.as_deref(), Instant::now());
            for change in self.enrollment.workload(&uid, now.as_deref()) {
                if let Some(reason) = self.enroll(change) {
                    refused.push(Rejected { name: uid.clone(), reason });
                }
            }
        }
        self.identities.publish();
        refused
    }

    fn enroll(&mut self, change: Change) -> Option<String> {
        let cgroup = match &change {
            Change::Add { cgroup, .. } | Change::Remove { cgroup } => *cgroup,
        };
        self.waiting.remove(&cgroup);
        self.enrolled_changed = true;
        let reason = self.datapath.enroll(&change).err()?;
        if self.complained.insert(cgroup) {
            warn!(cgroup, reason, "a workload is not enrolled; it will be tried again");
        }
        self.waiting.insert(cgroup, change);
        Some(reason)
    }

    /// Learns where this node stands from the workloads that run here; whether that has changed.
    fn look_around(&mut self, changed: &Changed) -> bool {
        // Pods stand where their node stands; other workloads may say anything of themselves.
        let mut here = changed.workloads.iter().filter(|workload| self.snapshot.holds(workload));
        let at_home = |workload: &&Arc<Workload>| {
            workload.node == self.vantage.node
                && workload.account().prefix.contains("//Pod/")
                && !(workload.locality.region.is_empty() && workload.locality.zone.is_empty())
        };
        let Some(neighbour) = here.rfind(at_home) else {
            return false;
        };
        let told = |flag: &Option<String>, theirs: &Arc<str>| match flag {
            Some(flag) => Arc::from(flag.as_str()),
            None => Arc::clone(theirs),
        };
        let vantage = Vantage {
            locality: Locality {
                region: told(&self.fixed.region, &neighbour.locality.region),
                zone: told(&self.fixed.zone, &neighbour.locality.zone),
                subzone: Arc::clone(&neighbour.locality.subzone),
            },
            network: Arc::clone(&neighbour.network),
            ..self.vantage.clone()
        };
        let moved = vantage.locality != self.vantage.locality || vantage.network != self.vantage.network;
        self.vantage = vantage;
        moved
    }
}
