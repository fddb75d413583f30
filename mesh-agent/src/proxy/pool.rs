//! Tunnels that wait for the next stream, in proportion to use.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::hbone::{Connection, Slot};
use super::host::Endpoint;
use super::tls::{Protocol, Tls};
use super::{threads, tunnel};
use crate::identity::SpiffeId;

/// How often what was used recently is forgotten by half.
pub const SWEEP: Duration = Duration::from_secs(10);

/// Who is at the other end, and where. The own identity is the pod's, which has a pool of its own.
type Key = (SpiffeId, SocketAddr);

#[derive(Default)]
struct Peer {
    /// The longest idle first.
    idle: Vec<Idle>,
    http2: Vec<Connection>,
    /// What it spoke last.
    speaks: Option<Protocol>,
    /// Of who makes a tunnel that others may share.
    making: Option<watch::Receiver<bool>>,
    /// Tunnels with a stream now, and the most of the recent past.
    used: usize,
    peak: usize,
}

struct Idle {
    tls: Box<Tls>,
    since: Instant,
    /// The thread whose event loop it belongs to.
    thread: usize,
}

impl Peer {
    /// The last used, since the others then grow old, and go; one of this thread if there is any.
    fn take(&mut self, thread: usize) -> Option<Idle> {
        let own = self.idle.iter().rposition(|idle| idle.thread == thread);
        own.map(|at| self.idle.remove(at)).or_else(|| self.idle.pop())
    }
}

/// The tunnels of a pod.
pub struct Pool {
    peers: Mutex<HashMap<Key, Peer>>,
    most_idle: usize,
    idle_timeout: Duration,
}

/// Who makes a tunnel, when several connections find none.
pub(super) enum Turn {
    /// The asking one; others wait for it until this is dropped, or do not wait.
    Own(Option<Making>),
    /// Another one does: true, once there is room on it.
    After(watch::Receiver<bool>),
}

/// Somebody makes a tunnel for others as well. Dropped, they need not wait any more.
pub(super) struct Making(watch::Sender<bool>);

impl Making {
    /// It can be shared.
    pub(super) fn done(self) {
        self.0.send_replace(true);
    }
}

/// A stream's share in a tunnel of HTTP/2.
pub(super) type Shared = (Connection, Slot);

impl Pool {
    /// At most so many idle tunnels, each for so long.
    pub fn new(most_idle: usize, idle_timeout: Duration) -> Self {
        Self { peers: Mutex::default(), most_idle, idle_timeout }
    }

    /// A tunnel of our own protocol that can be used at once.
    pub(super) fn take(&self, endpoint: &Endpoint) -> Option<Box<Tls>> {
        loop {
            let idle = self.with(endpoint, |peer| peer.take(threads::own()))?;
            // One that cannot be moved is dropped like one that has ended.
            let Ok(tls) = here(idle) else { continue };
            if tls.may_begin() && tunnel::is_fresh(&tls) {
                return Some(tls);
            }
        }
    }

    /// Room on a tunnel of HTTP/2.
    pub(super) fn share(&self, endpoint: &Endpoint) -> Option<Shared> {
        self.with(endpoint, |peer| {
            peer.http2.retain(Connection::is_alive);
            peer.http2.iter().find_map(|connection| Some((connection.clone(), connection.reserve()?)))
        })
    }

    /// Whose turn it is to make a tunnel. Nobody waits for one of our own protocol, which carries one stream at a time; what a peer speaks
    /// shows with the first.
    pub(super) fn turn(&self, endpoint: &Endpoint) -> Turn {
        self.with(endpoint, |peer| {
            if peer.speaks == Some(Protocol::Stream) {
                return Turn::Own(None);
            }
            if let Some(making) = peer.making.as_ref().filter(|making| making.has_changed().is_ok()) {
                return Turn::After(making.clone());
            }
            let (made, making) = watch::channel(false);
            peer.making = Some(making);
            Turn::Own(Some(Making(made)))
        })
    }

    /// What a peer speaks, as the last handshake has shown.
    pub(super) fn speaks(&self, endpoint: &Endpoint, protocol: Protocol) {
        self.with(endpoint, |peer| peer.speaks = Some(protocol));
    }

    /// A tunnel of HTTP/2 for others to share.
    pub(super) fn offer(&self, endpoint: &Endpoint, connection: Connection) {
        self.with(endpoint, |peer| peer.http2.push(connection));
    }

    /// A stream begins; the guard is its end.
    pub(super) fn using<'a>(&'a self, endpoint: &'a Endpoint) -> Using<'a> {
        self.with(endpoint, |peer| {
            peer.used += 1;
            peer.peak = peer.peak.max(peer.used);
        });
        Using { pool: self, endpoint }
    }

    /// A tunnel after the clean end of its stream. Kept if as many have been in use at once; false: it would have been, but for the
    /// limit.
    pub(super) fn put(&self, endpoint: &Endpoint, tls: Box<Tls>, now: Instant) -> bool {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let idle: usize = peers.values().map(|peer| peer.idle.len()).sum();
        let peer = peers.entry(key(endpoint)).or_default();
        let wanted = peer.idle.len() < peer.peak.max(1) && tls.may_begin();
        if wanted && idle < self.most_idle {
            peer.idle.push(Idle { tls, since: now, thread: threads::own() });
            return true;
        }
        !wanted
    }

    /// Closes what has been idle for long, or more than is used. To be called every [`SWEEP`].
    pub fn sweep(&self, now: Instant) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|_key, peer| {
            peer.peak = peer.used.max(peer.peak / 2);
            let surplus = peer.idle.len().saturating_sub(peer.peak.max(1));
            peer.idle.drain(..surplus);
            peer.idle.retain(|idle| {
                now.saturating_duration_since(idle.since) < self.idle_timeout && idle.tls.may_begin()
            });
            // Of those without streams only so many stay as what was used recently would need.
            let mut needed = peer.peak;
            peer.http2.retain(|connection| {
                let stays = connection.is_alive() && (connection.streams() > 0 || needed > 0);
                if stays {
                    needed = needed.saturating_sub(connection.most());
                }
                stays
            });
            peer.used > 0 || !peer.idle.is_empty() || !peer.http2.is_empty()
        });
    }

    /// Tunnels without a stream.
    pub fn idle(&self) -> usize {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = |peer: &Peer| peer.http2.iter().filter(|connection| connection.streams() == 0).count();
        peers.values().map(|peer| peer.idle.len() + shared(peer)).sum()
    }

    fn with<T>(&self, endpoint: &Endpoint, act: impl FnOnce(&mut Peer) -> T) -> T {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        act(peers.entry(key(endpoint)).or_default())
    }
}

/// Makes a tunnel the calling thread's.
fn here(idle: Idle) -> io::Result<Box<Tls>> {
    if idle.thread == threads::own() {
        return Ok(idle.tls);
    }
    let tls = *idle.tls;
    let tcp = TcpStream::from_std(tls.tcp.into_std()?)?;
    Ok(Box::new(Tls { tcp, ..tls }))
}

fn key(endpoint: &Endpoint) -> Key {
    (endpoint.identity.clone(), endpoint.tunnel)
}

/// A stream in use.
pub(super) struct Using<'a> {
    pool: &'a Pool,
    endpoint: &'a Endpoint,
}

impl Drop for Using<'_> {
    fn drop(&mut self) {
        self.pool.with(self.endpoint, |peer| peer.used = peer.used.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests;
