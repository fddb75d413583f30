//! Copies what a map holds into one of another size or of a longer value, when the layout has changed.
//!
//! Values only ever grow at their end, so an old value is the head of a new one, and the rest is zero.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::maps::{MapData, MapInfo};

use super::object::{MapKind, MapSpec};
use super::sys::RawMap;

/// What is pinned, compared with what is wanted.
#[derive(Debug, PartialEq, Eq)]
pub enum Pinned {
    /// Nothing.
    Absent,
    /// As wanted.
    Same,
    /// With another layout; its bytes of a key and of a value, and its size.
    Differs {
        /// Of the same type and key: its contents can be copied.
        alike: bool,
        /// Bytes of a value.
        value: u32,
        /// Most entries.
        entries: u32,
    },
}

/// Looks at the pin.
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
    Ok(Pinned::Differs { alike: kind == spec.kind as u32 && key == spec.key, value, entries })
}

/// Copies all entries of the map at `from`, whose values have `value` bytes, to the one at `to`; how many there were.
///
/// Arrays are copied up to the smaller of the two sizes: the caller has made sure that what is in use fits.
pub fn copy(from: &Path, to: &Path, spec: &MapSpec, value: u32) -> Result<usize> {
    if spec.kind == MapKind::SocketStorage {
        bail!("the records of open sockets cannot be copied");
    }
    if value > spec.value {
        bail!("values of {value} bytes do not fit into {}", spec.value);
    }
    let (old, new) = (MapData::from_pin(from)?, MapData::from_pin(to)?);
    let cpus = if spec.kind.per_cpu() { aya::util::nr_cpus().map_err(|(_, error)| error)? } else { 1 };
    // The kernel pads values for each CPU to eight bytes.
    let stride =
        |size: u32| if spec.kind.per_cpu() { size.next_multiple_of(8) as usize } else { size as usize };
    let source = RawMap { fd: old.fd().as_fd(), key: spec.key as usize, value: stride(value) * cpus };
    let target = RawMap { fd: new.fd().as_fd(), key: spec.key as usize, value: stride(spec.value) * cpus };
    let mut copied = 0;
    let mut key = source.next(None)?;
    while let Some(at) = key {
        if let Some(bytes) = source.get(&at)? {
            match target.set(&at, &widen(&bytes, stride(value), stride(spec.value))) {
                Ok(()) => copied += 1,
                // An array that has become smaller ends here.
                Err(error) if spec.kind.array() && error.raw_os_error() == Some(libc::E2BIG) => break,
                Err(error) => return Err(full(error, spec)),
            }
        }
        key = source.next(Some(&at))?;
    }
    Ok(copied)
}

fn widen(bytes: &[u8], from: usize, to: usize) -> Vec<u8> {
    let mut wide = Vec::with_capacity(bytes.len() / from * to);
    for value in bytes.chunks(from) {
        wide.extend_from_slice(value);
        wide.resize(wide.len() + to - from, 0);
    }
    wide
}

fn full(error: io::Error, spec: &MapSpec) -> anyhow::Error {
    anyhow::Error::new(error).context(format!(
        "the pinned map {} does not fit into {} entries; use at least its former size",
        spec.name, spec.entries
    ))
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
