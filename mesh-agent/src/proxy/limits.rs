//! How much a pod may have of its node, each limit counted.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::hbone::Unread;
use super::relay::Budget;
use super::sources::{Entered, Sources};

/// A handshake waits for its turn for as long as so many slow ones take, one after the other.
const QUEUE: u32 = 6;

/// Limits of one side of one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// Handshakes at a time: they cost processor time before anybody is known.
    pub handshakes: usize,
    /// A peer has so long for its handshake.
    pub handshake_timeout: Duration,
    /// A connection to an application, or to another node, takes at most so long.
    pub connect_timeout: Duration,
    /// A tunnel without stream is kept for so long.
    pub idle_timeout: Duration,
    /// Bytes in large buffers.
    pub buffers: usize,
    /// Tunnels without stream that are kept.
    pub idle_tunnels: usize,
    /// Streams at a time on one HTTP/2 tunnel.
    pub streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            handshakes: 128,
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            idle_tunnels: 512,
            buffers: 64 << 20,
            streams: 100,
        }
    }
}

/// What has reached its limit, and what went wrong; for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Connections that were accepted.
    pub accepted: AtomicU64,
    /// Connections reset because there were too many.
    pub over_connections: AtomicU64,
    /// Handshakes that had to wait because there were too many.
    pub over_handshakes: AtomicU64,
    /// Handshakes that waited in vain, or whose client had too many already: reset.
    pub refused_handshakes: AtomicU64,
    /// Times that no connection could be accepted: mostly for want of file descriptors.
    pub unaccepted: AtomicU64,
    /// Handshakes that took too long.
    pub slow_handshakes: AtomicU64,
    /// Handshakes that failed.
    pub failed_handshakes: AtomicU64,
    /// Tunnels that a stream was put on without a handshake.
    pub reused: AtomicU64,
    /// Tunnels made.
    pub handshakes: AtomicU64,
    /// Streams that went to another endpoint than the first.
    pub retried: AtomicU64,
    /// Requests and tunnels that could not be understood.
    pub malformed: AtomicU64,
    /// Connections reset because their pod had gone, or the agent stopped.
    pub stopped: AtomicU64,
    /// Connections reset because they could not be handed to the thread that was to carry them.
    pub stranded: AtomicU64,
    /// Times that a connection had to do with a small buffer, because others had all of the memory.
    pub over_buffers: Arc<AtomicU64>,
    /// Times that applications left so much unread of what came by HTTP/2 that its windows were made small.
    pub over_unread: Arc<AtomicU64>,
    /// Tunnels closed after use, because too many were idle.
    pub over_idle: AtomicU64,
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Room for one handshake, until it is dropped.
pub(super) struct Room {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
    _entered: Entered,
}

/// The limits of one side of one pod, with what is used of them.
#[derive(Debug)]
pub struct Allowance {
    /// The limits.
    pub limits: Limits,
    /// What has happened, here or together with others.
    pub counts: Arc<Counts>,
    /// Buffers.
    pub budget: Arc<Budget>,
    /// What has come by HTTP/2 and is not read.
    pub unread: Arc<Unread>,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    sources: Arc<Sources>,
}

impl Allowance {
    /// Nothing used.
    pub fn new(limits: Limits) -> Arc<Self> {
        Self::counting(limits, Arc::default())
    }

    /// Nothing used, and what happens is added to `counts`.
    pub fn counting(limits: Limits, counts: Arc<Counts>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            budget: Budget::counting(limits.buffers, Arc::clone(&counts.over_buffers)),
            unread: Unread::new(limits.buffers.max(Unread::LEAST), Arc::clone(&counts.over_unread)),
            counts,
            connections: Arc::new(Semaphore::new(limits.connections)),
            handshakes: Arc::new(Semaphore::new(limits.handshakes)),
            sources: Arc::new(Sources::new(limits.handshakes, limits.connections)),
        })
    }

    /// Room for a connection.
    pub(super) fn connection(&self) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.connections).try_acquire_owned().ok();
        count(if permit.is_some() { &self.counts.accepted } else { &self.counts.over_connections });
        permit
    }

    /// Room for a handshake. Many at once wait for each other, for longer than one may take: a reset would only make them come again.
    pub(super) async fn handshake(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.handshakes).try_acquire_owned() {
            return Some(permit);
        }
        count(&self.counts.over_handshakes);
        let room = Arc::clone(&self.handshakes).acquire_owned();
        tokio::time::timeout(self.limits.handshake_timeout * QUEUE, room).await.ok()?.ok()
    }

    /// Room for a handshake with somebody at `address`, of whom nothing else is known yet.
    pub(super) async fn handshake_with(&self, address: IpAddr) -> Option<Room> {
        let waits = || count(&self.counts.over_handshakes);
        let Some(entered) = self.sources.enter(address) else {
            waits();
            return None;
        };
        // First its own turn: in the queue for all it would be in the way of others.
        let own = entered.turn(self.limits.handshake_timeout, waits).await?;
        Some(Room { _all: self.handshake().await?, _own: own, _entered: entered })
    }

    /// Connections now.
    pub fn connected(&self) -> usize {
        self.limits.connections - self.connections.available_permits()
    }
}
