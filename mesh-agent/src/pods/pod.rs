//! One workload of this node: from its first process to its last.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use mesh_common::abi::{self, Address, Proxy};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::figures::State;
use super::host::{Enrolled, Event};
use super::inward::Inside;
use super::listeners::{Listeners, open};
use super::namespaces::{Found, Look};
use super::outward::Outside;
use super::{Shared, baggage, revoked};
use crate::datapath::desired::map_address;
use crate::identity::{SpiffeId, spiffe_of};
use crate::proxy::drain::{Drain, Phase};
use crate::proxy::inbound::{self, Inbound};
use crate::proxy::limits::Allowance;
use crate::proxy::netns::Namespace;
use crate::proxy::outbound::{self, Outbound};
use crate::proxy::pool::Pool;
use crate::snapshot::Workload;

/// How often is looked whether all is as it was.
const TICK: Duration = Duration::from_millis(250);
/// How often what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Something is awaited: for so long it is looked for so often.
const PACES: [(Duration, Duration); 2] = [
    (Duration::from_secs(10), Duration::from_millis(20)),
    (Duration::from_secs(60), Duration::from_millis(100)),
];
const PATIENT: Duration = Duration::from_millis(500);

/// What the proxies of a pod know of it.
pub(super) struct Served {
    pub(super) own: SpiffeId,
    pub(super) namespace: Namespace,
    workload: RwLock<Arc<Workload>>,
    /// How many connections without TLS its proxy carries, by the client's end and the one that was dialled: mostly one.
    carried: Mutex<Carried>,
}

/// By both ends of a connection.
type Carried = HashMap<(SocketAddr, SocketAddr), u32>;

impl Served {
    fn new(own: SpiffeId, namespace: &Namespace, workload: &Arc<Workload>) -> Arc<Self> {
        let (namespace, workload) = (namespace.clone(), RwLock::new(Arc::clone(workload)));
        Arc::new(Self { own, namespace, workload, carried: Mutex::default() })
    }

    pub(super) fn carried(&self) -> MutexGuard<'_, Carried> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn workload(&self) -> Arc<Workload> {
        Arc::clone(&self.workload.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Looks after a workload until `wanted` has lost its sender and what is open then has had its grace time, or `hurry` says that it has not; or
/// the agent stops.
pub(super) async fn run(
    shared: Arc<Shared>,
    wanted: watch::Receiver<Enrolled>,
    phase: watch::Receiver<Phase>,
    hurry: Arc<Notify>,
) {
    let uid = Arc::clone(&wanted.borrow().uid);
    loop {
        let (shared, uid) = (Arc::clone(&shared), Arc::clone(&uid));
        let since = Instant::now();
        let home = shared.threads.home().clone();
        let (wanted, phase, hurry) = (wanted.clone(), phase.clone(), Arc::clone(&hurry));
        let pod = Pod { shared, uid, wanted, phase, hurry, since, home };
        let (shared, uid) = (Arc::clone(&pod.shared), Arc::clone(&pod.uid));
        // A task of its own, so that an error in it does not leave the workload without anybody who knows.
        match tokio::spawn(pod.run()).await {
            Ok(()) => break,
            Err(ended) if ended.is_panic() => {
                error!(workload = %uid, error = %ended, "the proxy of a workload failed; it begins anew");
                shared.tell(Event::Gone { uid });
                sleep(RETRY).await;
            }
            // The runtime ends.
            Err(_cancelled) => return,
        }
    }
    shared.figures.gone(&uid);
}

impl Shared {
    fn tell(&self, event: Event) {
        // The agent may be about to end.
        drop(self.events.send(event));
    }
}

struct Pod {
    shared: Arc<Shared>,
    uid: Arc<str>,
    wanted: watch::Receiver<Enrolled>,
    phase: watch::Receiver<Phase>,
    hurry: Arc<Notify>,
    /// Since when something has been awaited.
    since: Instant,
    /// The thread that its listeners are on.
    home: Handle,
}

/// Why waiting has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Time,
    Changed,
    Removed,
    Stopped,
}

impl Pod {
    async fn run(mut self) {
        while let Some(found) = self.find().await {
            if !self.inside(found).await {
                break;
            }
            self.since = Instant::now();
        }
        // Not at the agent's end: policy stays in force without it.
        if *self.phase.borrow() < Phase::Draining {
            self.shared.guards.forget(&self.uid, |cookie| self.shared.kernel.unguard(cookie));
        }
    }

