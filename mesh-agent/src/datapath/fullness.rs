//! How full the maps are.

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{HashMap, MapData, MapError, SockHash};
use mesh_common::abi::{
    Affinity, AffinityKey, Caller, CallerKey, ClientKey, Endpoint, FlowKey, FlowValue, ListenerKey, Original,
    OriginalKey, PlainKey, Verdict, VerdictKey, map,
};

use super::Datapath;
use super::maps::open;
use super::pins::Pins;

/// How full a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fullness {
    /// The map.
    pub name: &'static str,
    /// Entries in use.
    pub entries: usize,
    /// Its size.
    pub capacity: u32,
}

/// Entries of the maps that are counted from time to time, since no account of them is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    affinity: usize,
    udp_flows: usize,
    verdicts: usize,
    plain_verdicts: usize,
    originals: usize,
    callers: usize,
    clients: usize,
    listeners: usize,
    steered: usize,
}

impl Counted {
    /// Counts what is pinned: a system call for each entry.
    pub(super) fn of(pins: &Pins) -> Result<Self> {
        Ok(Self {
            affinity: entries::<AffinityKey, Affinity>(pins, map::AFFINITY)?,
            udp_flows: entries::<FlowKey, FlowValue>(pins, map::UDP_FLOWS)?,
            verdicts: entries::<VerdictKey, Verdict>(pins, map::VERDICTS)?,
            plain_verdicts: {
                let map: LpmTrie<MapData, PlainKey, Verdict> = open(pins, map::PLAIN_VERDICTS)?.try_into()?;
                count(map.keys()).context(map::PLAIN_VERDICTS)?
            },
            originals: entries::<OriginalKey, Original>(pins, map::ORIGINALS)?,
            callers: entries::<CallerKey, Caller>(pins, map::CALLERS)?,
            clients: entries::<ClientKey, Endpoint>(pins, map::CLIENTS)?,
            listeners: {
                let map: SockHash<MapData, ListenerKey> = open(pins, map::LISTENERS)?.try_into()?;
                count(map.keys()).context(map::LISTENERS)?
            },
            steered: entries::<CallerKey, u64>(pins, map::STEERED)?,
        })
    }
}

fn entries<K: Pod, V: Pod>(pins: &Pins, name: &'static str) -> Result<usize> {
    let map: HashMap<MapData, K, V> = open(pins, name)?.try_into()?;
    count(map.keys()).context(name)
}

fn count<K>(mut keys: impl Iterator<Item = Result<K, MapError>>) -> Result<usize, MapError> {
    keys.try_fold(0, |count, key| key.map(|_key| count + 1))
}

impl Datapath {
    /// Counts entries. That may block, so it is for a thread of its own; the result goes to [`Datapath::set_counted`].
    pub fn count(&self) -> impl FnOnce() -> Result<Counted> + Send + 'static {
        let pins = self.loaded.pins().clone();
        move || Counted::of(&pins)
    }

    /// Takes what [`Datapath::count`] counted.
    pub fn set_counted(&mut self, counted: Counted) {
        self.counted = counted;
    }

    /// How full each map is.
    pub fn fullness(&self) -> Vec<Fullness> {
        let (pages, backends) = self.ledger.in_use();
        let (peers, proxies) = self.peers.filled();
        let (counted, sizes) = (&self.counted, &self.sizes);
        let of = |name, entries, capacity| Fullness { name, entries, capacity };
        vec![
            of(map::SERVICES, self.ledger.entries(), sizes.services),
            of(map::PAGES, pages, sizes.pages),
            of(map::BACKENDS, backends, sizes.backends),
            of(map::WORKLOADS, self.enrolled.len() + self.found.len(), sizes.workloads),
            of(map::AFFINITY, counted.affinity, sizes.affinity),
            of(map::UDP_FLOWS, counted.udp_flows, sizes.udp_flows),
            of(map::COUNTERS, self.counters, sizes.counters),
            of(map::PEERS, peers, sizes.peers),
            of(map::PROXIES, proxies, sizes.workloads),
            of(map::VERDICTS, counted.verdicts, sizes.verdicts),
            of(map::PLAIN_VERDICTS, counted.plain_verdicts, sizes.verdicts),
            of(map::ORIGINALS, counted.originals, sizes.passages),
            of(map::CALLERS, counted.callers, sizes.passages),
            of(map::CLIENTS, counted.clients, sizes.passages),
            of(map::LISTENERS, counted.listeners, sizes.workloads.saturating_mul(2)),
            of(map::STEERED, counted.steered, sizes.passages),
        ]
    }
}
