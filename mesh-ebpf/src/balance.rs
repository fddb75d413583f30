//! Service to backend: the lookup that every outgoing hook shares.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_ANY,
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns},
    programs::SockAddrContext,
};
use mesh_common::abi::{
    Affinity, AffinityKey, Algorithm, Endpoint, Header, Page, Reason, ServiceKey, descend, maglev_position,
    random_position, round_robin_position,
};

use crate::{
    atomic, count,
    maps::{AFFINITY, BACKENDS, LOADS, PAGES, ROTATION, SERVICES},
    socket,
};

/// A chosen backend.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) service: u32,
    pub(crate) backend: u32,
    pub(crate) incarnation: u32,
    pub(crate) endpoint: Endpoint,
}

/// Why none was chosen.
#[derive(Clone, Copy)]
pub(crate) enum Miss {
    /// The destination is no service.
    NotService,
    /// No backend may be used; the service's number is for the counters.
    NoBackends(u32),
    /// What was looked up has been given to another meanwhile.
    Stale,
    /// The tree leads nowhere.
    Broken(u32),
}

impl Miss {
    /// What is counted.
    #[inline(always)]
    pub(crate) fn reason(self) -> Reason {
        match self {
            Self::NotService => Reason::NotService,
            Self::NoBackends(_) => Reason::NoBackends,
            Self::Stale => Reason::StaleTwice,
            Self::Broken(_) => Reason::BrokenTree,
        }
    }

    /// The service's number, where it is known.
    #[inline(always)]
    pub(crate) fn service(self) -> u32 {
        match self {
            Self::NoBackends(service) | Self::Broken(service) => service,
            Self::NotService | Self::Stale => 0,
        }
    }
}

/// The backend for a new connection or flow to `key`.
///
/// A lookup may meet a service that is being replaced. What it was led to stays whole for a while (the agent writes old
/// pages and backend slots again only later), so the old backend is as good as the new one.
#[inline(always)]
pub(crate) fn choose(ctx: &SockAddrContext, key: &ServiceKey) -> Result<Choice, Miss> {
    let root = root(key)?;
    let header = &root.header;
    if header.total == 0 {
        return Err(Miss::NoBackends(header.service));
    }
    if let Some(choice) = by_affinity(ctx, header) {
        count::reason(Reason::AffinityHit);
        return Ok(choice);
    }
    let backend = by_algorithm(ctx, root).ok_or(Miss::Broken(header.service))?;
    let choice = choice(header.service, backend).ok_or(Miss::Stale)?;
    remember(ctx, header, &choice);
    Ok(choice)
}

/// The root page of a service.
///
/// Between finding an element of the hash table and reading it, the element may be given to another key; the page says whose
/// it is, and then it is looked up again, once.
#[inline(always)]
fn root(key: &ServiceKey) -> Result<&'static Page, Miss> {
    let mut missing = Miss::Stale;
    for _ in 0..2 {
        // SAFETY: eight aligned bytes that are read at once.
        let Some(pointer) = (unsafe { SERVICES.get(key) }).copied() else {
            // Older kernels replace an element by adding the new one and then taking the old one out: who walks the bucket
            // meanwhile may see neither.
            missing = Miss::NotService;
            continue;
        };
        let Some(page) = PAGES.get(pointer.page()) else {
            return Err(Miss::Broken(0));
        };
        if page.header.key.same(key) && page.header.generation == pointer.generation() {
            return Ok(page);
        }
        count::reason(Reason::Stale);
        missing = Miss::Stale;
    }
    Err(missing)
}

/// Whether a remembered backend still is one of its service's.
#[inline(always)]
pub(crate) fn still(service: u32, backend: u32, incarnation: u32) -> Option<Endpoint> {
    let slot = BACKENDS.get(backend)?;
    slot.is(service, incarnation).then_some(slot.endpoint)
}

/// Whether the slot has been given to another backend since; a slot that is only free keeps its incarnation.
#[inline(always)]
pub(crate) fn reused(backend: u32, incarnation: u32) -> bool {
    backend != 0 && BACKENDS.get(backend).is_none_or(|slot| slot.incarnation != incarnation)
}