    /// The workload's namespace, as soon as it has one; none when nobody wants to know any more.
    async fn find(&mut self) -> Option<Found> {
        loop {
            let cgroups = self.wanted.borrow_and_update().cgroups.clone();
            let pause = match self.shared.places.look(&cgroups) {
                Look::Inside(found) => return Some(found),
                Look::Nobody => {
                    self.state(State::NoProcess);
                    self.pace()
                }
                Look::Host => {
                    self.state(State::Host);
                    RETRY
                }
                Look::Hidden => {
                    if !self.shared.complained.swap(true, Relaxed) {
                        error!(
                            "the processes of this node's workloads cannot be seen: run the agent in the node's process namespace (hostPID: true) and with CAP_SYS_PTRACE"
                        );
                    }
                    self.state(State::Failed(
                        "its processes cannot be seen without hostPID and CAP_SYS_PTRACE".to_owned(),
                    ));
                    RETRY
                }
            };
            match self.wait(pause).await {
                Woken::Time => {}
                Woken::Changed => self.since = Instant::now(),
                Woken::Removed | Woken::Stopped => return None,
            }
        }
    }

    /// Serves in a namespace for as long as the workload has it; whether to look for another one then.
    async fn inside(&mut self, mut found: Found) -> bool {
        let entered = found.file.try_clone().and_then(Namespace::enter).map_err(anyhow::Error::from);
        let guarded = entered.and_then(|namespace| {
            let guard = || self.shared.kernel.guard(&found.file, namespace.cookie());
            self.shared.guards.enter(&self.uid, namespace.cookie(), guard)?;
            Ok(namespace)
        });
        let namespace = match guarded {
            Ok(namespace) => namespace,
            Err(reason) => {
                self.shared.figures.namespace_failures.fetch_add(1, Relaxed);
                self.fail(format!("its network namespace: {reason:#}"));
                return matches!(self.wait(RETRY).await, Woken::Time | Woken::Changed);
            }
        };
        let cookie = namespace.cookie();
        self.tell(cookie, &[], false);
        let ended = loop {
            match self.open_and_serve(&mut found, &namespace).await {
                Woken::Changed if self.is_inside_still(&mut found) => {}
                ended @ (Woken::Time | Woken::Changed | Woken::Removed | Woken::Stopped) => break ended,
            }
        };
        if ended == Woken::Stopped {
            return false;
        }
        self.shared.guards.leave(&self.uid);
        self.shared.tell(Event::Gone { uid: Arc::clone(&self.uid) });
        ended != Woken::Removed
    }

    /// Until what is to be served changes; [`Woken::Time`]: until the namespace is no longer the workload's.
    async fn open_and_serve(&mut self, found: &mut Found, namespace: &Namespace) -> Woken {
        let (_phase, drain) = Drain::new();
        // Ended when this is left.
        let mut looking = JoinSet::new();
        loop {
            let enrolled = self.wanted.borrow_and_update().clone();
            let (reason, pause, own) = match spiffe_of(&enrolled.workload) {
                Ok(own) => match open(&self.shared, namespace, &enrolled, &self.home).await {
                    Ok(listeners) => {
                        drop(looking);
                        return self.serve(found, namespace, &enrolled, own, listeners).await;
                    }
                    Err(error) => {
                        self.shared.figures.listen_failures.fetch_add(1, Relaxed);
                        let pause = if error.is_early() { self.pace() } else { RETRY };
                        (error.to_string(), pause, Some(own))
                    }
                },
                Err(error) => (error.to_string(), RETRY, None),
            };
            self.fail(reason);
            // It is guarded without a proxy as well, and so are the connections that it has.
            if let Some(own) = own.filter(|_| looking.is_empty()) {
                let served = Served::new(own, namespace, &enrolled.workload);
                looking.spawn(revoked::watch(Arc::clone(&self.shared), served, drain.clone()));
            }
            match self.wait(pause).await {
                Woken::Time if self.is_inside(found) => {}
                woken @ (Woken::Time | Woken::Changed | Woken::Removed | Woken::Stopped) => return woken,
            }
        }
    }

