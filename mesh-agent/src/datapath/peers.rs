//! What the kernel knows of the workloads of the mesh, of this node's proxy, and of policy.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError};
use mesh_common::abi::{Address, Peer, PlainKey, Proxy, Verdict, VerdictKey, map};

use super::maps::{gone, open};
use super::pins::Pins;

/// The maps `PEERS`, `PROXIES`, `VERDICTS` and `PLAIN_VERDICTS`, with what is in the first two.
pub struct Peers {
    peers: HashMap<MapData, Address, Peer>,
    proxies: HashMap<MapData, u64, Proxy>,
    verdicts: HashMap<MapData, VerdictKey, Verdict>,
    plain: LpmTrie<MapData, PlainKey, Verdict>,
    /// Whose address is whose, as the kernel has it.
    owners: BTreeMap<Address, Peer>,
    /// Addresses of each workload, by identity.
    addresses: BTreeSet<(u64, Address)>,
    local: BTreeMap<u64, Proxy>,
    /// Addresses of this node that policies apply to.
    guarded: usize,
}

impl Peers {
    /// Opens what is pinned. No proxy is ready: whoever was has gone with the agent before this one.
    pub fn open(pins: &Pins) -> Result<Self> {
        let open = |name| open(pins, name);
        let peers: HashMap<_, Address, Peer> = open(map::PEERS)?.try_into()?;
        let mut proxies: HashMap<_, u64, Proxy> = open(map::PROXIES)?.try_into()?;
        let verdicts: HashMap<_, VerdictKey, Verdict> = open(map::VERDICTS)?.try_into()?;
        let plain: LpmTrie<_, PlainKey, Verdict> = open(map::PLAIN_VERDICTS)?.try_into()?;
        let owners: BTreeMap<_, _> = peers.iter().collect::<Result<_, _>>().context("reading PEERS")?;
        let mut local: BTreeMap<u64, Proxy> =
            proxies.iter().collect::<Result<_, _>>().context("reading PROXIES")?;
        for (workload, proxy) in &mut local {
            proxy.flags &= !Proxy::READY;
            proxies.insert(workload, *proxy, 0).context("writing PROXIES")?;
        }
        let addresses = owners.iter().map(|(address, peer)| (peer.workload, *address)).collect();
        let guarded = owners.values().filter(|peer| is_guarded(peer)).count();
        Ok(Self { peers, proxies, verdicts, plain, owners, addresses, local, guarded })
    }

    /// Whose an address is from now on; `None`: nobody's.
    pub fn set(&mut self, address: Address, peer: Option<Peer>) -> Result<(), MapError> {
        let before = self.owners.get(&address).copied();
        if before == peer {
            return Ok(());
        }
        match peer {
            Some(peer) => {
                self.peers.insert(address, peer, 0)?;
                self.owners.insert(address, peer);
                self.addresses.insert((peer.workload, address));
            }
            None => {
                gone(self.peers.remove(&address))?;
                self.owners.remove(&address);
            }
        }
        self.guarded += usize::from(peer.as_ref().is_some_and(is_guarded));
        self.guarded -= usize::from(before.as_ref().is_some_and(is_guarded));
        if let Some(before) = before.filter(|before| peer.is_none_or(|peer| peer.workload != before.workload))
        {
            self.addresses.remove(&(before.workload, address));
        }
        Ok(())
    }

    /// The addresses of a workload, as the kernel has them.
    pub fn of(&self, workload: u64) -> impl Iterator<Item = Address> {
        let all = (workload, Address::new([0; 16]))..=(workload, Address::new([0xff; 16]));
        // Addresses are ordered as words in memory, so the ends of the range are those of their order as well.
        self.addresses.range(all).map(|(_, address)| *address)
    }

    /// All addresses, as the kernel has them.
    pub fn addresses(&self) -> impl Iterator<Item = Address> {
        self.owners.keys().copied()
    }

    /// What the proxy has for a workload of this node; `None`: nothing.
    pub fn set_proxy(&mut self, workload: u64, proxy: Option<Proxy>) -> Result<(), MapError> {
        match proxy {
            Some(proxy) if self.local.get(&workload) == Some(&proxy) => {}
            Some(proxy) => {
                self.proxies.insert(workload, proxy, 0)?;
                self.local.insert(workload, proxy);
            }
            None => {
                gone(self.proxies.remove(&workload))?;
                self.local.remove(&workload);
            }
        }
        Ok(())
    }

    /// Workloads with something of the proxy, as the kernel has it.
    pub fn proxied(&self) -> impl Iterator<Item = u64> {
        self.local.keys().copied()
    }

    /// Sets or removes the verdict on a workload of this node.
    pub fn set_verdict(&mut self, key: &VerdictKey, verdict: Option<Verdict>) -> Result<(), MapError> {
        match verdict {
            Some(verdict) => self.verdicts.insert(key, verdict, 0),
            None => gone(self.verdicts.remove(key)),
        }
    }

    /// Sets or removes the verdict on clients without identity whose keys begin with `prefix` bits of this one.
    pub fn set_plain(
        &mut self,
        prefix: u32,
        key: &PlainKey,
        verdict: Option<Verdict>,
    ) -> Result<(), MapError> {
        let key = Key::new(prefix, *key);
        match verdict {
            Some(verdict) => self.plain.insert(&key, verdict, 0),
            None => gone(self.plain.remove(&key)),
        }
    }

    /// All verdicts that are in the kernel.
    pub fn verdicts(&self) -> Result<Vec<(VerdictKey, Verdict)>, MapError> {
        self.verdicts.iter().collect()
    }

    /// All verdicts by address that are in the kernel, each with the length of its prefix.
    pub fn plain_verdicts(&self) -> Result<Vec<(u32, PlainKey, Verdict)>, MapError> {
        let row = |(key, verdict): (Key<PlainKey>, Verdict)| (key.prefix_len(), key.data(), verdict);
        self.plain.iter().map(|entry| entry.map(row)).collect()
    }

    /// Numbers of sets of policies that peers in the kernel lead to.
    pub fn sets(&self) -> impl Iterator<Item = u32> {
        self.owners.values().map(|peer| peer.policies)
    }

    /// Whether policies apply to a workload of this node.
    pub fn is_guarded(&self) -> bool {
        self.guarded > 0
    }

    /// Entries of `PEERS` and `PROXIES`.
    pub fn filled(&self) -> (usize, usize) {
        (self.owners.len(), self.local.len())
    }
}

fn is_guarded(peer: &Peer) -> bool {
    peer.is_local() && peer.policies != 0
}
