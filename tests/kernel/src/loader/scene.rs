//! What a test of the loader runs in, and what it reads from the pinned maps.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapInfo, PerCpuArray, PerCpuHashMap};
use mesh_agent::config::{DatapathConfig, KernelLog, MapSizes};
use mesh_agent::datapath::desired::{Candidate, Frontend};
use mesh_agent::datapath::{Datapath, pins};
use mesh_agent::snapshot::Workload;
use mesh_agent::workloads::Change;
use mesh_common::abi::{
    Affinity, AffinityKey, Algorithm, Backend, CounterKey, Counters, Endpoint, FlowKey, FlowValue, Load,
    Page, Pointer, Protocol, Reason, ServiceKey, SourceKey, WorkloadIdentity, map,
};

use crate::cgroup::Cgroup;
use crate::namespace;
use crate::sandbox::{endpoint, key};
use crate::traffic::{Listeners, connect};

const BPFFS: &str = "/sys/fs/bpf";
const PREFIX: &str = "mesh-test-";

/// Sizes that are enough for every test.
pub(super) const SIZES: MapSizes = MapSizes {
    services: 16,
    backends: 64,
    pages: 64,
    workloads: 8,
    affinity: 1024,
    udp_flows: 1024,
    counters: 256,
    peers: 64,
    passages: 256,
    verdicts: 256,
};

/// A network namespace, a cgroup that this process is in, and a pin path. Dropping it removes them, and what is pinned.
pub struct Scene {
    // Before the cgroup: the links end first.
    pins: PinPath,
    /// The cgroup.
    pub(super) cgroup: Cgroup,
}

impl Scene {
    /// Takes the current thread into a new network namespace and the whole process into a new cgroup.
    pub fn enter(name: &str) -> Result<Self> {
        namespace::enter_new()?;
        Ok(Self { pins: PinPath::new(name), cgroup: Cgroup::enter(name)? })
    }

    /// What an agent would be configured with.
    pub(super) fn config(&self, sizes: MapSizes) -> DatapathConfig {
        self.pins.config(self.cgroup.path(), sizes)
    }

    /// An agent that has loaded, and adopted what is there.
    pub(super) fn prepare(&self, sizes: MapSizes) -> Result<Datapath> {
        Datapath::prepare(&self.config(sizes))
    }

    /// A first agent, with these services in force.
    pub(super) fn start(&self, sizes: MapSizes, services: &[(&str, Frontend)]) -> Result<Datapath> {
        let mut agent = self.prepare(sizes)?;
        put(&mut agent, services)?;
        agent.attach()?;
        Ok(agent)
    }

    /// The next agent, in the place of one that has gone.
    pub(super) fn restart(&self, sizes: MapSizes) -> Result<Datapath> {
        let mut agent = self.prepare(sizes)?;
        agent.attach()?;
        Ok(agent)
    }

    /// The change that makes this process a workload.
    pub(super) fn enrolment(&self, uid: &str) -> Result<Change> {
        Ok(Change::Add { cgroup: std::fs::metadata(self.cgroup.path())?.ino(), uid: Arc::from(uid) })
    }

    /// The pin path.
    pub(super) fn pin_path(&self) -> &Path {
        &self.pins.0
    }

    /// The pin of a map.
    pub(super) fn map_pin(&self, name: &str) -> PathBuf {
        self.pins.0.join("maps").join(name)
    }

