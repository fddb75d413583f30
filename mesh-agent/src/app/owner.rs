//! The one owner of snapshot, enrolment and datapath: everything that changes them passes through here, one at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tracing::{info, warn};

use crate::admin::view::Source;
use crate::config::NodeConfig;
use crate::datapath::Datapath;
use crate::datapath::desired::{Vantage, frontends};
use crate::snapshot::{Changed, Delta, Held, Locality, Rejected, Snapshot, Versioned};
use crate::workloads::{CgroupEvent, Change, Enrollment};

/// See the module.
pub(super) struct Owner {
    /// The kernel side.
    pub(super) datapath: Datapath,
    /// What the control plane said.
    pub(super) snapshot: Snapshot,
    /// Which cgroups are which workloads.
    pub(super) enrollment: Enrollment,
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
    /// Enrolments that failed.
    waiting: Vec<Change>,
    unsaved: bool,
}

impl Owner {
    /// One that knows what the kernel holds and nothing else.
    pub(super) fn new(datapath: Datapath, node: &NodeConfig) -> Self {
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
            enrollment: Enrollment::new(&node.name),
            source: Source::None,
            connection: Err("not connected yet".to_owned()),
            rejected: BTreeMap::new(),
            rejections: 0,
            disconnects: 0,
            save_failures: 0,
            vantage,
            fixed: node.clone(),
            waiting: Vec::new(),
            unsaved: false,
        }
    }

    /// Takes what was saved. What the kernel holds already is newer or the same, and stays until the control plane speaks.
    pub(super) fn restore(&mut self, saved: Vec<Versioned>, now: Instant) {
        let changed = self.snapshot.apply(Delta { updated: saved, removed: Vec::new() });
        self.source = Source::Disk;
        self.enroll_changed(&changed);
        self.look_around(&changed);
        for service in &changed.services {
            self.put(service, true, now);
        }
        info!(
            services = self.snapshot.service_count(),
            workloads = self.snapshot.workload_count(),
            "serving from the saved snapshot"
        );
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
            self.rejected.remove(&**name);
        }
        for Rejected { name, reason } in rejected {
            warn!(resource = name, reason, "refused a resource");
            self.rejected.insert(name.clone(), reason.clone());
            self.rejections += 1;
        }
        let changed = self.snapshot.apply(delta);
        self.unsaved |= !changed.is_empty();
        let mut refused = self.enroll_changed(&changed);
        let moved = self.look_around(&changed);
        let first = synced && self.source != Source::ControlPlane;
        if moved || first {
            // Localities are compared anew; and what the saved snapshot did not overwrite is now put in force.
            let all: Vec<Arc<str>> =
                self.snapshot.services().map(|service| Arc::clone(&service.key)).collect();
            let all = all.into_iter().chain(changed.services);
            refused.extend(all.filter_map(|service| self.put(&service, false, now)));
        } else {
            refused.extend(changed.services.iter().filter_map(|service| self.put(service, false, now)));
        }
        if first {
            let snapshot = &self.snapshot;
            self.datapath.retain(|service| snapshot.service(service).is_some(), now);
            self.datapath.retain_enrolled();
            self.source = Source::ControlPlane;
            info!(
                services = snapshot.service_count(),
                workloads = snapshot.workload_count(),
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

    /// Whether connections are balanced as the control plane said, now or before a restart; else why not.
    pub(super) fn ready(&self) -> Result<(), String> {
        match (&self.source, &self.connection) {
            (Source::Disk | Source::ControlPlane, _) => Ok(()),
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
        for service in self.datapath.tick(now) {
            self.put(&service, false, now);
        }
        for change in std::mem::take(&mut self.waiting) {
            self.enroll(change);
        }
    }

    /// The snapshot to save, if it has changed since it was last asked for.
    pub(super) fn take_unsaved(&mut self) -> Option<Held> {
        // What came so far of a first answer is less than what is saved.
        (std::mem::take(&mut self.unsaved) && self.source == Source::ControlPlane)
            .then(|| self.snapshot.held())
    }

    /// Saving failed: try again.
    pub(super) fn not_saved(&mut self) {
        self.unsaved = true;
        self.save_failures += 1;
    }

    /// Puts a service in force as the snapshot has it, which is not at all when it has none.
    fn put(&mut self, key: &Arc<str>, restoring: bool, now: Instant) -> Option<Rejected> {
        let mut wanted = match self.snapshot.service(key) {
            Some(service) => frontends(service, self.snapshot.members(key), &self.vantage),
            None => Vec::new(),
        };
        if restoring {
            wanted.retain(|frontend| !self.datapath.ledger().found_different(frontend));
        }
        let reason = self.datapath.put(key, &wanted, now).err()?;
        Some(Rejected { name: key.to_string(), reason })
    }

    fn enroll_changed(&mut self, changed: &Changed) -> Vec<Rejected> {
        let mut refused = Vec::new();
        for uid in &changed.workloads {
            let workload = self.snapshot.workload(uid).cloned();
            for change in self.enrollment.workload(uid, workload.as_deref()) {
                if let Some(reason) = self.enroll(change) {
                    refused.push(Rejected { name: uid.to_string(), reason });
                }
            }
        }
        refused
    }

    fn enroll(&mut self, change: Change) -> Option<String> {
        let reason = self.datapath.enroll(&change).err()?;
        warn!(reason, "a workload is not enrolled; it will be tried again");
        self.waiting.push(change);
        Some(reason)
    }

    /// Learns where this node stands from the workloads that run here; whether that has changed.
    fn look_around(&mut self, changed: &Changed) -> bool {
        let mut here = changed.workloads.iter().filter_map(|uid| self.snapshot.workload(uid));
        let Some(neighbour) = here.rfind(|workload| workload.node == self.vantage.node) else {
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
