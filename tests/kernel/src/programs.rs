//! The mesh's programs: loaded, described, attached.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, LpmTrie, Map, PerCpuArray, PerCpuHashMap, PerCpuValues, RingBuf};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program};
use aya::{Ebpf, EbpfLoader, Pod};
use mesh_agent::datapath::object::{self, INBOUND, PROGRAMS};
use mesh_common::abi::{
    Address, Affinity, AffinityKey, Backend, Caller, CallerKey, ClientKey, CounterKey, Counters, Endpoint,
    FlowKey, FlowValue, Load, Node, Original, OriginalKey, Page, Peer, PlainKey, Pointer, Proxy, ServiceKey,
    SourceKey, Verdict, VerdictKey, WorkloadIdentity, map,
};

/// Entries of the maps that a test fills; small, since many sandboxes are made.
const SIZES: [(&str, u32); 19] = [
    (map::SERVICES, 64),
    (map::PAGES, 256),
    (map::BACKENDS, 2048),
    (map::LOADS, 2048),
    (map::ROTATION, 64),
    (map::AFFINITY, 256),
    (map::WORKLOADS, 16),
    (map::UDP_FLOWS, 256),
    (map::UDP_SOURCES, 256),
    (map::COUNTERS, 256),
    (map::PEERS, 64),
    (map::PROXIES, 16),
    (map::ORIGINALS, 256),
    (map::CALLERS, 256),
    (map::CLIENTS, 256),
    (map::VERDICTS, 64),
    (map::PLAIN_VERDICTS, 64),
    (map::LISTENERS, 16),
    (map::STEERED, 256),
];

