//! Copies what a map holds into one of another size or of a longer value, when the layout has changed.
//!
//! Values only ever grow at their end, so an old value is the head of a new one, and the rest is zero. The programs in force
//! write to the old map until they are exchanged; what they counted meanwhile is added afterwards.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{MapData, MapInfo};
use mesh_common::abi::map;

use super::moves::Pinned;
use super::object::{MapKind, MapSpec};
use super::sys::RawMap;

/// A map of which another has taken the place.
pub struct Former {
    spec: MapSpec,
    value: u32,
    old: MapData,
    new: MapData,
    copied: HashMap<Vec<u8>, Vec<u8>>,
}

/// Looks at a pin.
pub fn look(path: &Path, spec: &MapSpec) -> Result<Pinned> {
    if !path.exists() {
        return Ok(Pinned::Absent);
    }
    let info =
        MapInfo::from_pin(path).with_context(|| format!("reading the pinned map {}", path.display()))?;
    let kind = info.map_type().map(|kind| kind as u32).unwrap_or_default();
    let (key, value, entries) = (info.key_size(), info.value_size(), info.max_entries());
    if (kind, key, value, entries) == (spec.kind as u32, spec.key, spec.value, spec.entries) {
        return Ok(Pinned::Same);
    }
    Ok(Pinned::Differs { alike: kind == spec.kind as u32 && key == spec.key, value })
}

/// How many entries the map at `path` has.
pub fn count(path: &Path, spec: &MapSpec) -> Result<usize> {
    let data = MapData::from_pin(path)?;
    let map = RawMap { fd: data.fd().as_fd(), key: spec.key as usize, value: 0 };
    let mut count = 0;
    let mut key = map.next(None)?;
    while let Some(at) = key {
        count += 1;
        key = map.next(Some(&at))?;
    }
    Ok(count)
}

impl Former {
    /// Copies all entries of the map at `from`, whose values have `value` bytes, to the one at `to`.
    ///
    /// Arrays are copied up to the smaller of the two sizes: the caller has made sure that what is in use fits.
    pub fn copy(from: &Path, to: &Path, spec: &MapSpec, value: u32) -> Result<Self> {
        let (old, new) = (MapData::from_pin(from)?, MapData::from_pin(to)?);
        let mut former = Self { spec: *spec, value, old, new, copied: HashMap::new() };
        let mut copied = HashMap::new();
        let counts = spec.name == map::LOADS || spec.name == map::COUNTERS;
        former.each(|former, key, bytes| {
            let wide = widen(&bytes, former.stride(value), former.stride(spec.value));
            former.target()?.set(&key, &wide)?;
            if counts && bytes.iter().any(|byte| *byte != 0) {
                copied.insert(key, bytes);
            }
            Ok(())
        })?;
        former.copied = copied;
        Ok(former)
    }

    /// Adds what came into the old map since it was copied. Nothing writes to it any more.
    pub fn settle(&self) -> Result<()> {
        if self.spec.kind == MapKind::LruHash {
            let wide = |bytes: &[u8]| widen(bytes, self.value as usize, self.spec.value as usize);
            return self.each(|former, key, bytes| former.target()?.add(&key, &wide(&bytes)));
        }
        if self.spec.name != map::LOADS && self.spec.name != map::COUNTERS {
            return Ok(());
        }
        self.each(|former, key, bytes| {
            let before = former.copied.get(&key);
            if before == Some(&bytes) || (before.is_none() && bytes.iter().all(|byte| *byte == 0)) {
                return Ok(());
            }
            let wide =
                |bytes: &[u8]| widen(bytes, former.stride(former.value), former.stride(former.spec.value));
            let (then, now) = (before.map(|bytes| wide(bytes)), wide(&bytes));
            let target = former.target()?;
            let current = target.get(&key)?;
            let sum = |at: usize| {
                let of = |bytes: Option<&Vec<u8>>| bytes.map_or(0, |bytes| word(bytes, at));
                of(current.as_ref()).wrapping_add(word(&now, at)).wrapping_sub(of(then.as_ref()))
            };
            let added: Vec<u8> = (0..now.len() / 8).flat_map(|at| sum(at).to_ne_bytes()).collect();
            target.set(&key, &added)
        })
    }

    /// Calls `each` for all entries of the old map, or up to where the new one ends.
    fn each(&self, mut each: impl FnMut(&Self, Vec<u8>, Vec<u8>) -> io::Result<()>) -> Result<()> {
        let size = self.stride(self.value) * self.cpus()?;
        let source = RawMap { fd: self.old.fd().as_fd(), key: self.spec.key as usize, value: size };
        let mut key = source.next(None)?;
        while let Some(at) = key {
            key = source.next(Some(&at))?;
            let Some(bytes) = source.get(&at)? else { continue };
            match each(self, at, bytes) {
                Ok(()) => {}
                Err(error) if self.spec.kind.array() && error.raw_os_error() == Some(libc::E2BIG) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn target(&self) -> io::Result<RawMap<'_>> {
        let value = self.stride(self.spec.value) * self.cpus()?;
        Ok(RawMap { fd: self.new.fd().as_fd(), key: self.spec.key as usize, value })
    }

    /// The kernel pads values for each CPU to eight bytes.
    fn stride(&self, size: u32) -> usize {
        if self.spec.kind.per_cpu() { size.next_multiple_of(8) as usize } else { size as usize }
    }

    fn cpus(&self) -> io::Result<usize> {
        if self.spec.kind.per_cpu() { aya::util::nr_cpus().map_err(|(_, error)| error) } else { Ok(1) }
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    if let Some(found) = bytes.get(at * 8..at * 8 + 8) {
        word.copy_from_slice(found);
    }
    u64::from_ne_bytes(word)
}

fn widen(bytes: &[u8], from: usize, to: usize) -> Vec<u8> {
    let mut wide = Vec::with_capacity(bytes.len() / from * to);
    for value in bytes.chunks(from) {
        wide.extend_from_slice(value);
        wide.resize(wide.len() + to - from, 0);
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::widen;

    #[test]
    fn a_longer_value_keeps_its_head_on_every_cpu() {
        assert_eq!(widen(&[1, 2, 3, 4], 2, 3), [1, 2, 0, 3, 4, 0]);
        assert_eq!(widen(&[1, 2], 2, 2), [1, 2]);
    }
}
