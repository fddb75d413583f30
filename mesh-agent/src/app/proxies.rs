//! Joins the node proxy with kernel and policy: what passes between them, the heartbeat, and who was refused.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use aya::maps::{MapData, RingBuf};
use mesh_common::abi;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::owner::Owner;
use super::pods;
use crate::config::Config;
use crate::datapath::guard::Guard;
use crate::datapath::passages::{self, BEAT, Heartbeat, Passages, socket_address};
use crate::identity::{Certificates, spiffe_of};
use crate::metrics;
use crate::pods::figures::Figures;
use crate::pods::host::{Denial, Event, Judge, Kernel, Original};
use crate::pods::mesh::Mesh;
use crate::pods::{Parts, Pods};
use crate::policy::{self, Caller, NO_MATCH, NOT_ARRIVED, Refusal};
use crate::proxy::tls::Revocations;
use crate::snapshot::Workload;
use crate::sockets::Sweeper;

/// How often revocation lists are looked at.
const REVOKED: Duration = Duration::from_secs(5);
/// How often denials are read.
const LOOK: Duration = Duration::from_millis(100);
/// Denials that wait for the owner.
const WAITING: usize = 256;

/// The proxies of this node, and all that is heard of them.
pub(super) struct Proxies {
    pods: Pods,
    heartbeat: Arc<Heartbeat>,
    guard: Arc<Guard>,
    events: mpsc::UnboundedReceiver<Event>,
    refused: mpsc::Receiver<Denial>,
    told: mpsc::Receiver<abi::Denial>,
}

/// What was heard.
pub(super) enum Heard {
    /// What a proxy has for its workload is another.
    Event(Event),
    /// A proxy refused a connection.
    Refused(Denial),
    /// A kernel program refused a connection.
    Told(abi::Denial),
}