/// Loads every program of the object that the agent embeds.
#[expect(clippy::wildcard_enum_match_arm, reason = "aya knows dozens of kinds, the mesh uses four")]
pub fn load() -> Result<Ebpf> {
    let object =
        object::bytes().context("the kernel programs are not built; run `cargo xtask build-ebpf`")?;
    let mut loader = EbpfLoader::new();
    for (name, entries) in SIZES {
        loader.map_max_entries(name, entries);
    }
    // As the agent loads them: without logging, which is then no more than a constant to the verifier.
    loader.override_global(aya_log::LEVEL, &0u8, true);
    let mut ebpf = loader.load(object).context("cannot create the maps")?;
    let found: BTreeSet<String> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    let expected: BTreeSet<String> = PROGRAMS.into_iter().chain([INBOUND]).map(str::to_owned).collect();
    if found != expected {
        bail!("the object has the programs {found:?}, the tests are for {expected:?}");
    }
    for (name, program) in ebpf.programs_mut() {
        match program {
            Program::CgroupSock(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::SockOps(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            _ => bail!("{name} is of a kind that no test knows"),
        }
        .with_context(|| format!("this kernel refuses {name}"))?;
    }
    Ok(ebpf)
}

/// Attaches every program to a cgroup, for as long as the links live.
pub fn attach(ebpf: &mut Ebpf, cgroup: &Path) -> Result<Vec<FdLink>> {
    let folder = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
    let mut links = Vec::new();
    for (name, program) in ebpf.programs_mut().filter(|(name, _)| *name != INBOUND) {
        links.push(attach_one(program, &folder).with_context(|| format!("cannot attach {name}"))?);
    }
    Ok(links)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "aya knows dozens of kinds, the mesh uses three")]
fn attach_one(program: &mut Program, cgroup: &File) -> Result<FdLink> {
    // Links share a cgroup with others in any mode; `AllowMultiple` is a flag of the older interface, and refused.
    let mode = CgroupAttachMode::Single;
    Ok(match program {
        Program::CgroupSock(program) => {
            let link = program.attach(cgroup, mode)?;
            program.take_link(link)?.try_into()?
        }
        Program::CgroupSockAddr(program) => {
            let link = program.attach(cgroup, mode)?;
            program.take_link(link)?.try_into()?
        }
        Program::SockOps(program) => {
            let link = program.attach(cgroup, mode)?;
            program.take_link(link)?.try_into()?
        }
        _ => bail!("it is of a kind that no test knows"),
    })
}

/// Empties every map that programs or tests write.
pub fn clear(ebpf: &mut Ebpf) -> Result<()> {
    clear_hash::<ServiceKey, Pointer>(ebpf, map::SERVICES)?;
    clear_hash::<u64, WorkloadIdentity>(ebpf, map::WORKLOADS)?;
    clear_hash::<AffinityKey, Affinity>(ebpf, map::AFFINITY)?;
    clear_hash::<FlowKey, FlowValue>(ebpf, map::UDP_FLOWS)?;
    clear_hash::<SourceKey, Endpoint>(ebpf, map::UDP_SOURCES)?;
    clear_hash::<Address, Peer>(ebpf, map::PEERS)?;
    clear_hash::<u64, Proxy>(ebpf, map::PROXIES)?;
    clear_hash::<OriginalKey, Original>(ebpf, map::ORIGINALS)?;
    clear_hash::<CallerKey, Caller>(ebpf, map::CALLERS)?;
    clear_hash::<ClientKey, Endpoint>(ebpf, map::CLIENTS)?;
    clear_hash::<CallerKey, u64>(ebpf, map::STEERED)?;
    clear_hash::<VerdictKey, Verdict>(ebpf, map::VERDICTS)?;
    clear_array(ebpf, map::NODE, Node::default())?;
    let mut plain: LpmTrie<_, PlainKey, Verdict> = LpmTrie::try_from(named(ebpf, map::PLAIN_VERDICTS)?)?;
    let keys: Vec<_> = plain.keys().collect::<Result<_, _>>()?;
    keys.iter().try_for_each(|key| plain.remove(key))?;
    let mut ring = RingBuf::try_from(named(ebpf, map::DENIALS)?)?;
    while ring.next().is_some() {}
    clear_array(ebpf, map::PAGES, Page::default())?;
    clear_array(ebpf, map::BACKENDS, Backend::default())?;
    clear_array(ebpf, map::LOADS, Load::default())?;
    clear_array(ebpf, map::ROTATION, 0u64)?;
    let mut counters: PerCpuHashMap<_, CounterKey, Counters> =
        PerCpuHashMap::try_from(named(ebpf, map::COUNTERS)?)?;
    let keys: Vec<CounterKey> = counters.keys().collect::<Result<_, _>>()?;
    keys.iter().try_for_each(|key| counters.remove(key))?;
    let mut reasons: PerCpuArray<_, u64> = PerCpuArray::try_from(named(ebpf, map::REASONS)?)?;
    for index in 0..reasons.len() {
        reasons.set(
            index,
            PerCpuValues::try_from(vec![0; aya::util::nr_cpus().map_err(|(_, error)| error)?])?,
            0,
        )?;
    }
    Ok(())
}

fn clear_hash<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<()> {
    let mut map: HashMap<_, K, V> = HashMap::try_from(named(ebpf, name)?)?;
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>()?;
    Ok(keys.iter().try_for_each(|key| map.remove(key))?)
}

fn clear_array<V: Pod>(ebpf: &mut Ebpf, name: &str, zero: V) -> Result<()> {
    let mut map: Array<_, V> = Array::try_from(named(ebpf, name)?)?;
    Ok((0..map.len()).try_for_each(|index| map.set(index, zero, 0))?)
}

fn named<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))
}

/// Says what the verifier and the compiler in the kernel made of each program.
pub fn describe(ebpf: &Ebpf) -> Result<()> {
    for (name, program) in ebpf.programs() {
        let info = program.info().with_context(|| format!("cannot ask about {name}"))?;
        let number = |count: Option<u32>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
        println!(
            "loaded {name}: {} instructions verified, {} bytes translated, {} bytes compiled",
            number(info.verified_instruction_count()),
            number(info.size_translated()),
            info.size_jitted()
        );
    }
    Ok(())
}
