//! What the proxies of this node have done, and what they use.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::proxy::busy_poll::Looks;
use crate::proxy::host::Outcome;
use crate::proxy::inbound::Inbound;
use crate::proxy::limits::{Allowance, Counts};
use crate::proxy::outbound::Outbound;

/// How a connection can end; refused ones have the name of their [`crate::proxy::stream::Reason`].
const ENDED: &str = "ended";
const CUT: &str = "cut";
const REVOKED: &str = "revoked";

/// Why a connection got no route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NoRoute {
    /// Nothing says where the application meant to connect: it connected to the proxy itself.
    NoOriginal,
    /// Nobody known is at that address.
    Unknown,
    /// The service has no endpoint left.
    NoEndpoint,
    /// Policy.
    Denied,
}

impl NoRoute {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::NoOriginal, Self::Unknown, Self::NoEndpoint, Self::Denied];

    /// For metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoOriginal => "no-original-destination",
            Self::Unknown => "unknown-destination",
            Self::NoEndpoint => "no-endpoint",
            Self::Denied => "policy",
        }
    }
}

/// Of one side of all pods.
#[derive(Debug, Default)]
pub struct SideFigures {
    /// What the listeners count.
    pub counts: Arc<Counts>,
    outcomes: Mutex<BTreeMap<&'static str, u64>>,
    sent: AtomicU64,
    received: AtomicU64,
}

impl SideFigures {
    /// How connections have ended: how many, by outcome.
    pub fn outcomes(&self) -> BTreeMap<&'static str, u64> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes from applications, and to them.
    pub fn moved(&self) -> (u64, u64) {
        (self.sent.load(Relaxed), self.received.load(Relaxed))
    }

    pub(super) fn finished(&self, outcome: &Outcome) {
        let (name, moved) = match outcome {
            Outcome::Refused(reason) => (reason.name(), None),
            Outcome::Ended(moved) => (ENDED, Some(moved)),
            Outcome::Cut(moved, _why) => (CUT, Some(moved)),
            Outcome::Revoked => (REVOKED, None),
        };
        if let Some(moved) = moved {
            self.sent.fetch_add(moved.sent, Relaxed);
            self.received.fetch_add(moved.received, Relaxed);
        }
        *self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
    }
}

/// Of all pods of this node. Counts go on when a pod has gone.
#[derive(Debug, Default)]
pub struct Figures {
    /// Connections of workloads.
    pub outbound: SideFigures,
    /// Connections to workloads.
    pub inbound: SideFigures,
    no_route: [AtomicU64; NoRoute::ALL.len()],
    /// Times that a pod's listeners could not be opened.
    pub listen_failures: AtomicU64,
    /// Times that a namespace could not be entered or guarded.
    pub namespace_failures: AtomicU64,
    /// Times that the real client could not be shown to an application, which then saw the proxy's address.
    pub unshown_clients: AtomicU64,
    /// What its threads did before they slept.
    pub looks: Arc<Looks>,
    pods: Mutex<BTreeMap<Arc<str>, Pod>>,
}

/// A pod as it is now.
#[derive(Debug, Default)]
struct Pod {
    state: State,
    inbound: Weak<Allowance>,
    outbound: Weak<Outbound>,
}

/// How far a pod's proxy is.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// No process yet, or none any more.
    #[default]
    NoProcess,
    /// Its processes are in the node's own network namespace.
    Host,
    /// It cannot be served, with why.
    Failed(String),
    /// It listens, and waits for a certificate.
    NoCertificate,
    /// It serves.
    Ready,
    /// The agent stops.
    Draining,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(reason) => write!(f, "failed: {reason}"),
            Self::NoProcess | Self::Host | Self::NoCertificate | Self::Ready | Self::Draining => {
                f.write_str(self.name())
            }
        }
    }
}

impl State {
    /// For metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoProcess => "no-process",
            Self::Host => "host-network",
            Self::Failed(_) => "failed",
            Self::NoCertificate => "no-certificate",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

/// A pod's proxy, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReport {
    /// The workload.
    pub uid: Arc<str>,
    /// How far it is.
    pub state: State,
    /// Connections of the workload now.
    pub outbound: usize,
    /// Connections to it now.
    pub inbound: usize,
    /// Tunnels that wait for the next stream.
    pub idle_tunnels: usize,
    /// Bytes in large buffers.
    pub buffers: usize,
}

impl Figures {
    /// Nothing yet, by threads that count in `looks`.
    pub fn of(looks: Arc<Looks>) -> Self {
        Self { looks, ..Self::default() }
    }

    pub(super) fn no_route(&self, why: NoRoute) {
        self.no_route[why as usize].fetch_add(1, Relaxed);
    }

    /// Whether that is another state than before.
    pub(super) fn state(&self, uid: &Arc<str>, state: State) -> bool {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let pod = pods.entry(Arc::clone(uid)).or_default();
        let other = pod.state != state;
        pod.state = state;
        other
    }

    pub(super) fn serving(&self, uid: &Arc<str>, inbound: &Arc<Inbound>, outbound: &Arc<Outbound>) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let pod = pods.entry(Arc::clone(uid)).or_default();
        pod.inbound = Arc::downgrade(&inbound.allowance);
        pod.outbound = Arc::downgrade(outbound);
    }

    pub(super) fn gone(&self, uid: &str) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// Connections without a route, by why.
    pub fn no_routes(&self) -> impl Iterator<Item = (NoRoute, u64)> {
        NoRoute::ALL.into_iter().map(|why| (why, self.no_route[why as usize].load(Relaxed)))
    }

    /// The pods' proxies, in order of uids.
    pub fn pods(&self) -> Vec<PodReport> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let report = |(uid, pod): (&Arc<str>, &Pod)| {
            let (inbound, outbound) = (pod.inbound.upgrade(), pod.outbound.upgrade());
            let held = |allowance: &Arc<Allowance>| allowance.budget.held() + allowance.unread.held();
            PodReport {
                uid: Arc::clone(uid),
                state: pod.state.clone(),
                outbound: outbound.as_ref().map_or(0, |outbound| outbound.allowance.connected()),
                inbound: inbound.as_ref().map_or(0, |allowance| allowance.connected()),
                idle_tunnels: outbound.as_ref().map_or(0, |outbound| outbound.pool.idle()),
                buffers: inbound.iter().map(held).sum::<usize>()
                    + outbound.iter().map(|outbound| held(&outbound.allowance)).sum::<usize>(),
            }
        };
        pods.iter().map(report).collect()
    }
}
