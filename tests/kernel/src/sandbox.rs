//! A network namespace, a cgroup, and the mesh's programs attached to it, with maps that a test fills by hand.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{
    Array, HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, RingBuf, SkStorage, SockHash,
};
use aya::programs::SkLookup;
use aya::programs::links::FdLink;
use mesh_agent::datapath::object::INBOUND;
use mesh_agent::datapath::passages::denial;
use mesh_common::abi::{
    Address, Algorithm, Backend, Caller, CallerKey, ClientKey, CounterKey, Counters, Denial, Endpoint, Entry,
    ListenerKey, Load, Node, Original, OriginalKey, Page, Peer, PlainKey, Pointer, Protocol, Proxy, Reason,
    ServiceKey, Socket, Verdict, VerdictKey, WorkloadIdentity, map,
};

use crate::cgroup::Cgroup;
use crate::{namespace, programs};

/// What a test runs in. Dropping it removes the cgroup, and with it what is attached there.
pub struct Sandbox<'a> {
    ebpf: &'a mut Ebpf,
    cgroup: Cgroup,
    // Dropped before the cgroup is, whose removal does not end them.
    _links: Vec<FdLink>,
    generation: u32,
}

impl<'a> Sandbox<'a> {
    /// Takes the current thread into a new network namespace and the whole process into a new cgroup.
    ///
    /// The programs are loaded once for all tests, since that is what costs time; their maps are emptied.
    pub fn enter(name: &str, ebpf: &'a mut Ebpf) -> Result<Self> {
        namespace::enter_new()?;
        programs::clear(ebpf)?;
        let cgroup = Cgroup::enter(name)?;
        let links = programs::attach(ebpf, cgroup.path())?;
        Ok(Self { ebpf, cgroup, _links: links, generation: 0 })
    }

    /// The sandbox's cgroup becomes this workload. Sockets made before stay what they were.
    pub fn become_workload(&mut self, identity: u64) -> Result<()> {
        let cgroup = self.cgroup.path().to_path_buf();
        self.enroll(&cgroup, identity)
    }

    /// The sandbox's cgroup is nobody's again.
    pub fn leave_workload(&mut self) -> Result<()> {
        let mut workloads: HashMap<_, u64, WorkloadIdentity> =
            HashMap::try_from(self.map_mut(map::WORKLOADS)?)?;
        let all: Vec<u64> = workloads.keys().collect::<Result<_, _>>()?;
        Ok(all.iter().try_for_each(|cgroup| workloads.remove(cgroup))?)
    }

    /// A cgroup in the sandbox's becomes this workload, and the process moves there.
    pub fn enter_nested_workload(&mut self, identity: u64) -> Result<()> {
        let nested = self.cgroup.enter_nested()?;
        self.enroll(&nested, identity)
    }

    fn enroll(&mut self, cgroup: &Path, identity: u64) -> Result<()> {
        // The kernel calls the cgroup by its inode.
        let id =
            std::fs::metadata(cgroup).with_context(|| format!("cannot read {}", cgroup.display()))?.ino();
        let mut workloads: HashMap<_, u64, WorkloadIdentity> =
            HashMap::try_from(self.map_mut(map::WORKLOADS)?)?;
        Ok(workloads.insert(id, WorkloadIdentity(identity), 0)?)
    }

    /// Publishes service `number` (from 1) with backends of equal weight; again for a new list of them.
    pub fn service(
        &mut self,
        number: u32,
        key: ServiceKey,
        algorithm: Algorithm,
        backends: &[SocketAddr],
    ) -> Result<()> {
        let weighted: Vec<(SocketAddr, u32)> = backends.iter().map(|backend| (*backend, 1)).collect();
        self.weighted_service(number, key, algorithm, &weighted)
    }

    /// As [`Sandbox::service`], with weights.
    pub fn weighted_service(
        &mut self,
        number: u32,
        key: ServiceKey,
        algorithm: Algorithm,
        backends: &[(SocketAddr, u32)],
    ) -> Result<()> {
        let mut page = self.root(number, key, algorithm, backends.len())?;
        for (index, (backend, weight)) in backends.iter().enumerate() {
            let child = self.backend(number, index, *backend)?;
            page.header.total += weight;
            page.entries[index] = Entry { child, upto: page.header.total };
        }
        self.publish(number, page)
    }

