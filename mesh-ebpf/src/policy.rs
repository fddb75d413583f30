//! Policy: the verdicts that the agent has written down, and telling it of denials.

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE};
use aya_ebpf::maps::lpm_trie::Key;
use mesh_common::abi::{Address, Denial, Endpoint, Node, Peer, PlainKey, Reason, Verdict, VerdictKey};

use crate::{
    count,
    maps::{DENIALS, NODE, PEERS, PLAIN_VERDICTS, VERDICTS},
};

/// The workload whose address it is.
#[inline(always)]
pub(crate) fn peer(address: &Address) -> Option<&'static Peer> {
    // SAFETY: sixteen bytes that are written once for an address and replaced as a whole; the programs use them at once.
    unsafe { PEERS.get(address) }
}

/// What is known of this node; before the agent has said anything, nothing is.
#[inline(always)]
pub(crate) fn node() -> Option<&'static Node> {
    NODE.get(0)
}

/// The verdict on a workload of this node that wants to reach `destination`, which is `peer`'s; it may be missing.
#[inline(always)]
pub(crate) fn of_workload(source: u64, peer: &Peer, destination: &Endpoint) -> Verdict {
    let family = if destination.address().is_v4() { 4 } else { 6 };
    let mut key = VerdictKey { source, policies: peer.policies, port: destination.port(), family };
    // SAFETY: eight aligned bytes that are read at once.
    if let Some(verdict) = unsafe { VERDICTS.get(&key) } {
        return *verdict;
    }
    key.port = 0;
    // SAFETY: as above.
    unsafe { VERDICTS.get(&key) }.copied().unwrap_or_default()
}

/// The verdict on a client without identity; it may be missing.
#[inline(always)]
pub(crate) fn of_address(source: Address, peer: &Peer, port: u16) -> Verdict {
    let data = PlainKey { policies: peer.policies, port, zero: 0, source };
    let mut key = Key::new(PlainKey::BITS, data);
    if let Some(verdict) = PLAIN_VERDICTS.get(&key) {
        return *verdict;
    }
    key.data.port = 0;
    PLAIN_VERDICTS.get(&key).copied().unwrap_or_default()
}

/// Tells the agent of a connection that was let in, for it to judge what policies in dry run would say. Half of the room is left for denials.
#[inline(always)]
pub(crate) fn rehearse(admitted: &Denial) {
    let full = DENIALS.query(u64::from(BPF_RB_AVAIL_DATA)) > DENIALS.query(u64::from(BPF_RB_RING_SIZE)) / 2;
    if full || DENIALS.output::<Denial>(admitted, 0).is_err() {
        count::reason(Reason::RehearsalLost);
    }
}

/// Tells the agent of a denial.
#[inline(always)]
pub(crate) fn tell(denial: &Denial) {
    if DENIALS.output::<Denial>(denial, 0).is_err() {
        count::reason(Reason::DenialLost);
    }
}