    async fn serve(
        &mut self,
        found: &mut Found,
        namespace: &Namespace,
        enrolled: &Enrolled,
        own: SpiffeId,
        listeners: Listeners,
    ) -> Woken {
        let served = Served::new(own.clone(), namespace, &enrolled.workload);
        let (phase, drain) = Drain::new();
        let mut tasks = self.start(&served, listeners, &drain);
        let cookie = namespace.cookie();
        let addresses = &enrolled.workload.addresses;
        let mut ready = None;
        let woken = loop {
            let now = self.shared.certificates.current(&own).is_some();
            if ready != Some(now) {
                self.tell(cookie, addresses, now);
                self.state(if now { State::Ready } else { State::NoCertificate });
                match now {
                    true => info!(workload = %self.uid, "its connections are proxied"),
                    false if ready.is_some() => {
                        warn!(workload = %self.uid, "its certificate has expired: its connections are not proxied");
                    }
                    false => {}
                }
                ready = Some(now);
            }
            match self.wait(if now { TICK } else { self.pace() }).await {
                Woken::Time if self.is_inside(found) => {}
                Woken::Changed => {
                    let new = self.wanted.borrow_and_update().clone();
                    let same = new.cgroups == enrolled.cgroups
                        && new.workload.addresses == *addresses
                        && spiffe_of(&new.workload).is_ok_and(|new| new == own);
                    if !same {
                        break Woken::Changed;
                    }
                    let held = &served.workload;
                    *held.write().unwrap_or_else(PoisonError::into_inner) = new.workload;
                    // Whoever was let in was let in by what it was before.
                    self.shared.mesh.bump();
                }
                woken @ (Woken::Time | Woken::Removed | Woken::Stopped) => break woken,
            }
        };
        // Before the listeners close, so that as few connections as may be come to closed ones.
        self.tell(cookie, addresses, false);
        if woken == Woken::Removed {
            // The kernel programs do not know it any more: guarded it would be closed to everybody.
            self.shared.guards.forget(&self.uid, |cookie| self.shared.kernel.unguard(cookie));
        }
        if matches!(woken, Woken::Stopped | Woken::Removed) {
            self.state(State::Draining);
            phase.send_replace(Phase::Draining);
            let limit = if woken == Woken::Removed { self.shared.mesh.grace() } else { Duration::MAX };
            let mut over = self.phase.clone();
            tokio::select! {
                () = async { while tasks.join_next().await.is_some() {} } => {}
                // Its sender lives longer than this.
                _over = over.wait_for(|phase| *phase == Phase::Over) => {}
                () = sleep(limit) => {}
                () = self.hurry.notified() => {}
                () = self.has_left(found), if woken == Woken::Removed => {}
            }
        }
        phase.send_replace(Phase::Over);
        while tasks.join_next().await.is_some() {}
        woken
    }