    /// Publishes a service of two levels, one leaf of at most 56 backends after the other.
    pub fn deep_service(&mut self, number: u32, key: ServiceKey, backends: &[SocketAddr]) -> Result<()> {
        let leaves: Vec<&[SocketAddr]> = backends.chunks(mesh_common::abi::ENTRIES).collect();
        let mut root = self.root(number, key, Algorithm::RoundRobin, leaves.len())?;
        root.header.depth = 2;
        let mut index = 0;
        for (place, leaf) in leaves.iter().enumerate() {
            let mut page = Page::default();
            page.header.depth = 1;
            for (entry, backend) in leaf.iter().enumerate() {
                let upto = u32::try_from(entry + 1)?;
                page.entries[entry] = Entry { child: self.backend(number, index, *backend)?, upto };
                index += 1;
            }
            root.header.total += u32::try_from(leaf.len())?;
            let child = page_of(number, 2) + u32::try_from(place)?;
            root.entries[place] = Entry { child, upto: root.header.total };
            self.pages()?.set(child, page, 0)?;
        }
        self.publish(number, root)
    }

    fn root(&mut self, number: u32, key: ServiceKey, algorithm: Algorithm, used: usize) -> Result<Page> {
        self.generation += 1;
        let mut page = Page::default();
        page.header.key = key;
        page.header.service = number;
        page.header.generation = self.generation;
        page.header.stride = 1;
        page.header.algorithm = algorithm as u8;
        page.header.depth = 1;
        page.header.used = u8::try_from(used)?;
        Ok(page)
    }

    /// Writes a root page and then the pointer to it, alternating between two pages as an update does.
    pub fn publish(&mut self, number: u32, page: Page) -> Result<()> {
        let place = page_of(number, page.header.generation % 2);
        self.pages()?.set(place, page, 0)?;
        let pointer = Pointer::new(place, page.header.generation);
        let mut services: HashMap<_, ServiceKey, Pointer> = HashMap::try_from(self.map_mut(map::SERVICES)?)?;
        Ok(services.insert(page.header.key, pointer, 0)?)
    }

    /// Publishes the service again with its header changed.
    pub fn change(&mut self, number: u32, change: impl FnOnce(&mut Page)) -> Result<()> {
        let place = page_of(number, self.generation % 2);
        let mut page = self.pages()?.get(&place, 0)?;
        if page.header.service != number {
            bail!("service {number} was not the last to be published");
        }
        self.generation += 1;
        page.header.generation = self.generation;
        change(&mut page);
        self.publish(number, page)
    }

    /// Writes over a page in place, as no agent does.
    pub fn overwrite(&mut self, number: u32, change: impl FnOnce(&mut Page)) -> Result<()> {
        let place = page_of(number, self.generation % 2);
        let mut page = self.pages()?.get(&place, 0)?;
        change(&mut page);
        Ok(self.pages()?.set(place, page, 0)?)
    }

    fn pages(&mut self) -> Result<Array<&mut MapData, Page>> {
        Ok(Array::try_from(self.map_mut(map::PAGES)?)?)
    }

    /// Fills a backend's slot and returns its number.
    fn backend(&mut self, service: u32, index: usize, address: SocketAddr) -> Result<u32> {
        let number = backend_number(service, index)?;
        let backend = Backend { endpoint: endpoint(address), service, incarnation: 1, reserved: 0 };
        let mut backends: Array<_, Backend> = Array::try_from(self.map_mut(map::BACKENDS)?)?;
        backends.set(number, backend, 0)?;
        Ok(number)
    }

    /// Frees a backend's slot, as the agent does when nothing refers to it any more: the incarnation stays.
    pub fn free_backend(&mut self, service: u32, index: usize) -> Result<()> {
        self.change_backend(service, index, |slot| {
            *slot = Backend { incarnation: slot.incarnation, ..Backend::default() }
        })
    }

    /// Writes a backend's slot anew.
    pub fn change_backend(
        &mut self,
        service: u32,
        index: usize,
        change: impl FnOnce(&mut Backend),
    ) -> Result<()> {
        let mut backends: Array<_, Backend> = Array::try_from(self.map_mut(map::BACKENDS)?)?;
        let number = backend_number(service, index)?;
        let mut slot = backends.get(&number, 0)?;
        change(&mut slot);
        Ok(backends.set(number, slot, 0)?)
    }

    /// An address is this workload's.
    pub fn peer(&mut self, address: IpAddr, peer: Peer) -> Result<()> {
        let mut peers: HashMap<_, Address, Peer> = HashMap::try_from(self.map_mut(map::PEERS)?)?;
        Ok(peers.insert(mapped(address), peer, 0)?)
    }

