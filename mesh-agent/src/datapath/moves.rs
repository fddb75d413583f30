//! What becomes of each pinned map when an agent starts: kept, copied into one of another layout, or begun anew. Pure.

use mesh_common::abi::map;

use super::object::{MapKind, MapSpec};

/// What is pinned, compared with what is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pinned {
    /// Nothing.
    Absent,
    /// As wanted.
    Same,
    /// With another layout.
    Differs {
        /// Of the same type and key: its contents can be copied.
        alike: bool,
        /// Bytes of a value.
        value: u32,
    },
}

/// What becomes of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// It stays, or is made where none is.
    Keep,
    /// A new one takes its place, with its contents; values had this many bytes.
    Copy {
        /// Bytes of a value.
        value: u32,
    },
    /// A new one takes its place, empty.
    Empty,
}

/// A map that an older agent cannot use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the pinned map {map} has values of {found} bytes, this agent knows {known}: a newer agent wrote it; use that, or `mesh-agent uninstall` first"
)]
pub struct TooNew {
    map: &'static str,
    found: u32,
    known: u32,
}

/// Maps that refer to each other by number. Programs that still run on some of them must not meet new ones beside them.
const TREES: [&str; 3] = [map::SERVICES, map::PAGES, map::BACKENDS];
/// Maps that are filed under the numbers of [`TREES`].
const BY_NUMBER: [&str; 2] = [map::LOADS, map::COUNTERS];

/// Decides for all maps, in the order given.
pub fn plan(pinned: &[(MapSpec, Pinned)]) -> Result<Vec<(MapSpec, Move)>, TooNew> {
    let mut moves = Vec::with_capacity(pinned.len());
    for (spec, pinned) in pinned {
        let planned = match *pinned {
            Pinned::Absent | Pinned::Same => Move::Keep,
            Pinned::Differs { alike: true, value } if value > spec.value => {
                return Err(TooNew { map: spec.name, found: value, known: spec.value });
            }
            // The records of open sockets cannot be listed, listeners go with the agent that has them, and what is in a ring has been told or is
            // lost.
            Pinned::Differs { alike: true, value }
                if !matches!(
                    spec.kind,
                    MapKind::SocketStorage | MapKind::SocketHash | MapKind::RingBuffer
                ) =>
            {
                Move::Copy { value }
            }
            Pinned::Differs { .. } => Move::Empty,
        };
        moves.push((*spec, planned));
    }
    let of_tree = |name: &str| TREES.contains(&name);
    let absent = pinned.iter().filter(|(spec, state)| of_tree(spec.name) && *state == Pinned::Absent).count();
    let together = moves.iter().any(|(spec, planned)| of_tree(spec.name) && *planned != Move::Keep);
    let anew = moves.iter().any(|(spec, planned)| of_tree(spec.name) && *planned == Move::Empty)
        || (1..TREES.len()).contains(&absent);
    for ((spec, planned), (_, state)) in moves.iter_mut().zip(pinned) {
        if *state == Pinned::Absent {
            continue;
        }
        if anew && (of_tree(spec.name) || BY_NUMBER.contains(&spec.name)) {
            *planned = Move::Empty;
        } else if together && of_tree(spec.name) && *planned == Move::Keep {
            *planned = Move::Copy { value: spec.value };
        }
    }
    Ok(moves)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MapSizes;
    use crate::datapath::object;

    const SIZES: MapSizes = MapSizes {
        services: 8,
        backends: 8,
        pages: 8,
        workloads: 8,
        affinity: 8,
        udp_flows: 8,
        counters: 8,
        peers: 8,
        passages: 8,
        verdicts: 8,
    };

    /// The maps that do not stay, where `change` says what is pinned of some and the others are as wanted.
    fn check(change: &[(&str, Pinned)]) -> Result<Vec<(&'static str, Move)>, TooNew> {
        let state =
            |name: &str| change.iter().find(|(n, _)| *n == name).map_or(Pinned::Same, |(_, state)| *state);
        let pinned: Vec<_> = object::maps(&SIZES).into_iter().map(|spec| (spec, state(spec.name))).collect();
        let moves = plan(&pinned)?;
        Ok(moves.into_iter().filter(|(_, m)| *m != Move::Keep).map(|(spec, m)| (spec.name, m)).collect())
    }

    #[test]
    fn what_is_as_wanted_stays() {
        assert_eq!(check(&[]), Ok(vec![]));
    }

    #[test]
    fn a_map_by_itself_moves_by_itself() {
        let differs = Pinned::Differs { alike: true, value: 40 };
        assert_eq!(check(&[(map::COUNTERS, differs)]), Ok(vec![(map::COUNTERS, Move::Copy { value: 40 })]));
    }

    #[test]
    fn the_maps_of_the_trees_move_together() {
        let moved = check(&[(map::PAGES, Pinned::Differs { alike: true, value: 576 })]).unwrap();
        assert_eq!(
            moved,
            [
                (map::SERVICES, Move::Copy { value: 8 }),
                (map::PAGES, Move::Copy { value: 576 }),
                (map::BACKENDS, Move::Copy { value: 32 }),
            ]
        );
    }

    #[test]
    fn trees_that_cannot_be_copied_begin_anew_with_all_that_is_filed_under_their_numbers() {
        for odd in [Pinned::Differs { alike: false, value: 8 }, Pinned::Absent] {
            let moved = check(&[(map::PAGES, odd)]).unwrap();
            let names: Vec<_> = moved.iter().map(|(name, _)| *name).collect();
            for name in [map::SERVICES, map::BACKENDS, map::LOADS, map::COUNTERS] {
                assert!(names.contains(&name), "{name} of {names:?}");
            }
            assert!(moved.iter().all(|(_, planned)| *planned == Move::Empty));
        }
    }

    #[test]
    fn an_older_agent_leaves_what_it_does_not_know() {
        let longer = Pinned::Differs { alike: true, value: 64 };
        let refusal = check(&[(map::COUNTERS, longer)]).unwrap_err().to_string();
        assert!(refusal.contains("COUNTERS has values of 64 bytes, this agent knows 48"), "{refusal}");
    }

    #[test]
    fn records_of_sockets_are_never_copied() {
        let differs = Pinned::Differs { alike: true, value: 64 };
        assert_eq!(check(&[(map::SOCKETS, differs)]), Ok(vec![(map::SOCKETS, Move::Empty)]));
    }
}