impl Proxies {
    /// Starts them; `tasks` gets what never ends.
    pub(super) fn start(
        owner: &mut Owner,
        config: &Config,
        certificates: Arc<dyn Certificates>,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self> {
        let heartbeat = Arc::new(owner.datapath.heartbeat()?);
        owner.beats_with(Arc::clone(&heartbeat));
        let passages = Arc::new(owner.datapath.passages()?);
        let guard = Arc::new(owner.datapath.guard()?);
        let kernel = KernelSide { passages, guard: Arc::clone(&guard) };
        let (events_sender, events) = mpsc::unbounded_channel();
        let (refused_sender, refused) = mpsc::channel(WAITING);
        let (told_sender, told) = mpsc::channel(WAITING);
        let revocations = match &config.proxy.crl {
            Some(path) => Revocations::read(path)
                .map_err(|reason| anyhow::anyhow!("--crl: {}: {reason}", path.display()))?,
            None => Revocations::none(),
        };
        let pods = Pods::new(Parts {
            cgroups: config.datapath.cgroup_root.clone(),
            kernel: Arc::new(kernel),
            judge: Arc::clone(owner.policies.shared()) as Arc<dyn Judge>,
            mesh: Arc::clone(&owner.mesh),
            certificates,
            protocols: config.proxy.protocols.clone(),
            revocations: Arc::clone(&revocations),
            limits: config.proxy.limits,
            // What the owner has no time for is counted by the proxies all the same.
            denied: Arc::new(move |denial| drop(refused_sender.try_send(denial))),
            events: events_sender,
        })
        .context("starting the node proxy")?;
        let ring = owner.datapath.denials()?;
        tasks.spawn(look_for_revoked(revocations, Arc::clone(&owner.mesh)));
        tasks.spawn(beat(Arc::clone(&heartbeat)));
        tasks.spawn(read_denials(ring, told_sender));
        Ok(Self { pods, heartbeat, guard, events, refused, told })
    }

    /// What they have done, and use.
    pub(super) fn figures(&self) -> Arc<Figures> {
        self.pods.figures()
    }

    /// What has become of connections that may no longer be.
    pub(super) fn sweeper(&self) -> Sweeper {
        self.pods.sweeper()
    }

    /// Gives those workloads a proxy that should have one, if that may have changed.
    pub(super) fn sync(&mut self, owner: &mut Owner) {
        if owner.take_enrolled_changed() {
            self.pods.sync(pods::enrolled(&owner.enrollment, &owner.snapshot));
        }
    }

    /// Removes what is left of network namespaces that have gone.
    pub(super) fn sweep(&self) {
        if let Err(error) = self.guard.sweep() {
            warn!(%error, "what is left of network namespaces that have gone cannot be removed");
        }
    }

    /// What is heard next.
    pub(super) async fn next(&mut self) -> Heard {
        tokio::select! {
            biased;
            Some(event) = self.events.recv() => Heard::Event(event),
            Some(denial) = self.refused.recv() => Heard::Refused(denial),
            Some(denial) = self.told.recv() => Heard::Told(denial),
            // Their senders live as long as the proxies.
            else => std::future::pending().await,
        }
    }

    /// Ends them: the kernel programs lead nothing more to them, and what is open has its time.
    pub(super) async fn stop(self, limit: Duration) {
        if let Err(error) = self.heartbeat.stop() {
            warn!(%error, "the kernel programs could not be told that the proxy stops; they find out within a second");
        }
        self.pods.stop(limit).await;
    }
}

/// The part of a scrape that is about policy.
pub(super) fn figures(owner: &Owner, swept: &Sweeper) -> metrics::Policy {
    let counts = owner.policies.counts();
    let understood = counts.policies.saturating_sub(counts.not_understood);
    let swept = swept.counts();
    metrics::Policy {
        complete: counts.complete,
        policies: vec![
            ("understood", understood as u64),
            ("not-understood", counts.not_understood as u64),
            ("awaited", counts.awaited as u64),
        ],
        refusing: vec![
            ("policies-not-arrived", counts.refusing_not_arrived as u64),
            ("policy-missing", counts.refusing as u64),
        ],
        left_out: (counts.left_out + counts.plain_left_out) as u64,
        unplaced: owner.unplaced() as u64,
        write_failures: counts.write_failures,
        denials: owner
            .denials
            .counts()
            .map(|(policy, side, count)| (policy.to_owned(), side.name(), count))
            .collect(),
        destroyed: [
            ("policy", &swept.policy),
            ("endpoint-gone", &swept.gone),
            ("unsupported", &swept.unsupported),
            ("failed", &swept.failed),
        ]
        .map(|(reason, count)| (reason, count.load(Ordering::Relaxed)))
        .to_vec(),
    }
}

/// What the proxies ask of the kernel side.
struct KernelSide {
    passages: Arc<Passages>,
    guard: Arc<Guard>,
}

impl Kernel for KernelSide {
    fn take_original(&self, netns: u64, source: SocketAddr) -> Option<Original> {
        let found = self.passages.take_original(netns, source)?;
        Some(Original {
            dialled: socket_address(&found.dialled)?,
            chosen: socket_address(&found.chosen),
            is_service: found.service != 0,
        })
    }

    fn show_client(&self, netns: u64, proxy_end: SocketAddr, client: SocketAddr) -> io::Result<()> {
        self.passages.show_client(netns, proxy_end, client)
    }

    fn forget_client(&self, netns: u64, proxy_end: SocketAddr) {
        if let Err(error) = self.passages.forget_client(netns, proxy_end) {
            warn!(%error, "a client that the proxy stood for could not be forgotten");
        }
    }

    fn caller(&self, source: SocketAddr, destination: SocketAddr) -> Option<u64> {
        self.passages.caller(source, destination)
    }

    fn guard(&self, netns: &File, cookie: u64) -> Result<()> {
        self.guard.guard(netns.as_fd(), cookie)
    }

