//! A service's backends as a tree of pages: published whole, changed by copying only what changed.
//!
//! [`Pointer`] names the root page and its generation. Pages are never written after they are published; an update writes
//! new pages for what changed, then the pointer (one 8-byte store), and reuses the old pages later. So a reader sees either
//! the old service or the new one, and a change of one endpoint among thousands costs as many writes as the tree is deep.
//!
//! Entries carry cumulative weights: choosing a backend is one descent to a position below the total, whatever the
//! algorithm that chose the position.

use super::ServiceKey;

/// Entries of a page. A power of two, so that a search can mask its index instead of testing it.
pub const ENTRIES: usize = 64;
/// Levels of a tree at most: 64³ = 262,144 entries.
pub const MAX_DEPTH: u32 = 3;

/// How a position is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Algorithm {
    /// By weight, at random.
    WeightedRandom = 0,
    /// In turn, by weight.
    RoundRobin = 1,
    /// The less loaded of two chosen at random.
    LeastConnections = 2,
    /// By consistent hash of the client; the tree holds a Maglev table.
    Maglev = 3,
}

impl Algorithm {
    /// By number; an unknown one is [`Algorithm::WeightedRandom`], which every tree can serve.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::RoundRobin,
            2 => Self::LeastConnections,
            3 => Self::Maglev,
            _ => Self::WeightedRandom,
        }
    }

    /// Its name in `meshctl`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::WeightedRandom => "weighted-random",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::Maglev => "maglev",
        }
    }
}

/// What a service key leads to: the root page in the low half, its generation in the high half. One word, so that a
/// concurrent reader sees the old value or the new one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pointer(pub u64);

impl Pointer {
    /// A pointer to `page`.
    pub const fn new(page: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | page as u64)
    }

    /// The root page.
    #[inline(always)]
    pub const fn page(self) -> u32 {
        self.0 as u32
    }

    /// The generation that the root page must have.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The head of a page; all of it but `depth` and `used` is zero on pages that are no root.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Header {
    /// The service port that this tree belongs to: a reader that was led here by a stale pointer notices.
    pub key: ServiceKey,
    /// Number of the service port, from 1.
    pub service: u32,
    /// Raised by each publication.
    pub generation: u32,
    /// Sum of all weights; 0: no backend, refuse.
    pub total: u32,
    /// Round robin: step between positions, without a common divisor with `total`, so that heavy backends are interleaved.
    pub stride: u32,
    /// Seconds that a client keeps its backend; 0: no affinity.
    pub affinity_seconds: u32,
    /// [`Algorithm`] by number.
    pub algorithm: u8,
    /// Levels from this page down: 1 is a leaf.
    pub depth: u8,
    /// Entries in use.
    pub used: u8,
    /// Zero.
    pub zero: u8,
    /// For later use; zero.
    pub reserved: [u8; 20],
}
const _: () = assert!(size_of::<Header>() == 64);

/// A child and the sum of weights up to and including it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Backend number in a leaf, page number above.
    pub child: u32,
    /// Positions below this, and not below the entry before, belong to this child; `u32::MAX` in entries not in use.
    pub upto: u32,
}

impl Entry {
    /// An entry not in use.
    pub const NONE: Self = Self { child: 0, upto: u32::MAX };
}

/// One page of a tree.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// Its head.
    pub header: Header,
    /// Its children.
    pub entries: [Entry; ENTRIES],
}
const _: () = assert!(size_of::<Page>() == 576);

impl Default for Page {
    fn default() -> Self {
        Self { header: Header::default(), entries: [Entry::NONE; ENTRIES] }
    }
}