#[inline(always)]
fn choice(service: u32, backend: u32) -> Option<Choice> {
    let slot = BACKENDS.get(backend)?;
    let choice =
        Choice { service: slot.service, backend, incarnation: slot.incarnation, endpoint: slot.endpoint };
    (choice.service == service).then_some(choice)
}

/// One descent for all algorithms, and a second one for least connections: the verifier walks each copy of the code.
#[inline(always)]
fn by_algorithm(ctx: &SockAddrContext, root: &'static Page) -> Option<u32> {
    let header = &root.header;
    let page = |number| PAGES.get(number);
    let position = match algorithm(header) {
        Algorithm::WeightedRandom | Algorithm::LeastConnections => random_position(random(), header.total),
        Algorithm::RoundRobin => round_robin_position(turn(header.service), header.stride, header.total),
        Algorithm::Maglev => {
            let workload = socket::workload(ctx);
            let client = if workload == 0 { client(ctx) } else { workload };
            maglev_position(client, header.total)
        }
    };
    let one = descend(root, position, page)?;
    if !matches!(algorithm(header), Algorithm::LeastConnections) {
        return Some(one);
    }
    let other = descend(root, random_position(random(), header.total), page)?;
    // A count that an accident took below zero is none.
    let open = |backend| LOADS.get(backend).map_or(0, |load| load.open.cast_signed().max(0));
    Some(if open(other) < open(one) { other } else { one })
}

/// Read anew each time: a value that the verifier has seen tested is a way of its own through all that follows.
#[inline(always)]
fn algorithm(header: &Header) -> Algorithm {
    // SAFETY: a valid reference.
    Algorithm::from_number(unsafe { (&raw const header.algorithm).read_volatile() })
}

/// How many connections came to this service before, as round robin counts them.
#[inline(always)]
fn turn(service: u32) -> u64 {
    match ROTATION.get_ptr_mut(service) {
        // SAFETY: an aligned map value, used only atomically.
        Some(turn) => unsafe { atomic::add(turn, 1) },
        None => u64::from(random()),
    }
}

#[inline(always)]
fn by_affinity(ctx: &SockAddrContext, header: &Header) -> Option<Choice> {
    if header.affinity_seconds == 0 {
        return None;
    }
    let key = AffinityKey { client: client(ctx), service: header.service, zero: 0 };
    let now = now();
    let kept = AFFINITY.get_ptr_mut(&key)?;
    // SAFETY: a value of this map; a torn read leads to a backend of this service or to none, which `choice` checks.
    let Affinity { backend, incarnation, .. } = unsafe { *kept };
    // SAFETY: as above.
    let holds = unsafe { (*kept).holds(now, header.affinity_seconds) };
    let choice = choice(header.service, backend);
    match choice {
        Some(choice) if holds && choice.incarnation == incarnation => {
            // SAFETY: an aligned word.
            unsafe { (*kept).last_nanoseconds = now };
            Some(choice)
        }
        Some(_) | None => {
            count::reason(Reason::AffinityMiss);
            None
        }
    }
}

#[inline(always)]
fn remember(ctx: &SockAddrContext, header: &Header, choice: &Choice) {
    if header.affinity_seconds == 0 {
        return;
    }
    let key = AffinityKey { client: client(ctx), service: header.service, zero: 0 };
    let value =
        Affinity { backend: choice.backend, incarnation: choice.incarnation, last_nanoseconds: now() };
    if AFFINITY.insert(&key, &value, u64::from(BPF_ANY)).is_err() {
        count::reason(Reason::FlowsFull);
    }
}

/// The client, as affinity means it: what has one address. Known before the socket has any.
#[inline(always)]
pub(crate) fn client(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a valid context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: takes nothing, gives a number.
    unsafe { bpf_get_prandom_u32() }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes nothing, gives a number.
    unsafe { bpf_ktime_get_ns() }
}
