//! The kernel programs, as they are embedded in the agent.

use mesh_common::abi::{self, map};

use crate::config::MapSizes;

/// An array that is aligned as ELF wants it.
#[repr(C, align(16))]
struct Aligned<B: ?Sized>(B);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/mesh.o")));

/// The object file; `None` in an agent that was built without it.
pub fn bytes() -> Option<&'static [u8]> {
    Some(&OBJECT.0).filter(|object| !object.is_empty())
}

/// How a map must be. Every map of the object but its own data sections has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSpec {
    /// Name in the object and under the pin path.
    pub name: &'static str,
    /// `enum bpf_map_type`.
    pub kind: MapKind,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
    /// Most entries; 0 for socket storage.
    pub entries: u32,
}

/// The kinds of maps in use, by their number in `enum bpf_map_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Hash table.
    Hash = 1,
    /// Array.
    Array = 2,
    /// Hash table with a value for each CPU.
    PerCpuHash = 5,
    /// Array with a value for each CPU.
    PerCpuArray = 6,
    /// Hash table that forgets what was used least recently.
    LruHash = 9,
    /// Trie of prefixes.
    PrefixTrie = 11,
    /// Hash table of sockets.
    SocketHash = 18,
    /// Socket storage.
    SocketStorage = 24,
    /// Ring buffer; its entries are bytes.
    RingBuffer = 27,
}

impl MapKind {
    /// Whether each CPU has a value of its own.
    pub fn per_cpu(self) -> bool {
        matches!(self, Self::PerCpuHash | Self::PerCpuArray)
    }

    /// Whether every index exists from the start.
    pub fn array(self) -> bool {
        matches!(self, Self::Array | Self::PerCpuArray)
    }
}

/// The maps with their configured sizes.
pub fn maps(sizes: &MapSizes) -> [MapSpec; map::ALL.len()] {
    use MapKind::{
        Array, Hash, LruHash, PerCpuArray, PerCpuHash, PrefixTrie, RingBuffer, SocketHash, SocketStorage,
    };
    fn of<K, V>(name: &'static str, kind: MapKind, entries: u32) -> MapSpec {
        let bytes = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        MapSpec { name, kind, key: bytes(size_of::<K>()), value: bytes(size_of::<V>()), entries }
    }
    [
        of::<abi::ServiceKey, abi::Pointer>(map::SERVICES, Hash, sizes.services),
        of::<u32, abi::Page>(map::PAGES, Array, sizes.pages),
        // Numbers of backends and services begin at 1.
        of::<u32, abi::Backend>(map::BACKENDS, Array, sizes.backends.saturating_add(1)),
        of::<u32, abi::Load>(map::LOADS, Array, sizes.backends.saturating_add(1)),
        of::<u32, u64>(map::ROTATION, Array, sizes.services.saturating_add(1)),
        of::<abi::AffinityKey, abi::Affinity>(map::AFFINITY, LruHash, sizes.affinity),
        of::<u64, abi::WorkloadIdentity>(map::WORKLOADS, Hash, sizes.workloads),
        of::<u32, abi::Socket>(map::SOCKETS, SocketStorage, 0),
        of::<abi::FlowKey, abi::FlowValue>(map::UDP_FLOWS, LruHash, sizes.udp_flows),
        of::<abi::SourceKey, abi::Endpoint>(map::UDP_SOURCES, LruHash, sizes.udp_flows),
        of::<abi::CounterKey, abi::Counters>(map::COUNTERS, PerCpuHash, sizes.counters),
        of::<u32, u64>(map::REASONS, PerCpuArray, abi::Reason::COUNT),
        of::<abi::Address, abi::Peer>(map::PEERS, Hash, sizes.peers),
        of::<u64, abi::Proxy>(map::PROXIES, Hash, sizes.workloads),
        of::<u32, abi::Node>(map::NODE, Array, 1),
        of::<abi::OriginalKey, abi::Original>(map::ORIGINALS, LruHash, sizes.passages),
        of::<abi::CallerKey, abi::Caller>(map::CALLERS, LruHash, sizes.passages),
        of::<abi::ClientKey, abi::Endpoint>(map::CLIENTS, Hash, sizes.passages),
        of::<abi::VerdictKey, abi::Verdict>(map::VERDICTS, Hash, sizes.verdicts),
        of::<([u32; 1], abi::PlainKey), abi::Verdict>(map::PLAIN_VERDICTS, PrefixTrie, sizes.verdicts),
        MapSpec { name: map::DENIALS, kind: RingBuffer, key: 0, value: 0, entries: DENIALS_BYTES },
        // Of both families each.
        of::<abi::ListenerKey, u32>(map::LISTENERS, SocketHash, sizes.workloads.saturating_mul(2)),
        of::<abi::CallerKey, u64>(map::STEERED, LruHash, sizes.passages),
    ]
}

/// Room for denials that the agent has not read yet: some 800.
const DENIALS_BYTES: u32 = 64 << 10;

/// The programs: name in the object, which is also the name of the link's pin.
pub const PROGRAMS: [&str; 10] = [
    "connection",
    "getpeername4",
    "getpeername6",
    "recvmsg4",
    "recvmsg6",
    "sendmsg4",
    "sendmsg6",
    "connect4",
    "connect6",
    "tag",
];

/// The program that runs in the network namespaces of pods, not on the cgroup.
pub const INBOUND: &str = "inbound";
