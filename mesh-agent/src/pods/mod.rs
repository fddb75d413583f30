//! The proxies of this node's workloads: found, opened, reported and ended with them.
//!
//! [`namespaces`] finds where a workload's processes are; `pod` opens its listeners there and closes them again; `outward` and
//! `inward` answer what the proxy asks, from [`mesh`] (who is where), from the kernel programs and from policy ([`host`]).

pub mod figures;
pub mod host;
pub mod mesh;
pub mod namespaces;

mod baggage;
mod inward;
mod listeners;
mod outward;
mod pod;
mod revoked;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use self::figures::Figures;
use self::host::{Denied, Enrolled, Event, Judge, Kernel};
use self::mesh::Mesh;
use self::namespaces::Places;
use crate::identity::{Certificates, spiffe_of};
use crate::proxy::congestion::Congestion;
use crate::proxy::drain::Phase;
use crate::proxy::limits::Limits;
use crate::proxy::threads::Threads;
use crate::proxy::tls::{Configs, Protocol, Revocations};
use crate::sockets::Sweeper;

/// What the proxies work with.
pub struct Parts {
    /// Root of this node's cgroups.
    pub cgroups: PathBuf,
    /// The kernel programs.
    pub kernel: Arc<dyn Kernel>,
    /// Policy.
    pub judge: Arc<dyn Judge>,
    /// Who can be reached where.
    pub mesh: Arc<Mesh>,
    /// Certificates of this node's workloads.
    pub certificates: Arc<dyn Certificates>,
    /// What tunnels speak, the best first.
    pub protocols: Vec<Protocol>,
    /// Certificates that were revoked.
    pub revocations: Arc<Revocations>,
    /// Congestion control of tunnels.
    pub congestion: Congestion,
    /// What each side of a pod may use.
    pub limits: Limits,
    /// Told of denials.
    pub denied: Denied,
    /// Who carries connections.
    pub threads: Threads,
    /// Told what the kernel programs are to know. Without a bound, since it is at most a few events for each pod.
    pub events: mpsc::UnboundedSender<Event>,
}

/// What all pods share.
struct Shared {
    kernel: Arc<dyn Kernel>,
    judge: Arc<dyn Judge>,
    mesh: Arc<Mesh>,
    certificates: Arc<dyn Certificates>,
    configs: Arc<Configs>,
    congestion: Congestion,
    limits: Limits,
    denied: Denied,
    threads: Threads,
    events: mpsc::UnboundedSender<Event>,
    places: Places,
    figures: Arc<Figures>,
    sweeper: Sweeper,
    guards: Guards,
    /// It has been said that processes cannot be seen.
    complained: AtomicBool,
}

/// In which guarded network namespace each workload is, or was last: it may come back to that. Guards are set and taken away under this lock,
/// so that nobody takes away what another has just set.
#[derive(Default)]
struct Guards(Mutex<HashMap<Arc<str>, Place>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    cookie: u64,
    inside: bool,
}

impl Guards {
    /// The workload is in the namespace, which `guard` guards.
    fn enter<E>(&self, uid: &Arc<str>, cookie: u64, guard: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guard()?;
        places.insert(Arc::clone(uid), Place { cookie, inside: true });
        Ok(())
    }

    /// It is there no more, but may come back.
    fn leave(&self, uid: &str) {
        if let Some(place) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(uid) {
            place.inside = false;
        }
    }

    /// It has gone for good: `unguard` is called with its namespace, unless another workload has that as well.
    fn forget(&self, uid: &str, unguard: impl FnOnce(u64)) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = places.remove(uid) else { return };
        if places.values().all(|other| other.cookie != place.cookie) {
            unguard(place.cookie);
        }
    }
}

/// Who looks after a workload.
struct Task {
    handle: JoinHandle<()>,
    /// Told when it is to end without grace.
    hurry: Arc<Notify>,
}

/// The proxies of this node. Dropped, they all end at once.
pub struct Pods {
    shared: Arc<Shared>,
    pods: BTreeMap<Arc<str>, (watch::Sender<Enrolled>, Task)>,
    /// Of workloads that have gone.
    ending: BTreeMap<Arc<str>, Task>,
    phase: watch::Sender<Phase>,
    /// They let connections be looked at anew, and end with this.
    _looking: JoinSet<()>,
}