    /// All pinned maps with their ids in the kernel.
    pub(super) fn map_ids(&self) -> Result<BTreeMap<String, u32>> {
        let mut ids = BTreeMap::new();
        for entry in std::fs::read_dir(self.pins.0.join("maps"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            ids.insert(name, MapInfo::from_pin(entry.path())?.id());
        }
        Ok(ids)
    }

    /// A pinned map.
    pub(super) fn open(&self, name: &str) -> Result<Map> {
        let data = MapData::from_pin(self.map_pin(name)).with_context(|| format!("cannot open {name}"))?;
        Ok(Map::from_map_data(data)?)
    }

    /// Where services lead.
    pub(super) fn services(&self) -> Result<HashMap<MapData, ServiceKey, Pointer>> {
        Ok(self.open(map::SERVICES)?.try_into()?)
    }

    /// The pages.
    pub(super) fn pages(&self) -> Result<Array<MapData, Page>> {
        Ok(self.open(map::PAGES)?.try_into()?)
    }

    /// Everything that an agent which follows must keep, in words.
    pub(super) fn contents(&self) -> Result<BTreeMap<&'static str, Vec<String>>> {
        let mut counters = Vec::new();
        let map: PerCpuHashMap<_, CounterKey, Counters> = self.open(map::COUNTERS)?.try_into()?;
        for entry in map.iter() {
            let (key, values) = entry?;
            counters.push(format!("{key:?} {:?}", values.iter().collect::<Vec<_>>()));
        }
        counters.sort();
        let reasons: PerCpuArray<_, u64> = self.open(map::REASONS)?.try_into()?;
        let reasons = reasons.iter().map(|values| Ok(format!("{:?}", values?.iter().collect::<Vec<_>>())));
        Ok(BTreeMap::from([
            (map::SERVICES, self.hash::<ServiceKey, Pointer>(map::SERVICES)?),
            (map::WORKLOADS, self.hash::<u64, WorkloadIdentity>(map::WORKLOADS)?),
            (map::AFFINITY, self.hash::<AffinityKey, Affinity>(map::AFFINITY)?),
            (map::UDP_FLOWS, self.hash::<FlowKey, FlowValue>(map::UDP_FLOWS)?),
            (map::UDP_SOURCES, self.hash::<SourceKey, Endpoint>(map::UDP_SOURCES)?),
            (map::PAGES, self.array(map::PAGES, |page: &Page| page.header.used != 0)?),
            (map::BACKENDS, self.array(map::BACKENDS, |slot: &Backend| *slot != Backend::default())?),
            (map::LOADS, self.array(map::LOADS, |load: &Load| load.open != 0)?),
            (map::ROTATION, self.array(map::ROTATION, |turn: &u64| *turn != 0)?),
            (map::COUNTERS, counters),
            (map::REASONS, reasons.collect::<Result<_>>()?),
        ]))
    }

    fn hash<K: Pod + Debug, V: Pod + Debug>(&self, name: &str) -> Result<Vec<String>> {
        let map: Map = self.open(name)?;
        #[expect(clippy::wildcard_enum_match_arm, reason = "only these two are asked for")]
        let data = match map {
            Map::HashMap(data) | Map::LruHashMap(data) => data,
            _ => anyhow::bail!("{name} is of another type"),
        };
        let map: HashMap<_, K, V> = Map::HashMap(data).try_into()?;
        let mut all = Vec::new();
        for entry in map.iter() {
            let (key, value) = entry?;
            all.push(format!("{key:?} {value:?}"));
        }
        all.sort();
        Ok(all)
    }

    fn array<V: Pod + Debug>(&self, name: &str, used: impl Fn(&V) -> bool) -> Result<Vec<String>> {
        let map: Array<_, V> = self.open(name)?.try_into()?;
        let mut all = Vec::new();
        for index in 0..map.len() {
            let value = map.get(&index, 0)?;
            if used(&value) {
                all.push(format!("{index} {value:?}"));
            }
        }
        Ok(all)
    }
}

/// A pin path of this process, removed with what is in it.
pub(super) struct PinPath(PathBuf);

impl PinPath {
    /// Named after the test. (bpffs refuses dots in names.)
    pub(super) fn new(test: &str) -> Self {
        remove_left();
        let name: String = test.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        Self(format!("{BPFFS}/{PREFIX}{}-{name}", std::process::id()).into())
    }

