//! The maps. Keys, values and writers are documented in `mesh_common::abi::map`; sizes here are placeholders, the agent sets
//! them from its configuration.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    bindings::bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockHash},
};
use mesh_common::abi::{
    Address, Affinity, AffinityKey, Backend, Caller, CallerKey, ClientKey, CounterKey, Counters, Endpoint,
    FlowKey, FlowValue, ListenerKey, Load, Node, Original, OriginalKey, Page, Peer, PlainKey, Pointer, Proxy,
    Reason, ServiceKey, Socket, SourceKey, Verdict, VerdictKey, WorkloadIdentity,
};

/// Overwritten by the loader.
const SIZE: u32 = 1024;

#[map]
pub(crate) static SERVICES: HashMap<ServiceKey, Pointer> = HashMap::with_max_entries(SIZE, 0);
#[map]
pub(crate) static PAGES: Array<Page> = Array::with_max_entries(SIZE, 0);
#[map]
pub(crate) static BACKENDS: Array<Backend> = Array::with_max_entries(SIZE, 0);
#[map]
pub(crate) static LOADS: Array<Load> = Array::with_max_entries(SIZE, 0);
#[map]
pub(crate) static ROTATION: Array<u64> = Array::with_max_entries(SIZE, 0);
#[map]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(SIZE, 0);
#[map]
pub(crate) static WORKLOADS: HashMap<u64, WorkloadIdentity> = HashMap::with_max_entries(SIZE, 0);
#[map]
pub(crate) static UDP_FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::with_max_entries(SIZE, 0);
#[map]
pub(crate) static UDP_SOURCES: LruHashMap<SourceKey, Endpoint> = LruHashMap::with_max_entries(SIZE, 0);
/// Not preallocated: its values are as many times larger as the machine has processors.
#[map]
pub(crate) static COUNTERS: PerCpuHashMap<CounterKey, Counters> =
    PerCpuHashMap::with_max_entries(SIZE, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
/// Not preallocated, like the other maps that the agent fills according to what the mesh holds.
#[map]
pub(crate) static PEERS: HashMap<Address, Peer> = HashMap::with_max_entries(SIZE, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static PROXIES: HashMap<u64, Proxy> = HashMap::with_max_entries(SIZE, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static NODE: Array<Node> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static ORIGINALS: LruHashMap<OriginalKey, Original> = LruHashMap::with_max_entries(SIZE, 0);
#[map]
pub(crate) static CALLERS: LruHashMap<CallerKey, Caller> = LruHashMap::with_max_entries(SIZE, 0);
#[map]
pub(crate) static CLIENTS: HashMap<ClientKey, Endpoint> = HashMap::with_max_entries(SIZE, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static VERDICTS: HashMap<VerdictKey, Verdict> = HashMap::with_max_entries(SIZE, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static PLAIN_VERDICTS: LpmTrie<PlainKey, Verdict> = LpmTrie::with_max_entries(SIZE, 0);
#[map]
pub(crate) static DENIALS: RingBuf = RingBuf::with_byte_size(1 << 16, 0);
#[map]
pub(crate) static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(SIZE, 0);
#[map]
pub(crate) static STEERED: LruHashMap<CallerKey, u64> = LruHashMap::with_max_entries(SIZE, 0);

/// Declared by hand, since aya-ebpf's `SkStorage` takes no socket of `sock_create` and sockops.
#[repr(C)]
pub(crate) struct SocketStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const Socket,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; BPF_F_NO_PREALLOC as usize],
}

// SAFETY: the pointers only carry types in BTF; nothing follows them.
unsafe impl Sync for SocketStorage {}

impl SocketStorage {
    /// The map, as helpers take it.
    #[inline(always)]
    pub(crate) fn as_ptr(&'static self) -> *mut core::ffi::c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

#[btf_map]
pub(crate) static SOCKETS: SocketStorage = SocketStorage {
    r#type: core::ptr::null(),
    key: core::ptr::null(),
    value: core::ptr::null(),
    max_entries: core::ptr::null(),
    map_flags: core::ptr::null(),
};
