//! The decisions of balancing, as functions without side effects: the kernel programs call them, and tests run them on the
//! host against the trees that the agent builds.

use super::{ENTRIES, Entry, MAX_DEPTH, Page};

/// Position by a random number, each of equal chance.
#[inline(always)]
pub const fn random_position(random: u32, total: u32) -> u32 {
    ((random as u64 * total as u64) >> 32) as u32
}

/// Position of the `turn`-th connection.
#[inline(always)]
pub const fn round_robin_position(turn: u64, stride: u32, total: u32) -> u32 {
    if total == 0 {
        return 0;
    }
    // The turn is reduced first, so that the product cannot overflow.
    (((turn % total as u64) * stride as u64) % total as u64) as u32
}

/// Position in a Maglev table of `total` slots, the same for the same client.
#[inline(always)]
pub const fn maglev_position(client: u64, total: u32) -> u32 {
    if total == 0 {
        return 0;
    }
    // Finalizer of SplitMix64: clients with neighbouring numbers must not share slots.
    let mut x = client.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) % total as u64) as u32
}

/// The backend at `position` of the tree under `root`; `None` if the tree is broken.
///
/// Six probes a level: entries are searched by halving.
#[inline(always)]
pub fn descend<'a>(root: &'a Page, position: u32, page: impl Fn(u32) -> Option<&'a Page>) -> Option<u32> {
    let mut node = root;
    let mut rest = position;
    for _ in 0..MAX_DEPTH {
        let (entry, before) = find(&node.entries, rest)?;
        if entry.upto == u32::MAX {
            return None;
        }
        if node.header.depth <= 1 {
            return Some(entry.child);
        }
        rest -= before;
        node = page(entry.child)?;
    }
    None
}

/// The first entry that reaches beyond `position`, and the sum of weights before it.
///
/// Without a branch: the verifier walks both sides of each, and six in a row at three levels are a quarter of a million
/// ways; nor does a processor guess half of them wrong.
#[inline(always)]
fn find(entries: &[Entry; ENTRIES], position: u32) -> Option<(Entry, u32)> {
    let mut index = 0usize;
    let mut before = 0u32;
    let mut step = ENTRIES / 2;
    while step > 0 {
        let upto = entries[masked(index + step - 1)].upto;
        let below = core::hint::black_box(is_at_most(upto, position)) & 1;
        index += below as usize * step;
        let mask = 0u32.wrapping_sub(below);
        before = (before & !mask) | (upto & mask);
        step /= 2;
    }
    let entry = entries[masked(index)];
    // The search cannot pass the last entry; if that is not beyond the position, none is.
    (entry.upto > position).then_some((entry, before))
}

/// The index as it is, in a form whose bounds every verifier sees: before Linux 6.9 it loses them where the compiler adds by
/// `or`, and the compiler drops a mask that it knows to be needless.
#[inline(always)]
fn masked(index: usize) -> usize {
    core::hint::black_box(index) & (ENTRIES - 1)
}

/// 1 if `a <= b`, else 0.
#[inline(always)]
const fn is_at_most(a: u32, b: u32) -> u32 {
    ((a as u64).wrapping_sub(b as u64 + 1) >> 63) as u32
}

/// Client affinity: who, at which service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AffinityKey {
    /// The client's network namespace cookie: what one pod, or the host, has as one address.
    pub client: u64,
    /// Service number.
    pub service: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<AffinityKey>() == 16);

/// The backend that a client keeps.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Affinity {
    /// Backend number.
    pub backend: u32,
    /// Its incarnation.
    pub incarnation: u32,
    /// When the client last connected, in nanoseconds of the monotonic clock.
    pub last_nanoseconds: u64,
}
const _: () = assert!(size_of::<Affinity>() == 16);

impl Affinity {
    /// Whether it still holds at `now`.
    #[inline(always)]
    pub const fn holds(&self, now_nanoseconds: u64, timeout_seconds: u32) -> bool {
        now_nanoseconds.saturating_sub(self.last_nanoseconds) < timeout_seconds as u64 * 1_000_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(weights: &[u32], first_child: u32) -> Page {
        let mut page = Page::default();
        page.header.depth = 1;
        let mut sum = 0;
        for (i, weight) in weights.iter().enumerate() {
            sum += weight;
            page.entries[i] = Entry { child: first_child + i as u32, upto: sum };
        }
        page
    }

    #[test]
    fn each_position_leads_to_its_weighted_backend() {
        let page = leaf(&[1, 3, 2], 7);
        let picked: [u32; 6] =
            core::array::from_fn(|position| descend(&page, position as u32, |_| None).unwrap());
        assert_eq!(picked, [7, 8, 8, 8, 9, 9]);
        assert_eq!(descend(&page, 6, |_| None), None, "beyond the total");
    }

    #[test]
    fn a_full_leaf_is_searched_to_its_last_entry() {
        let page = leaf(&[1; ENTRIES], 100);
        for position in 0..ENTRIES as u32 {
            assert_eq!(descend(&page, position, |_| None), Some(100 + position));
        }
    }

    #[test]
    fn two_levels_descend_and_a_missing_page_is_broken() {
        let leaves = [leaf(&[2; ENTRIES], 1000), leaf(&[5, 1], 2000)];
        let mut root = Page::default();
        root.header.depth = 2;
        root.entries[0] = Entry { child: 0, upto: 128 };
        root.entries[1] = Entry { child: 1, upto: 134 };
        let page = |number: u32| leaves.get(number as usize);
        assert_eq!(descend(&root, 127, page), Some(1063));
        assert_eq!(descend(&root, 132, page), Some(2000));
        assert_eq!(descend(&root, 133, page), Some(2001));
        assert_eq!(descend(&root, 134, page), None);
        assert_eq!(descend(&root, 0, |_| None), None);
    }

    #[test]
    fn a_cycle_ends() {
        let mut root = Page::default();
        root.header.depth = 2;
        root.entries[0] = Entry { child: 0, upto: 1 };
        assert_eq!(descend(&root, 0, |_| Some(&root)), None);
    }

    #[test]
    fn positions_stay_below_the_total() {
        for total in [1, 2, 3, 56, 1000, u32::MAX - 1] {
            assert_eq!(random_position(0, total), 0);
            assert!(random_position(u32::MAX, total) < total);
            assert!(round_robin_position(u64::MAX, total - 1, total) < total);
            assert!(maglev_position(u64::MAX, total) < total);
        }
        assert_eq!((round_robin_position(5, 1, 0), maglev_position(5, 0)), (0, 0));
    }

    #[test]
    fn round_robin_with_a_coprime_stride_visits_every_position_once() {
        let mut seen = [false; 10];
        for turn in 0..10 {
            seen[round_robin_position(turn, 7, 10) as usize] = true;
        }
        assert!(seen.iter().all(|seen| *seen));
    }

    #[test]
    fn affinity_ends_at_its_timeout() {
        let affinity = Affinity { last_nanoseconds: 5_000_000_000, ..Affinity::default() };
        assert!(affinity.holds(7_999_999_999, 3));
        assert!(!affinity.holds(8_000_000_000, 3));
    }
}
