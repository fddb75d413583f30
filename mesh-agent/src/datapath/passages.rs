//! Connections that pass between the kernel programs and the node proxy, and the heartbeat that tells the programs that it is alive.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::{Array, HashMap, MapData, MapError, SockHash};
use mesh_common::abi::{
    Caller, CallerKey, ClientKey, Denial, Endpoint, ListenerKey, Node, Original, OriginalKey, map,
};

use super::desired::map_address;
use super::maps::{gone, open};
use super::pins::Pins;
use super::sys;

/// How far ahead a heartbeat says that the proxy is alive.
pub const ALIVE: Duration = Duration::from_millis(800);
/// How often it beats.
pub const BEAT: Duration = Duration::from_millis(200);

/// The maps `ORIGINALS`, `CALLERS`, `CLIENTS`, `LISTENERS` and `STEERED`, for the tasks of the proxy.
pub struct Passages {
    originals: Mutex<HashMap<MapData, OriginalKey, Original>>,
    callers: HashMap<MapData, CallerKey, Caller>,
    clients: Mutex<HashMap<MapData, ClientKey, Endpoint>>,
    listeners: Mutex<SockHash<MapData, ListenerKey>>,
    steered: Mutex<HashMap<MapData, CallerKey, u64>>,
}

impl Passages {
    /// Opens what is pinned. Clients of connections of an earlier agent are forgotten: those have ended with it.
    pub fn open(pins: &Pins) -> Result<Self> {
        let mut clients: HashMap<_, ClientKey, Endpoint> = open(pins, map::CLIENTS)?.try_into()?;
        let old: Vec<ClientKey> = clients.keys().collect::<Result<_, _>>().context("reading CLIENTS")?;
        for key in old {
            gone(clients.remove(&key)).context("clearing CLIENTS")?;
        }
        Ok(Self {
            originals: Mutex::new(open(pins, map::ORIGINALS)?.try_into()?),
            callers: open(pins, map::CALLERS)?.try_into()?,
            clients: Mutex::new(clients),
            listeners: Mutex::new(open(pins, map::LISTENERS)?.try_into()?),
            steered: Mutex::new(open(pins, map::STEERED)?.try_into()?),
        })
    }

    /// Where the application at `source` in the network namespace `netns` meant to connect; told once.
    pub fn take_original(&self, netns: u64, source: SocketAddr) -> Result<Option<Original>, MapError> {
        let key = OriginalKey { netns, source: endpoint(source), zero: 0 };
        let mut originals = self.originals.lock().unwrap_or_else(PoisonError::into_inner);
        take(&mut originals, &key)
    }

    /// Lets the application see `client` as the peer of a connection that the proxy makes from `source` in `netns`.
    pub fn show_client(&self, netns: u64, source: SocketAddr, client: SocketAddr) -> io::Result<()> {
        let key = ClientKey { netns, source: endpoint(source), zero: 0 };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.insert(key, endpoint(client), 0).map_err(io::Error::other)
    }

    /// The connection has ended.
    pub fn forget_client(&self, netns: u64, source: SocketAddr) -> io::Result<()> {
        let key = ClientKey { netns, source: endpoint(source), zero: 0 };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        gone(clients.remove(&key)).map_err(io::Error::other)
    }

    /// Which workload of this node made the connection from `source` to `destination`, by its identity; 0: the node itself; none: not known.
    pub fn caller(&self, source: SocketAddr, destination: SocketAddr) -> Option<u64> {
        self.callers.get(&caller_key(source, destination), 0).ok().map(|caller| caller.workload)
    }

    /// Who makes a connection that was led to the proxy, as the programs judged it: the identity of a workload of this node, or 0. Told once; none: it
    /// was not led there.
    pub fn take_steered(&self, source: SocketAddr, destination: SocketAddr) -> Result<Option<u64>, MapError> {
        let mut steered = self.steered.lock().unwrap_or_else(PoisonError::into_inner);
        take(&mut steered, &caller_key(source, destination))
    }

