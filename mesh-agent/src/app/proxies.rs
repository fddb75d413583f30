//! Joins the node proxy with kernel and policy: what passes between them, the heartbeat, and who was refused.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_common::abi;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::denials::{self, Untold};
use super::owner::Owner;
use super::pods;
use crate::config::Config;
use crate::datapath::guard::Guard;
use crate::datapath::passages::{BEAT, Heartbeat, Passages, socket_address};
use crate::identity::Certificates;
use crate::pods::figures::Figures;
use crate::pods::host::{Denial, Event, Judge, Kernel, Original};
use crate::pods::mesh::Mesh;
use crate::pods::{Parts, Pods};
use crate::proxy::threads::Threads;
use crate::proxy::tls::Revocations;
use crate::sockets::Sweeper;

/// How often revocation lists are looked at.
const REVOKED: Duration = Duration::from_secs(5);
/// A thread of the proxy that has not had its turn for so long counts as dead: it may only be busy.
const PATIENCE: Duration = Duration::from_secs(3);
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
    untold: Untold,
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
        let untold = Untold::default();
        let missed = Arc::clone(&untold);
        let threads = Threads::start(config.proxy.threads, config.proxy.busy_poll)
            .context("starting the threads of the node proxy")?;
        let pods = Pods::new(Parts {
            cgroups: config.datapath.cgroup_root.clone(),
            kernel: Arc::new(kernel),
            judge: Arc::clone(owner.policies.shared()) as Arc<dyn Judge>,
            mesh: Arc::clone(&owner.mesh),
            certificates,
            protocols: config.proxy.protocols.clone(),
            revocations: Arc::clone(&revocations),
            congestion: config.proxy.tunnel_congestion.clone(),
            limits: config.proxy.limits,
            denied: Arc::new(move |denial| {
                let rehearsed = denial.judged.allowed;
                let missed = if rehearsed { &missed.rehearsed } else { &missed.refused };
                // Half of the room is for those that were refused.
                let room = !rehearsed || refused_sender.capacity() > WAITING / 2;
                // The owner has no time for it: the proxies count it as refused all the same.
                if !room || refused_sender.try_send(denial).is_err() {
                    missed.fetch_add(1, Relaxed);
                }
            }),
            threads: threads.clone(),
            events: events_sender,
        })
        .context("starting the node proxy")?;
        let ring = owner.datapath.denials()?;
        tasks.spawn(look_for_revoked(revocations, Arc::clone(&owner.mesh)));
        tasks.spawn(beat(Arc::clone(&heartbeat), threads).context("starting the heartbeat")?);
        tasks.spawn(denials::read(ring, told_sender, Arc::clone(&untold)));
        Ok(Self { pods, heartbeat, guard, events, refused, told, untold })
    }

    /// What they have done, and use.
    pub(super) fn figures(&self) -> Arc<Figures> {
        self.pods.figures()
    }

    /// Denials that nobody has been told of.
    pub(super) fn untold(&self) -> Untold {
        Arc::clone(&self.untold)
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

    /// Removes what is left of network namespaces that have gone, and takes the program out of those that no workload is in any more;
    /// who that is shows only when all of the mesh is known (`complete`).
    pub(super) fn sweep(&self, complete: bool) {
        if let Err(error) = self.guard.sweep() {
            warn!(%error, "what is left of network namespaces that have gone cannot be removed");
        }
        if !complete {
            return;
        }
        match self.pods.with_namespaces(|used| self.guard.retain(|cookie| used.contains(&cookie))) {
            None | Some(Ok(0)) => {}
            Some(Ok(count)) => info!(count, "network namespaces without a workload are guarded no more"),
            Some(Err(error)) => warn!(%error, "network namespaces without a workload cannot be released"),
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

/// What the proxies ask of the kernel side.
struct KernelSide {
    passages: Arc<Passages>,
    guard: Arc<Guard>,
}

impl Kernel for KernelSide {
    fn take_original(&self, netns: u64, source: SocketAddr) -> Option<Original> {
        let found = match self.passages.take_original(netns, source) {
            Ok(found) => found?,
            Err(error) => {
                warn!(%error, "where a connection was meant to go could not be read");
                return None;
            }
        };
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

    fn take_steered(&self, source: SocketAddr, destination: SocketAddr) -> Option<u64> {
        self.passages.take_steered(source, destination).unwrap_or_else(|error| {
            warn!(%error, "who makes a connection could not be read");
            None
        })
    }

    fn steer(&self, workload: u64, address: IpAddr, listener: BorrowedFd<'_>) -> io::Result<()> {
        self.passages.steer(workload, address, listener).map_err(io::Error::other)
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

/// Says several times a second that the proxy is alive, from a thread of its own: what keeps other threads busy is not to look like the
/// proxy's end. The future ends when a thread of the proxy has.
fn beat(heartbeat: Arc<Heartbeat>, threads: Threads) -> io::Result<impl Future<Output = ()> + Send> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let (beats, ended) = oneshot::channel::<()>();
    std::thread::Builder::new().name("heartbeat".to_owned()).spawn(move || {
        runtime.block_on(beating(&heartbeat, &threads));
        drop(beats);
    })?;
    Ok(async {
        // Nothing is ever sent.
        drop(ended.await);
        error!("a thread of the node proxy has ended");
    })
}

async fn beating(heartbeat: &Heartbeat, threads: &Threads) {
    let mut due = interval(BEAT);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complained = false;
    let mut answer = Box::pin(threads.answer());
    let mut answered = Instant::now();
    loop {
        tokio::select! {
            alive = &mut answer => {
                if !alive {
                    return;
                }
                answered = Instant::now();
                due.tick().await;
                answer = Box::pin(threads.answer());
            }
            _ = due.tick() => {}
        }
        if answered.elapsed() > PATIENCE {
            continue;
        }
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

impl Owner {
    /// Takes in what was heard of the proxies.
    pub(super) fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Event(Event::Proxy { uid, proxy }) => self.proxy(&uid, Some(proxy)),
            Heard::Event(Event::Gone { uid }) => self.proxy(&uid, None),
            Heard::Refused(denial) => self.denials.tell(denials::refusal(denial), Instant::now()),
            Heard::Told(denial) => self.kernel_denied(&denial),
        }
    }
}
