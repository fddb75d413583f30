//! Joins the node proxy with kernel and policy: what passes between them, the heartbeat, and who was refused.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use aya::maps::{MapData, RingBuf};
use mesh_common::abi;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use super::owner::Owner;
use crate::datapath::guard::Guard;
use crate::datapath::passages::{self, BEAT, Heartbeat, Passages, socket_address};
use crate::identity::{SpiffeId, spiffe_of};
use crate::pods::host::{Denial, Judge, Judged, Kernel, Original, Side};
use crate::pods::mesh::Reach;
use crate::policy::{self, Caller, NO_MATCH, NOT_ARRIVED, Refusal};
use crate::snapshot::Workload;

/// What the proxies ask of the kernel side.
pub(super) struct KernelSide {
    pub(super) passages: Arc<Passages>,
    pub(super) guard: Guard,
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

    fn guard(&self, netns: &File, cookie: u64) -> Result<()> {
        self.guard.guard(netns.as_fd(), cookie)
    }

    fn unguard(&self, cookie: u64) {
        if let Err(error) = self.guard.unguard(cookie) {
            warn!(%error, "the program of a network namespace could not be taken out of force");
        }
    }
}

/// Policy, as the proxies ask for it.
pub(super) struct Verdicts(pub(super) Arc<policy::Shared>);

impl Judge for Verdicts {
    fn judge(
        &self,
        destination: &Workload,
        source: Option<&SpiffeId>,
        source_ip: IpAddr,
        destination_ip: IpAddr,
        port: u16,
    ) -> Judged {
        let judgement = self.0.judge(destination, source, source_ip, destination_ip, port);
        Judged {
            allowed: judgement.allowed,
            policy: judgement.policy.map(|policy| policy.to_string()),
            rule: judgement.rule,
        }
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed()
    }
}

/// Says several times a second that the proxy is alive, for as long as this task gets its turn.
pub(super) async fn beat(heartbeat: Arc<Heartbeat>) {
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

/// Reads what the kernel programs tell of denials. Those that wait longest come first; what there is no room for is counted by the programs.
pub(super) async fn read_denials(ring: RingBuf<MapData>, told: mpsc::Sender<abi::Denial>) -> Result<()> {
    let mut ring = AsyncFd::new(ring).context("waiting for denials")?;
    loop {
        let mut ready = ring.readable_mut().await.context("waiting for denials")?;
        loop {
            let denial = match ready.get_inner_mut().next() {
                Some(bytes) => passages::denial(&bytes),
                None => break,
            };
            match denial {
                Ok(denial) => {
                    if told.send(denial).await.is_err() {
                        return Ok(());
                    }
                }
                Err(error) => warn!(%error, "what the kernel programs told cannot be read"),
            }
        }
        ready.clear_ready();
    }
}

impl Owner {
    /// Takes in a denial of the proxies.
    pub(super) fn proxy_denied(&mut self, denial: Denial) {
        let refusal = Refusal {
            at: SystemTime::now(),
            side: match denial.side {
                Side::Outbound => policy::Side::Client,
                Side::Inbound => policy::Side::Proxy,
            },
            source: Caller {
                workload: None,
                identity: denial.source.map(|source| source.to_string()),
                address: Some(SocketAddr::new(denial.source_ip, 0)),
            },
            destination: known(&denial.destination, Some(denial.address)),
            policy: denial.judged.policy.map_or_else(|| NO_MATCH.into(), Arc::from),
            rule: denial.judged.rule,
            cause: None,
        };
        self.denials.tell(refusal, std::time::Instant::now());
    }

    /// Takes in a denial of the kernel programs.
    pub(super) fn kernel_denied(&mut self, denial: &abi::Denial) {
        let side = match denial.side {
            abi::Denial::CLIENT => policy::Side::Client,
            _ => policy::Side::Server,
        };
        let policy = match denial.verdict {
            // No verdict, so none has been written yet.
            abi::Verdict { action: 0, .. } => NOT_ARRIVED.into(),
            abi::Verdict { policy: 0, .. } => NO_MATCH.into(),
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
        self.denials.tell(refusal, std::time::Instant::now());
    }

    fn end(&self, workload: u64, address: Option<SocketAddr>) -> Caller {
        let by_identity = || self.datapath.workload(workload).and_then(|uid| self.snapshot.workload(uid)).cloned();
        // Of workloads of other nodes only the address is known here.
        let by_address = || match self.mesh.reach(address?) {
            Reach::Plain(found) | Reach::Meshed(found, _) => {
                (abi::identity_of(&found.uid()).0 == workload).then_some(found)
            }
            Reach::Unknown => None,
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