    /// Leads what comes without TLS to `address` of a workload, and needs the proxy, to this listener. The kernel forgets it when it is closed.
    pub fn steer(&self, workload: u64, address: IpAddr, listener: BorrowedFd<'_>) -> Result<(), MapError> {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let key = ListenerKey { workload, address: map_address(address) };
        listeners.insert(key, listener.as_raw_fd(), 0)
    }
}

/// Removes an entry; what it was.
fn take<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, key: &K) -> Result<Option<V>, MapError> {
    let value = match map.get(key, 0) {
        Ok(value) => value,
        Err(MapError::KeyNotFound) => return Ok(None),
        Err(error) => return Err(error),
    };
    gone(map.remove(key))?;
    Ok(Some(value))
}

fn caller_key(source: SocketAddr, destination: SocketAddr) -> CallerKey {
    CallerKey { source: endpoint(source), destination: endpoint(destination) }
}

/// The map `NODE`.
pub struct Heartbeat {
    map: Mutex<(Array<MapData, Node>, Node)>,
    stopped: AtomicBool,
}

impl Heartbeat {
    /// Opens what is pinned; the proxy is not alive yet. `netns` is the cookie of the node's own network namespace.
    pub fn open(pins: &Pins, netns: u64) -> Result<Self> {
        let mut map: Array<_, Node> = open(pins, map::NODE)?.try_into()?;
        // Whether policies are in force stays until this agent knows it better.
        let flags = map.get(&0, 0).map(|node| node.flags).unwrap_or_default();
        let node = Node { alive_until_nanoseconds: 0, netns, flags, zero: 0 };
        map.set(0, node, 0).context("writing NODE")?;
        Ok(Self { map: Mutex::new((map, node)), stopped: AtomicBool::new(false) })
    }

    /// Alive for [`ALIVE`] from now on, unless it has stopped.
    pub fn beat(&self) -> Result<(), MapError> {
        let until =
            sys::monotonic_nanoseconds().saturating_add(u64::try_from(ALIVE.as_nanos()).unwrap_or(u64::MAX));
        self.change(|node| {
            if !self.stopped.load(Relaxed) {
                node.alive_until_nanoseconds = until;
            }
        })
    }

    /// No longer alive, as of now, whoever still beats.
    pub fn stop(&self) -> Result<(), MapError> {
        // Under the lock that each beat takes.
        self.change(|node| {
            self.stopped.store(true, Relaxed);
            node.alive_until_nanoseconds = 0;
        })
    }

    /// Says whether policies apply to some workload of this node.
    pub fn guarded(&self, guarded: bool) -> Result<(), MapError> {
        self.change(|node| {
            node.flags = if guarded { node.flags | Node::GUARDED } else { node.flags & !Node::GUARDED };
        })
    }

    fn change(&self, change: impl FnOnce(&mut Node)) -> Result<(), MapError> {
        let mut held = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, node) = &mut *held;
        let before = *node;
        change(node);
        if *node == before { Ok(()) } else { map.set(0, *node, 0) }
    }
}

/// An entry of the map `DENIALS`; an error: it is of another length, so another version wrote it.
pub fn denial(bytes: &[u8]) -> io::Result<Denial> {
    const SIZE: usize = size_of::<Denial>();
    let short = || io::Error::new(io::ErrorKind::InvalidData, format!("a denial of {} bytes", bytes.len()));
    let bytes: &[u8; SIZE] = bytes.try_into().map_err(|_length| short())?;
    Ok(Denial::from_bytes(bytes))
}

/// As the maps hold it.
pub fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::new(map_address(address.ip()), address.port())
}

/// As the rest of the world has it; none: not set.
pub fn socket_address(endpoint: &Endpoint) -> Option<SocketAddr> {
    let address = IpAddr::V6(Ipv6Addr::from(endpoint.address().bytes())).to_canonical();
    endpoint.is_some().then(|| SocketAddr::new(address, endpoint.port()))
}