    fn unguard(&self, cookie: u64) {
        if let Err(error) = self.guard.unguard(cookie) {
            warn!(%error, "the program of a network namespace could not be taken out of force");
        }
    }
}

/// Reads the revocation lists again when they change.
async fn look_for_revoked(revocations: Arc<Revocations>, mesh: Arc<Mesh>) {
    let mut due = interval(REVOKED);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let lists = Arc::clone(&revocations);
        // An error: the runtime ends.
        if let Ok(Some(outcome)) = tokio::task::spawn_blocking(move || lists.look()).await {
            match outcome {
                Ok(()) => info!("revocation lists read"),
                Err(reason) => {
                    error!(reason, "--crl cannot be used: every certificate of a peer is refused");
                }
            }
            // Connections of those who are on it end.
            mesh.bump();
        }
    }
}

/// Says several times a second that the proxy is alive, for as long as this task gets its turn.
async fn beat(heartbeat: Arc<Heartbeat>) {
    let mut due = interval(BEAT);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complained = false;
    loop {
        due.tick().await;
        match heartbeat.beat() {
            Ok(()) => complained = false,
            Err(error) if !complained => {
                warn!(%error, "the heartbeat cannot be written: what needs the proxy is refused, or goes direct");
                complained = true;
            }
            Err(_again) => {}
        }
    }
}

/// Reads what the kernel programs tell of denials. What there is no room for is counted by the programs. Looking often enough is simpler than being
/// woken, and the ring holds what comes in between.
async fn read_denials(mut ring: RingBuf<MapData>, told: mpsc::Sender<abi::Denial>) {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        while let Some(denial) = ring.next().map(|bytes| passages::denial(&bytes)) {
            match denial {
                // The agent may be about to end.
                Ok(denial) => drop(told.send(denial).await),
                Err(error) => warn!(%error, "what the kernel programs told cannot be read"),
            }
        }
    }
}

impl Owner {
    /// Takes in what was heard of the proxies.
    pub(super) fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Event(Event::Proxy { uid, proxy }) => self.proxy(&uid, Some(proxy)),
            Heard::Event(Event::Gone { uid }) => self.proxy(&uid, None),
            Heard::Refused(denial) => self.denials.tell(pods::refusal(denial), Instant::now()),
            Heard::Told(denial) => self.kernel_denied(&denial),
        }
    }

    /// Takes in a denial of the kernel programs.
    fn kernel_denied(&mut self, denial: &abi::Denial) {
        let side = match denial.side {
            abi::Denial::CLIENT => policy::Side::Client,
            _ => policy::Side::Server,
        };
        let policy = match denial.verdict {
            // No verdict, so none has been written yet.
            abi::Verdict { action: 0, .. } => NOT_ARRIVED.into(),
            abi::Verdict { policy: 0, .. } => {
                self.policies.asking(denial.policies).unwrap_or_else(|| NO_MATCH.into())
            }
            abi::Verdict { policy, .. } => {
                self.policies.name(policy).unwrap_or_else(|| format!("number {policy}").into())
            }
        };
        let refusal = Refusal {
            at: SystemTime::now(),
            side,
            source: self.end(denial.source_workload, socket_address(&denial.source)),
            destination: self.end(denial.destination_workload, socket_address(&denial.destination)),
            policy,
            rule: (denial.verdict.policy != 0).then_some(usize::from(denial.verdict.rule)),
            cause: None,
        };
        self.denials.tell(refusal, Instant::now());
    }

    fn end(&self, workload: u64, address: Option<SocketAddr>) -> Caller {
        let by_identity =
            || self.datapath.workload(workload).and_then(|uid| self.snapshot.workload(uid)).cloned();
        // Of workloads of other nodes only the address is known here.
        let by_address = || {
            let found = self.mesh.at(address?.ip())?;
            (abi::identity_of(&found.uid()).0 == workload).then_some(found)
        };
        match by_identity().or_else(by_address) {
            Some(found) => known(&found, address),
            None => Caller { address, ..Caller::default() },
        }
    }
}

fn known(workload: &Workload, address: Option<SocketAddr>) -> Caller {
    Caller {
        workload: Some(workload.uid()),
        identity: spiffe_of(workload).ok().map(|identity| identity.to_string()),
        address,
    }
}
