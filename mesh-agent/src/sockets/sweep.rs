//! Looks through a pod and destroys what may no longer be.

use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::diag::{Diag, DiagError};
use super::revoke::{Ground, Judge, revoke};
use crate::proxy::netns::Namespace;

/// What sweeping has done since the agent started.
#[derive(Debug, Default)]
pub struct Counts {
    /// Destroyed because policy does not permit them.
    pub policy: AtomicU64,
    /// Destroyed because their endpoint has gone.
    pub gone: AtomicU64,
    /// Connections, or sweeps, that the kernel cannot do: it lacks the option.
    pub unsupported: AtomicU64,
    /// Connections, or sweeps, that failed for another reason.
    pub failed: AtomicU64,
    told: AtomicBool,
}

/// What one sweep has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Sockets looked at.
    pub seen: usize,
    /// Destroyed.
    pub destroyed: usize,
    /// Still there, though they should not be: to be tried again.
    pub left: usize,
}

/// Sweeps pods.
#[derive(Debug, Clone, Default)]
pub struct Sweeper {
    counts: Arc<Counts>,
}

impl Sweeper {
    /// What it has done.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Sweeps one pod, which has these addresses. What goes wrong is counted and told.
    pub async fn sweep(
        &self,
        namespace: &Namespace,
        pod: Vec<IpAddr>,
        judge: impl Judge + Send + 'static,
    ) -> Result<Swept, DiagError> {
        let swept = self.look_through(namespace, pod, judge).await;
        if let Err(error) = &swept {
            self.counts.count(error);
        }
        swept
    }

    async fn look_through(
        &self,
        namespace: &Namespace,
        pod: Vec<IpAddr>,
        judge: impl Judge + Send + 'static,
    ) -> Result<Swept, DiagError> {
        let diag = Diag::of(namespace).await?;
        let ephemeral = namespace.run(ephemeral_ports).await?;
        let counts = Arc::clone(&self.counts);
        let work = move || sweep(diag, &counts, &pod, &ephemeral, &judge);
        let ended = |error| DiagError::Io(io::Error::other(error));
        tokio::task::spawn_blocking(work).await.map_err(ended)?
    }
}

/// The ports that this network namespace gives to connections that go out. Pods may have a range of their own.
fn ephemeral_ports() -> io::Result<RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ends = text.split_whitespace().map_while(|end| end.parse().ok());
    let malformed = || io::Error::other(format!("ip_local_port_range is {text:?}"));
    Ok(ends.next().ok_or_else(malformed)?..=ends.next().ok_or_else(malformed)?)
}

fn sweep(
    mut diag: Diag,
    counts: &Counts,
    pod: &[IpAddr],
    ephemeral: &RangeInclusive<u16>,
    judge: &impl Judge,
) -> Result<Swept, DiagError> {
    let sockets = diag.list()?;
    let mut swept = Swept { seen: sockets.len(), ..Swept::default() };
    for (socket, ground) in revoke(&sockets, pod, ephemeral, judge) {
        let (local, remote) = (socket.local, socket.remote);
        match diag.destroy(socket) {
            Ok(true) => {
                counts.destroyed(ground);
                swept.destroyed += 1;
                tracing::info!(%local, %remote, ?ground, "connection destroyed");
            }
            Ok(false) => {}
            Err(error) => {
                counts.count(&error);
                swept.left += usize::from(!matches!(error, DiagError::Unsupported));
                tracing::debug!(%error, %local, %remote, "a connection could not be destroyed");
            }
        }
    }
    Ok(swept)
}

impl Counts {
    fn destroyed(&self, ground: Ground) {
        let count = match ground {
            Ground::Policy(_) => &self.policy,
            Ground::Gone => &self.gone,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts what went wrong. A kernel that cannot never will, so that is said once.
    pub(super) fn count(&self, error: &DiagError) {
        match error {
            DiagError::Unsupported => {
                self.unsupported.fetch_add(1, Ordering::Relaxed);
                if !self.told.swap(true, Ordering::Relaxed) {
                    tracing::error!(%error, "connections that are no longer permitted go on until they end by themselves");
                }
            }
            DiagError::Io(_) | DiagError::Malformed(_) | DiagError::Endless | DiagError::Refused(_) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "connections that are no longer permitted could not be ended");
            }
        }
    }
}
