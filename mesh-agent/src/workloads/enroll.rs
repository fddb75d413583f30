//! Joins cgroups with announced workloads. Pure, and indifferent to which of the two comes first.
//!
//! A pod is matched by the UID in the name of its own cgroup: the kernel looks at all ancestors of a socket's cgroup, so
//! the containers' need no entries. A workload without Kubernetes is matched by the path that it names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::path::{self, CgroupKind};
use super::watch::CgroupEvent;
use crate::snapshot::Workload;

/// A change of what should be in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Sockets created in that cgroup, and below, are the workload's.
    Add {
        /// Cgroup id.
        cgroup: u64,
        /// The workload.
        uid: Arc<str>,
    },
    /// They are no longer anybody's.
    Remove {
        /// Cgroup id.
        cgroup: u64,
    },
}

/// A workload of this node with the cgroups that are its own, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The workload.
    pub uid: Arc<str>,
    /// Id and relative path of each of its cgroups; none yet, when it was only announced.
    pub cgroups: Vec<(u64, PathBuf)>,
}

/// What names a cgroup: one (or a hostile double) cgroup and one (or a hostile double) workload may have it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Claim {
    Pod(Box<str>),
    Path(PathBuf),
}

/// Known cgroups and announced workloads of one node.
#[derive(Debug)]
pub struct Enrollment {
    node: Box<str>,
    /// Pod cgroups, and all others, by relative path.
    cgroups: HashMap<PathBuf, u64>,
    /// The same by what a workload may claim, the shallowest first.
    claimable: HashMap<Claim, BTreeMap<(usize, PathBuf), u64>>,
    /// Who claims; the first in order of uids gets it.
    claims: HashMap<Claim, BTreeSet<Arc<str>>>,
    by_uid: BTreeMap<Arc<str>, Vec<Claim>>,
    /// What the kernel was told.
    enrolled: BTreeMap<u64, Arc<str>>,
}