    /// What an agent on this path would be configured with.
    pub(super) fn config(&self, cgroup_root: &Path, sizes: MapSizes) -> DatapathConfig {
        DatapathConfig {
            cgroup_root: cgroup_root.to_path_buf(),
            pin_path: self.0.clone(),
            sizes,
            kernel_log: KernelLog::Off,
        }
    }
}

/// Removes what a process has left that was killed.
fn remove_left() {
    let dead = |name: &str| {
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        process.is_some_and(|process| !Path::new("/proc").join(process).exists())
    };
    for entry in std::fs::read_dir(BPFFS).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(dead)
            && let Err(error) = pins::remove(&entry.path())
        {
            println!("cannot remove {}: {error}", entry.path().display());
        }
    }
}

impl Drop for PinPath {
    fn drop(&mut self) {
        if let Err(error) = pins::remove(&self.0) {
            println!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Puts services in force.
pub(super) fn put(agent: &mut Datapath, services: &[(&str, Frontend)]) -> Result<()> {
    for (name, frontend) in services {
        agent
            .put(&Arc::from(*name), std::slice::from_ref(frontend), Instant::now())
            .map_err(|reason| anyhow!("{name} was refused: {reason}"))?;
    }
    Ok(())
}

/// A TCP service port with backends of equal weight.
pub(super) fn frontend(vip: SocketAddr, algorithm: Algorithm, backends: &[SocketAddr]) -> Frontend {
    let candidate = |address: &SocketAddr| Candidate {
        endpoint: endpoint(*address),
        weight: 1,
        workload: Arc::new(Workload { name: format!("pod at {address}").into(), ..Workload::default() }),
    };
    Frontend {
        key: key(vip, Protocol::Tcp),
        algorithm,
        affinity_seconds: 0,
        backends: backends.iter().map(candidate).collect(),
    }
}

/// How often a way was taken.
pub(super) fn reason(agent: &Datapath, reason: Reason) -> Result<u64> {
    let all = agent.reasons()?;
    all.iter().find(|(one, _)| *one == reason).map(|(_, count)| *count).context("a reason is missing")
}

/// All counters of a service number together.
pub(super) fn counted(agent: &Datapath, service: u32) -> Result<Counters> {
    let mut sum = Counters::default();
    let counters = agent.counters()?;
    counters.iter().filter(|(key, _)| key.service == service).for_each(|(_, counters)| sum.add(counters));
    Ok(sum)
}

/// Open connections of all backends of a service.
pub(super) fn open(agent: &Datapath, frontend: &Frontend) -> Result<Vec<u64>> {
    let port = agent.ledger().ports().get(&frontend.key).context("the service is not known")?;
    port.backends.iter().map(|backend| Ok(agent.maps().open_connections(backend.number)?)).collect()
}

/// Connects as fast as it can while `act` is at work, and two thousand times at least; how often. None may fail.
pub(super) fn under_load<T>(
    listeners: &Listeners,
    vip: SocketAddr,
    act: impl FnOnce() -> Result<T>,
) -> Result<(T, usize)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let storm = scope.spawn(|| -> Result<usize> {
            let mut count = 0;
            while count < 2000 || !stop.load(Ordering::Relaxed) {
                let client = connect(vip).with_context(|| format!("after {count} connections"))?;
                listeners.accept()?;
                drop(client);
                count += 1;
            }
            Ok(count)
        });
        let done = act();
        stop.store(true, Ordering::Relaxed);
        let count = storm.join().map_err(|_panic| anyhow!("the client panicked"))??;
        Ok((done?, count))
    })
}

/// That an address which is no service is dialled as it is: there is no route to it.
pub(super) fn passes_unchanged(vip: SocketAddr) -> Result<()> {
    let error = std::net::TcpStream::connect(vip).err().context("reached a service that is not in force")?;
    ensure!(error.raw_os_error() == Some(libc::ENETUNREACH), "{vip} answers with {error}");
    Ok(())
}
