//! Maglev tables (Eisenbud et al., NSDI 2016), with weights: each backend walks its own permutation of the slots and takes
//! free ones in turn, so that a backend that comes or goes moves few slots of the others.

use mesh_common::abi::{ENTRIES, Endpoint};

/// Slots of a table: a prime. Fixed up to 400 backends, since a change of the size moves every slot.
const SMALL: usize = 4_093;
/// Slots of a table of more backends.
const LARGE: usize = 16_381;

/// The table of `backends` (endpoint, weight): for each slot the index of its backend. Empty without backends.
///
/// Permutations come from the endpoint, so that all nodes agree.
pub fn table(backends: &[(Endpoint, u32)]) -> Vec<usize> {
    if backends.is_empty() {
        return Vec::new();
    }
    let size = if backends.len() <= 400 { SMALL } else { LARGE };
    let heaviest = backends.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(1);
    let mut walks: Vec<Walk> = backends.iter().map(|(endpoint, _)| Walk::new(endpoint, size)).collect();
    let mut credit = vec![0u64; backends.len()];
    let mut slots = vec![usize::MAX; size];
    let mut filled = 0;
    loop {
        for (index, walk) in walks.iter_mut().enumerate() {
            // A backend of half the weight of the heaviest takes a slot every second round.
            credit[index] += u64::from(backends[index].1);
            if credit[index] < heaviest {
                continue;
            }
            credit[index] -= heaviest;
            while slots[walk.at] != usize::MAX {
                walk.step(size);
            }
            slots[walk.at] = index;
            filled += 1;
            if filled == size {
                return slots;
            }
        }
    }
}

struct Walk {
    at: usize,
    skip: usize,
}

impl Walk {
    fn new(endpoint: &Endpoint, size: usize) -> Self {
        let size = size as u64;
        Self {
            at: (hash(endpoint, 0x51_7c_c1_b7_27_22_0a_95) % size) as usize,
            skip: (hash(endpoint, 0x2d_35_8d_cc_aa_6c_78_a5) % (size - 1) + 1) as usize,
        }
    }

    fn step(&mut self, size: usize) {
        self.at = (self.at + self.skip) % size;
    }
}

/// FNV-1a with a seed and a final mix; the same on every node and in every version.
fn hash(endpoint: &Endpoint, seed: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed;
    for byte in endpoint.address().bytes().into_iter().chain(endpoint.port().to_be_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ hash >> 33
}

const _: () = assert!(LARGE <= ENTRIES * ENTRIES * ENTRIES);

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::abi::Address;

    fn backends(count: u8, weight: u32) -> Vec<(Endpoint, u32)> {
        (0..count).map(|i| (Endpoint::new(Address::from_v4([10, 0, 0, i]), 80), weight)).collect()
    }

    fn shares(table: &[usize], count: usize) -> Vec<usize> {
        (0..count).map(|index| table.iter().filter(|slot| **slot == index).count()).collect()
    }

    #[test]
    fn equal_weights_share_equally() {
        for share in shares(&table(&backends(10, 1)), 10) {
            assert!(share.abs_diff(SMALL / 10) <= 1, "{share}");
        }
    }

    #[test]
    fn weights_are_kept() {
        let mut list = backends(2, 1);
        list[1].1 = 3;
        let shares = shares(&table(&list), 2);
        assert!(shares[0].abs_diff(SMALL / 4) <= 2, "{shares:?}");
    }

    #[test]
    fn a_backend_that_goes_moves_few_slots_of_the_others() {
        let before = table(&backends(10, 1));
        let after = table(&backends(9, 1));
        let moved = before.iter().zip(&after).filter(|(b, a)| **b != 9 && b != a).count();
        assert!(moved < SMALL / 10, "{moved} of {SMALL} slots moved without need");
    }

    #[test]
    fn none_is_empty_and_one_has_all() {
        assert!(table(&[]).is_empty());
        assert!(table(&backends(1, 7)).iter().all(|slot| *slot == 0));
    }
}