impl Enrollment {
    /// For the workloads of `node`.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            cgroups: HashMap::new(),
            claimable: HashMap::new(),
            claims: HashMap::new(),
            by_uid: BTreeMap::new(),
            enrolled: BTreeMap::new(),
        }
    }

    /// Takes in what happened in the cgroup tree.
    pub fn cgroup(&mut self, event: CgroupEvent) -> Vec<Change> {
        let mut changes = Vec::new();
        match event {
            CgroupEvent::Appeared { id, path } => {
                let path = relative(&path);
                if self.cgroups.get(&path) == Some(&id) {
                    return changes;
                }
                // Same path, other id: it went and came back between two looks.
                self.forget(&path, &mut changes);
                for claim in claims_on(&path) {
                    self.claimable.entry(claim.clone()).or_default().insert(by_depth(&path), id);
                    self.settle_all(&claim, &mut changes);
                }
                self.cgroups.insert(path, id);
            }
            CgroupEvent::Gone { path } => self.forget(&relative(&path), &mut changes),
        }
        changes
    }

    /// Takes in a workload as it is now; `None` when it is gone.
    pub fn workload(&mut self, uid: &str, workload: Option<&Workload>) -> Vec<Change> {
        let wanted = workload.map(|w| self.claims_of(w)).unwrap_or_default();
        let mut changes = Vec::new();
        if self.by_uid.get(uid).map_or(&[][..], Vec::as_slice) == wanted {
            return changes;
        }
        let before = self.by_uid.remove(uid).unwrap_or_default();
        for claim in &before {
            if let Some(owners) = self.claims.get_mut(claim) {
                owners.remove(uid);
                if owners.is_empty() {
                    self.claims.remove(claim);
                }
            }
        }
        if !wanted.is_empty() {
            let uid: Arc<str> = uid.into();
            for claim in &wanted {
                self.claims.entry(claim.clone()).or_default().insert(Arc::clone(&uid));
            }
            self.by_uid.insert(uid, wanted.clone());
        }
        for claim in before.iter().chain(&wanted) {
            self.settle_all(claim, &mut changes);
        }
        changes
    }

    /// The workloads of this node in order of uids, those without a cgroup included.
    pub fn list(&self) -> Vec<Enrolled> {
        let mut all: BTreeMap<&Arc<str>, Vec<(u64, PathBuf)>> =
            self.by_uid.keys().map(|uid| (uid, Vec::new())).collect();
        for (path, id) in &self.cgroups {
            if let Some(owner) = self.enrolled.get(id) {
                all.entry(owner).or_default().push((*id, path.clone()));
            }
        }
        all.into_iter()
            .map(|(uid, mut cgroups)| {
                cgroups.sort();
                Enrolled { uid: Arc::clone(uid), cgroups }
            })
            .collect()
    }

    /// All that should be in the kernel, in order of cgroup ids.
    pub fn desired(&self) -> impl Iterator<Item = (u64, Arc<str>)> {
        self.enrolled.iter().map(|(id, uid)| (*id, Arc::clone(uid)))
    }

    /// How many cgroups are known.
    pub fn cgroup_count(&self) -> usize {
        self.cgroups.len()
    }

    fn claims_of(&self, workload: &Workload) -> Vec<Claim> {
        let here = *workload.node == *self.node;
        let cgroup = workload.cgroup.as_deref().filter(|_| here || workload.node.is_empty());
        let pod = workload.pod_uid.as_deref().filter(|_| here);
        let plain = |path: &&str| !Path::new(path).components().any(|part| part == Component::ParentDir);
        let path =
            cgroup.filter(plain).map(|path| relative(Path::new(path))).filter(|path| path != Path::new(""));
        pod.map(|uid| Claim::Pod(uid.into())).into_iter().chain(path.map(Claim::Path)).collect()
    }

    fn forget(&mut self, path: &Path, changes: &mut Vec<Change>) {
        let Some(id) = self.cgroups.remove(path) else { return };
        if self.enrolled.remove(&id).is_some() {
            changes.push(Change::Remove { cgroup: id });
        }
        for claim in claims_on(path) {
            if let Some(known) = self.claimable.get_mut(&claim) {
                known.remove(&by_depth(path));
                if known.is_empty() {
                    self.claimable.remove(&claim);
                }
            }
            self.settle_all(&claim, changes);
        }
    }

    /// Makes what the kernel knows of the cgroups under a claim equal to who claims them.
    fn settle_all(&mut self, claim: &Claim, changes: &mut Vec<Change>) {
        let cgroups: Vec<_> =
            self.claimable.get(claim).into_iter().flatten().map(|((_, p), id)| (*id, p)).collect();
        let wanted: Vec<_> = cgroups.into_iter().map(|(id, path)| (id, self.owner(path))).collect();
        for (id, owner) in wanted {
            match owner {
                Some(uid) => {
                    if self.enrolled.insert(id, Arc::clone(&uid)).as_ref() != Some(&uid) {
                        changes.push(Change::Add { cgroup: id, uid });
                    }
                }
                None => {
                    if self.enrolled.remove(&id).is_some() {
                        changes.push(Change::Remove { cgroup: id });
                    }
                }
            }
        }
    }

    /// Whose a cgroup is. A pod has one cgroup, the shallowest of its name: a process that may make cgroups inside its own
    /// must not get another pod's identity by naming one after it.
    fn owner(&self, path: &Path) -> Option<Arc<str>> {
        claims_on(path).iter().find_map(|claim| {
            let first = self.claimable.get(claim)?.first_key_value()?;
            let owners = self.claims.get(claim).filter(|_| first.0.1 == path)?;
            owners.first().map(Arc::clone)
        })
    }
}

fn by_depth(path: &Path) -> (usize, PathBuf) {
    (path.components().count(), path.to_owned())
}

/// What a workload may claim in order to own this cgroup, the more exact first.
fn claims_on(path: &Path) -> Vec<Claim> {
    let exact = Claim::Path(path.to_owned());
    match path::parse(path) {
        CgroupKind::Pod { uid, container: None } => vec![exact, Claim::Pod(uid.into())],
        CgroupKind::Pod { container: Some(_), .. } | CgroupKind::SystemdService(_) | CgroupKind::Other => {
            vec![exact]
        }
    }
}

/// The path without leading, trailing and doubled slashes.
fn relative(path: &Path) -> PathBuf {
    path.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

#[cfg(test)]
mod tests;
