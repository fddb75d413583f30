//! Policy as the kernel knows it: the agent evaluates every case that can occur and writes down the outcome.
//!
//! A set of policies (those that apply to one workload, or to several alike) has a number. Its verdict depends on who comes and on the
//! port, and only on ports that a policy names: all others are alike, and stand under port 0.

use super::{Address, Endpoint};

/// Who comes, known by its cgroup: a workload of this node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct VerdictKey {
    /// Identity of the source; never 0.
    pub source: u64,
    /// Number of the set; never 0.
    pub policies: u32,
    /// The workload's port, host order; 0: any that no policy of the set names.
    pub port: u16,
    /// 4 or 6: the family of the addresses.
    pub family: u16,
}
const _: () = assert!(size_of::<VerdictKey>() == 16);

/// Who comes without an identity, known by its address only: what follows the prefix length in a key of the trie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct PlainKey {
    /// Number of the set; never 0.
    pub policies: u32,
    /// As in [`VerdictKey`].
    pub port: u16,
    /// Zero.
    pub zero: u16,
    /// Address of the source.
    pub source: Address,
}
const _: () = assert!(size_of::<PlainKey>() == 24);

impl PlainKey {
    /// Bits before the address: they always match as a whole.
    pub const FIXED_BITS: u32 = 64;
    /// All bits: what is looked up.
    pub const BITS: u32 = Self::FIXED_BITS + 128;
    /// Prefix of mapped IPv4 addresses.
    pub const V4_BITS: u32 = 96;
}

/// The outcome.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Verdict {
    /// Number of the policy that decides; 0: none does by itself (no ALLOW policy exists, or none matches).
    pub policy: u32,
    /// The rule of it, counted from 0.
    pub rule: u16,
    /// [`Verdict::ALLOW`]; anything else denies. 0, which no map holds: there is no verdict.
    pub action: u16,
}
const _: () = assert!(size_of::<Verdict>() == 8);

impl Verdict {
    /// The connection may be.
    pub const ALLOW: u16 = 1;
    /// It may not.
    pub const DENY: u16 = 2;

    /// Whether there is none.
    #[inline(always)]
    pub const fn is_missing(&self) -> bool {
        self.action == 0
    }

    /// Whether the connection may be.
    #[inline(always)]
    pub const fn allows(&self) -> bool {
        self.action == Self::ALLOW
    }
}

/// A connection that was refused by policy, or let in where policies in dry run apply: what the kernel tells the agent.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Denial {
    /// Identity of the source; 0: not known.
    pub source_workload: u64,
    /// Identity of the destination.
    pub destination_workload: u64,
    /// Address of the source; its port is 0 where the source had none yet.
    pub source: Endpoint,
    /// Where it wanted to go: the workload's address and port.
    pub destination: Endpoint,
    /// Number of the set of policies.
    pub policies: u32,
    /// The verdict; all zero: there is none, and a missing verdict refuses, where any policy is in force.
    pub verdict: Verdict,
    /// [`Denial::CLIENT`], [`Denial::SERVER`] or [`Denial::ADMITTED`].
    pub side: u32,
}
const _: () = assert!(size_of::<Denial>() == 72);

impl Denial {
    /// Refused where the client runs, in `connect()`.
    pub const CLIENT: u32 = 1;
    /// Refused where the server runs, before it was accepted.
    pub const SERVER: u32 = 2;
    /// Let in where the server runs: no denial, unless policies in dry run would have refused it.
    pub const ADMITTED: u32 = 3;
}