    /// What the node proxy has for a workload: it listens at these addresses.
    pub fn proxy(&mut self, workload: u64, netns: u64, flags: u32, v4: IpAddr, v6: IpAddr) -> Result<()> {
        let proxy = Proxy { netns, flags, zero: 0, v4: mapped(v4), v6: mapped(v6) };
        let mut proxies: HashMap<_, u64, Proxy> = HashMap::try_from(self.map_mut(map::PROXIES)?)?;
        Ok(proxies.insert(workload, proxy, 0)?)
    }

    /// The node: whether its proxy is alive, the cookie of its namespace, and its flags.
    pub fn node(&mut self, alive: bool, netns: u64, flags: u32) -> Result<()> {
        let alive_until_nanoseconds = if alive { u64::MAX } else { 1 };
        let mut node: Array<_, Node> = Array::try_from(self.map_mut(map::NODE)?)?;
        Ok(node.set(0, Node { alive_until_nanoseconds, netns, flags, zero: 0 }, 0)?)
    }

    /// The verdict of a set of policies on a workload, at a port (0: those that no policy names).
    pub fn verdict(&mut self, source: u64, policies: u32, port: u16, family: u16, action: u16) -> Result<()> {
        let mut verdicts: HashMap<_, VerdictKey, Verdict> = HashMap::try_from(self.map_mut(map::VERDICTS)?)?;
        let key = VerdictKey { source, policies, port, family };
        Ok(verdicts.insert(key, Verdict { policy: 7, rule: 3, action }, 0)?)
    }

    /// The verdict of a set of policies on whoever comes from a block of addresses without an identity.
    pub fn plain_verdict(
        &mut self,
        policies: u32,
        port: u16,
        block: (IpAddr, u32),
        action: u16,
    ) -> Result<()> {
        let mut plain: LpmTrie<_, PlainKey, Verdict> = LpmTrie::try_from(self.map_mut(map::PLAIN_VERDICTS)?)?;
        let bits = block.1 + if block.0.is_ipv4() { PlainKey::V4_BITS } else { 0 };
        let key = PlainKey { policies, port, zero: 0, source: mapped(block.0) };
        let verdict = Verdict { policy: 7, rule: 3, action };
        Ok(plain.insert(&Key::new(PlainKey::FIXED_BITS + bits, key), verdict, 0)?)
    }

    /// Where an application meant to connect, as the proxy asks.
    pub fn original(&self, netns: u64, source: SocketAddr) -> Result<Option<Original>> {
        let originals: HashMap<_, OriginalKey, Original> = HashMap::try_from(self.map(map::ORIGINALS)?)?;
        found(originals.get(&OriginalKey { netns, source: endpoint(source), zero: 0 }, 0))
    }

    /// Who made a connection, as a workload's hook asks.
    pub fn caller(&self, source: SocketAddr, destination: SocketAddr) -> Result<Option<Caller>> {
        let callers: HashMap<_, CallerKey, Caller> = HashMap::try_from(self.map(map::CALLERS)?)?;
        found(callers.get(&CallerKey { source: endpoint(source), destination: endpoint(destination) }, 0))
    }

    /// Notes a caller by hand: now, or long ago.
    pub fn note_caller(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        workload: u64,
        fresh: bool,
    ) -> Result<()> {
        let mut callers: HashMap<_, CallerKey, Caller> = HashMap::try_from(self.map_mut(map::CALLERS)?)?;
        let key = CallerKey { source: endpoint(source), destination: endpoint(destination) };
        // The clock began at boot: half of all its time away is not now.
        let at_nanoseconds = if fresh { self::now()? } else { u64::MAX / 2 };
        Ok(callers.insert(key, Caller { workload, at_nanoseconds }, 0)?)
    }

    /// The client that an application sees behind the proxy's end of a connection.
    pub fn client(&mut self, netns: u64, source: SocketAddr, client: SocketAddr) -> Result<()> {
        let mut clients: HashMap<_, ClientKey, Endpoint> = HashMap::try_from(self.map_mut(map::CLIENTS)?)?;
        Ok(clients.insert(ClientKey { netns, source: endpoint(source), zero: 0 }, endpoint(client), 0)?)
    }