    fn start(&self, served: &Arc<Served>, listeners: Listeners, drain: &Drain) -> JoinSet<()> {
        let shared = &self.shared;
        let told = baggage::of(&served.workload());
        let allowance =
            |side: &super::figures::SideFigures| Allowance::counting(shared.limits, Arc::clone(&side.counts));
        let inbound = Arc::new(Inbound {
            own: served.own.clone(),
            configs: Arc::clone(&shared.configs),
            host: Arc::new(Inside { shared: Arc::clone(shared), pod: Arc::clone(served) }),
            allowance: allowance(&shared.figures.inbound),
            threads: shared.threads.clone(),
            baggage: told.clone(),
        });
        let outbound = Arc::new(Outbound {
            own: served.own.clone(),
            configs: Arc::clone(&shared.configs),
            host: Arc::new(Outside { shared: Arc::clone(shared), pod: Arc::clone(served) }),
            allowance: allowance(&shared.figures.outbound),
            pool: Pool::new(shared.limits.idle_tunnels, shared.limits.idle_timeout),
            threads: shared.threads.clone(),
            baggage: told,
        });
        shared.figures.serving(&self.uid, &inbound, &outbound);
        let mut tasks = JoinSet::new();
        for listener in listeners.outbound {
            tasks.spawn_on(outbound::serve(Arc::clone(&outbound), listener, drain.clone()), &self.home);
        }
        for listener in listeners.tunnels {
            tasks.spawn_on(inbound::serve(Arc::clone(&inbound), listener, drain.clone()), &self.home);
        }
        for listener in listeners.plain {
            tasks.spawn_on(inbound::serve_plain(Arc::clone(&inbound), listener, drain.clone()), &self.home);
        }
        tasks.spawn(revoked::watch(Arc::clone(shared), Arc::clone(served), drain.clone()));
        let mut ends = drain.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = outbound::sweep(outbound) => {}
                () = ends.reached(Phase::Draining) => {}
            }
        });
        tasks
    }

    /// Waits until the workload has no process in that namespace any more.
    async fn has_left(&self, found: &mut Found) {
        loop {
            sleep(TICK).await;
            if !self.is_inside(found) {
                return;
            }
        }
    }

    /// Whether the workload still has a process in that namespace.
    fn is_inside(&self, found: &mut Found) -> bool {
        self.shared.places.holds(found.process, found.inode) || self.is_inside_still(found)
    }

    /// The same, when its cgroups may be others, or that process has ended.
    fn is_inside_still(&self, found: &mut Found) -> bool {
        match self.shared.places.look(&self.wanted.borrow().cgroups) {
            Look::Inside(now) if now.inode == found.inode => {
                found.process = now.process;
                true
            }
            Look::Inside(_) | Look::Nobody | Look::Host | Look::Hidden => false,
        }
    }

    async fn wait(&mut self, pause: Duration) -> Woken {
        tokio::select! {
            biased;
            _stop = self.phase.wait_for(|phase| *phase >= Phase::Draining) => Woken::Stopped,
            changed = self.wanted.changed() => match changed {
                Ok(()) => Woken::Changed,
                Err(_removed) => Woken::Removed,
            },
            () = sleep(pause) => Woken::Time,
        }
    }

    fn pace(&self) -> Duration {
        let waited = self.since.elapsed();
        PACES.iter().find(|(until, _)| waited < *until).map_or(PATIENT, |(_, pause)| *pause)
    }

    fn fail(&self, reason: String) {
        if self.state(State::Failed(reason.clone())) {
            warn!(workload = %self.uid, reason, "a workload has no proxy; it will be tried again");
        }
    }

    fn state(&self, state: State) -> bool {
        self.shared.figures.state(&self.uid, state)
    }

    fn tell(&self, netns: u64, addresses: &[IpAddr], ready: bool) {
        let first = |four: bool| {
            let found = addresses.iter().find(|address| address.is_ipv4() == four);
            found.map_or(Address::new([0; 16]), |address| map_address(*address))
        };
        let flags = if ready { Proxy::READY } else { 0 };
        let proxy = abi::Proxy { netns, flags, zero: 0, v4: first(true), v6: first(false) };
        self.shared.tell(Event::Proxy { uid: Arc::clone(&self.uid), proxy });
    }
}