impl Pods {
    /// None yet. To be called within the runtime.
    pub fn new(parts: Parts) -> std::io::Result<Self> {
        let Parts {
            cgroups,
            kernel,
            judge,
            mesh,
            certificates,
            protocols,
            revocations,
            congestion,
            limits,
            denied,
            threads,
            events,
        } = parts;
        let figures = Arc::new(Figures::of(threads.looks()));
        let mut looking = JoinSet::new();
        looking.spawn(look_again(judge.changed(), Arc::clone(&mesh)));
        looking.spawn(look_again(certificates.trusted().changed(), Arc::clone(&mesh)));
        let shared = Arc::new(Shared {
            kernel,
            judge,
            mesh,
            configs: Arc::new(Configs::offering(Arc::clone(&certificates), protocols).honouring(revocations)),
            certificates,
            congestion,
            limits,
            denied,
            threads,
            events,
            places: Places::new(cgroups)?,
            sweeper: Sweeper::default(),
            guards: Guards::default(),
            figures,
            complained: AtomicBool::new(false),
        });
        let phase = watch::Sender::new(Phase::Serving);
        Ok(Self { shared, pods: BTreeMap::new(), ending: BTreeMap::new(), phase, _looking: looking })
    }

    /// What they have done, and use.
    pub fn figures(&self) -> Arc<Figures> {
        Arc::clone(&self.shared.figures)
    }

    /// What has become of connections that may no longer be.
    pub fn sweeper(&self) -> Sweeper {
        self.shared.sweeper.clone()
    }

    /// Does something with the network namespaces of the workloads that have a proxy, by their cookies, while none is entered or left; not while
    /// one of the workloads is in no known one, since it may come to any.
    pub fn with_namespaces<T>(&self, act: impl FnOnce(&HashSet<u64>) -> T) -> Option<T> {
        let settled = self.ending.values().all(|task| task.handle.is_finished());
        let places = self.shared.guards.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = |uid: &Arc<str>| places.get(uid).is_some_and(|place| place.inside);
        if !settled || !self.pods.keys().all(found) {
            return None;
        }
        Some(act(&places.values().map(|place| place.cookie).collect()))
    }

    /// Makes the workloads that have a proxy these; which of them are in a network namespace of their own shows later. Those of
    /// the node's own network are to be left out.
    pub fn sync(&mut self, wanted: Vec<Enrolled>) {
        self.ending.retain(|_uid, task| !task.handle.is_finished());
        let uids: BTreeSet<Arc<str>> = wanted.iter().map(|enrolled| Arc::clone(&enrolled.uid)).collect();
        let gone: Vec<Arc<str>> = self.pods.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
        for uid in gone {
            if let Some((wanted, task)) = self.pods.remove(&uid) {
                drop(wanted);
                self.ending.insert(uid, task);
            }
        }
        let identities: BTreeSet<_> =
            wanted.iter().filter_map(|enrolled| spiffe_of(&enrolled.workload).ok()).collect();
        self.shared.configs.retain(|identity| identities.contains(identity));
        for enrolled in wanted {
            match self.pods.get(&enrolled.uid) {
                Some((known, _)) => {
                    known.send_if_modified(|known| {
                        let other = *known != enrolled;
                        *known = enrolled;
                        other
                    });
                }
                None => self.begin(enrolled),
            }
        }
    }

    /// Ends them: nothing new is taken, what is open has `limit` to end. The namespaces stay guarded, and what the kernel programs
    /// know is not taken back: that is for who stops the agent to say.
    pub async fn stop(mut self, limit: Duration) {
        self.phase.send_replace(Phase::Draining);
        let pods = std::mem::take(&mut self.pods);
        let tasks = pods.into_values().map(|(wanted, task)| {
            // Not dropped before: that would say that the workload has gone.
            (Some(wanted), task)
        });
        let mut tasks: Vec<_> =
            tasks.chain(std::mem::take(&mut self.ending).into_values().map(|task| (None, task))).collect();
        let all = async {
            for (_, task) in &mut tasks {
                drop((&mut task.handle).await);
            }
        };
        if tokio::time::timeout(limit, all).await.is_err() {
            self.phase.send_replace(Phase::Over);
            for (_, task) in tasks.iter_mut().filter(|(_, task)| !task.handle.is_finished()) {
                drop((&mut task.handle).await);
            }
        }
    }

    fn begin(&mut self, enrolled: Enrolled) {
        let uid = Arc::clone(&enrolled.uid);
        let (wanted, changes) = watch::channel(enrolled);
        let before = self.ending.remove(&uid);
        let (shared, phase) = (Arc::clone(&self.shared), self.phase.subscribe());
        let hurry = Arc::new(Notify::new());
        let hurried = Arc::clone(&hurry);
        let handle = tokio::spawn(async move {
            if let Some(before) = before {
                // What it says last must not come after the first word of this one.
                before.hurry.notify_one();
                drop(before.handle.await);
            }
            pod::run(shared, changes, phase, hurried).await;
        });
        self.pods.insert(uid, (wanted, Task { handle, hurry }));
    }
}

/// A change of policy, or of whom to trust, concerns connections as a change of endpoints does.
async fn look_again<T>(mut changes: watch::Receiver<T>, mesh: Arc<Mesh>) {
    while changes.changed().await.is_ok() {
        mesh.bump();
    }
}

#[cfg(test)]
mod tests;