    /// The proxy's listener for what comes to `address` of a workload without TLS. Closed, it is there no more.
    pub fn listener(&mut self, workload: u64, address: IpAddr, listener: &impl AsRawFd) -> Result<()> {
        let mut listeners: SockHash<_, ListenerKey> = SockHash::try_from(self.map_mut(map::LISTENERS)?)?;
        let key = ListenerKey { workload, address: mapped(address) };
        Ok(listeners.insert(key, listener.as_raw_fd(), 0)?)
    }

    /// Who makes a connection that was led to the proxy.
    pub fn steered(&self, source: SocketAddr, destination: SocketAddr) -> Result<Option<u64>> {
        let steered: HashMap<_, CallerKey, u64> = HashMap::try_from(self.map(map::STEERED)?)?;
        let ends = CallerKey { source: endpoint(source), destination: endpoint(destination) };
        found(steered.get(&ends, 0))
    }

    /// The denials that were told since the last time.
    pub fn denials(&mut self) -> Result<Vec<Denial>> {
        let mut ring = RingBuf::try_from(self.map_mut(map::DENIALS)?)?;
        let mut denials = Vec::new();
        while let Some(bytes) = ring.next() {
            denials.push(denial(&bytes)?);
        }
        Ok(denials)
    }

    /// Puts the program `inbound` in force in a network namespace, for as long as the link lives.
    pub fn guard(&mut self, netns: &File) -> Result<FdLink> {
        let program: &mut SkLookup =
            self.ebpf.program_mut(INBOUND).context("no program inbound")?.try_into()?;
        let link = program.attach(netns)?;
        Ok(program.take_link(link)?.into())
    }

    /// What the kernel remembers of a socket.
    pub fn record(&self, socket: &impl AsRawFd) -> Result<Option<Socket>> {
        let sockets: SkStorage<_, Socket> = SkStorage::try_from(self.map(map::SOCKETS)?)?;
        match sockets.get(socket, 0) {
            Ok(record) => Ok(Some(record)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read the socket's storage"),
        }
    }

    /// How often this way was taken, on all CPUs.
    pub fn reason(&self, reason: Reason) -> Result<u64> {
        let reasons: PerCpuArray<_, u64> = PerCpuArray::try_from(self.map(map::REASONS)?)?;
        Ok(reasons.get(&(reason as u32), 0)?.iter().sum())
    }

    /// The counters of a key, on all CPUs; zeros if there are none.
    pub fn counters(&self, key: &CounterKey) -> Result<Counters> {
        let counters: PerCpuHashMap<_, CounterKey, Counters> =
            PerCpuHashMap::try_from(self.map(map::COUNTERS)?)?;
        let mut sum = Counters::default();
        match counters.get(key, 0) {
            Ok(values) => values.iter().for_each(|value| sum.add(value)),
            Err(aya::maps::MapError::KeyNotFound) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(sum)
    }

    /// Open connections of a backend.
    pub fn open(&self, service: u32, index: usize) -> Result<u64> {
        let loads: Array<_, Load> = Array::try_from(self.map(map::LOADS)?)?;
        Ok(loads.get(&backend_number(service, index)?, 0)?.open)
    }

    /// Sets the open connections of a backend, as the agent does when it gives a slot away.
    pub fn set_open(&mut self, service: u32, index: usize, open: u64) -> Result<()> {
        let mut loads: Array<_, Load> = Array::try_from(self.map_mut(map::LOADS)?)?;
        Ok(loads.set(backend_number(service, index)?, Load { open }, 0)?)
    }

    fn map(&self, name: &str) -> Result<&aya::maps::Map> {
        self.ebpf.map(name).with_context(|| format!("the object has no map {name}"))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))
    }
}

fn found<V>(result: Result<V, MapError>) -> Result<Option<V>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The clock of the kernel programs.
fn now() -> Result<u64> {
    let uptime = std::fs::read_to_string("/proc/uptime").context("cannot read /proc/uptime")?;
    let seconds: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
    Ok((seconds * 1e9) as u64)
}

/// The number that a test's backend has.
pub fn backend_number(service: u32, index: usize) -> Result<u32> {
    Ok(service * 128 + u32::try_from(index)?)
}

fn page_of(service: u32, index: u32) -> u32 {
    service * 8 + index
}

/// An address and port as maps hold them.
pub fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::new(mapped(address.ip()), address.port())
}

/// A service's key.
pub fn key(address: SocketAddr, protocol: Protocol) -> ServiceKey {
    ServiceKey::new(mapped(address.ip()), address.port(), protocol)
}

fn mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::from_v4(address.octets()),
        IpAddr::V6(address) => Address::new(address.octets()),
    }
}
