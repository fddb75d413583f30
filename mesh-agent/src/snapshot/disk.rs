//! The last good snapshot on disk, for a start without the control plane.
//!
//! A file is a header (magic, format, the last change that is in it, node, whether policies are known), one record for each resource (length, then the encoded
//! `envoy.service.discovery.v3.Resource` with its version), and a trailer (an impossible length, the number of
//! records, CRC-32 of all before). It is written beside its destination, synced and renamed; it is read whole or not at all.
//! Resources are encoded again from the model when saving, so that the agent's memory holds no second copy. What has changed since lies
//! beside it ([`super::journal`]).

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_common::api::ADDRESS_TYPE;
use mesh_common::api::envoy::service::discovery::v3 as xds;
use prost::Message;

use super::authorization::Authorization;
use super::crc::Crc;
use super::decode::decode_one;
use super::encode::encode;
use super::intern::Interner;
use super::journal;
use super::state::Held;

const MAGIC: &[u8; 8] = b"MESHSNAP";
/// To be raised whenever `decode` keeps more than it did: a file without the new fields must not pass for current.
pub(super) const FORMAT: u32 = 3;
const FILE: &str = "snapshot";
const END: u32 = u32::MAX;
/// A resource is small; a longer record is damage, not data, and is not worth allocating for.
const RECORD_LIMIT: u32 = 64 << 20;

/// Why a saved snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It could not be read.
    #[error("read {}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It is damaged or not ours.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// It was written by another version of the agent.
    #[error("{} has format {found}, this agent reads {FORMAT}", path.display())]
    Format {
        /// File.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It was written on another node, so that it lacks what only this node keeps.
    #[error("{} is of node {found:?}, not of {wanted:?}", path.display())]
    OtherNode {
        /// File.
        path: PathBuf,
        /// Its node.
        found: String,
        /// This node.
        wanted: String,
    },
}

/// Where the snapshot lies in a state directory.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Saves `held` in `state_dir`, which is created if need be; returns the bytes written. Blocks: call it from a thread
/// that may.
pub fn save(state_dir: &Path, node: &str, held: &Held) -> io::Result<u64> {
    fs::create_dir_all(state_dir)?;
    let temporary = state_dir.join(format!(".{FILE}.new"));
    let file = File::create(&temporary)?;
    let mut out = Summed { inner: BufWriter::new(file), crc: Crc::new(), length: 0 };
    write(&mut out, node, held)?;
    let file = out.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, path(state_dir))?;
    File::open(state_dir)?.sync_all()?;
    Ok(out.length)
}

/// Loads what [`save`] wrote; `None` when nothing was saved.
pub fn load(state_dir: &Path, interner: &mut Interner) -> Result<Option<Held>, LoadError> {
    let path = path(state_dir);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(LoadError::Io { path, source }),
    };
    let mut input = Summed { inner: BufReader::new(file), crc: Crc::new(), length: 0 };
    read(&mut input, interner).map(Some).map_err(|bad| match bad {
        Bad::Io(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
            LoadError::Damaged { path, what: "it ends too early".to_owned() }
        }
        Bad::Io(source) => LoadError::Io { path, source },
        Bad::Content(what) => LoadError::Damaged { path, what },
        Bad::Format(found) => LoadError::Format { path, found },
        Bad::Node(found) => LoadError::OtherNode { path, found, wanted: interner.node().to_owned() },
    })
}

/// Removes the saved snapshot, and what has changed since; `false` when there was none.
pub fn remove(state_dir: &Path) -> io::Result<bool> {
    let remove = |path| match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    };
    let changes = remove(journal::path(state_dir))?;
    Ok(remove(path(state_dir))? || changes)
}

fn write(out: &mut Summed<impl Write>, node: &str, held: &Held) -> io::Result<()> {
    let too_long = |_error| io::Error::other("a record is too long");
    out.write_all(MAGIC)?;
    out.write_all(&FORMAT.to_le_bytes())?;
    out.write_all(&held.sequence.to_le_bytes())?;
    out.write_all(&u32::try_from(node.len()).map_err(too_long)?.to_le_bytes())?;
    out.write_all(node.as_bytes())?;
    out.write_all(&[u8::from(held.policies.is_some())])?;
    let mut buffer = Vec::new();
    let mut record = |resource: &xds::Resource| {
        buffer.clear();
        resource.encode(&mut buffer).map_err(io::Error::other)?;
        out.write_all(&u32::try_from(buffer.len()).map_err(too_long)?.to_le_bytes())?;
        out.write_all(&buffer)
    };
    held.resources.iter().try_for_each(|(resource, version)| record(&encode(resource, version)))?;
    let policies = held.policies.as_deref().unwrap_or_default();
    policies.iter().try_for_each(|policy| record(policy.resource()))?;
    out.write_all(&END.to_le_bytes())?;
    out.write_all(&((held.resources.len() + policies.len()) as u64).to_le_bytes())?;
    let crc = out.crc.value();
    out.write_all(&crc.to_le_bytes())
}

enum Bad {
    Io(io::Error),
    Content(String),
    Format(u32),
    Node(String),
}

impl From<io::Error> for Bad {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn read(input: &mut Summed<impl Read>, interner: &mut Interner) -> Result<Held, Bad> {
    if &array::<8>(input)? != MAGIC {
        return Err(Bad::Content("it does not begin as a snapshot".to_owned()));
    }
    let format = u32::from_le_bytes(array(input)?);
    if format != FORMAT {
        return Err(Bad::Format(format));
    }
    let sequence = u64::from_le_bytes(array(input)?);
    let mut buffer = Vec::new();
    let length = u32::from_le_bytes(array(input)?);
    record(input, length, &mut buffer)?;
    let node = String::from_utf8_lossy(&buffer).into_owned();
    let [known] = array::<1>(input)?;
    let mut policies = (known != 0).then(Vec::new);
    let mut count = 0_u64;
    let mut all = Vec::new();
    let mut wrong = None;
    loop {
        match u32::from_le_bytes(array(input)?) {
            END => break,
            length => record(input, length, &mut buffer)?,
        }
        // The checksum tells damage from a fault of ours, so a bad record waits for it.
        count += 1;
        match xds::Resource::decode(buffer.as_slice()) {
            Ok(resource) if is_policy(&resource) => match &mut policies {
                Some(policies) => policies.push(Arc::new(Authorization::read(resource))),
                None => wrong = wrong.or(Some("a policy, although they are not known".to_owned())),
            },
            Ok(resource) => match decode_one(resource, interner) {
                Ok(read) => all.push((read.resource, read.version)),
                Err(bad) => wrong = wrong.or(Some(format!("{:?}: {}", bad.name, bad.reason))),
            },
            Err(error) => wrong = wrong.or(Some(format!("record {count}: {error}"))),
        }
    }
    let said = u64::from_le_bytes(array(input)?);
    let sum = input.crc.value();
    if u32::from_le_bytes(array(input)?) != sum {
        return Err(Bad::Content("its checksum is wrong".to_owned()));
    }
    if input.read(&mut [0])? != 0 {
        return Err(Bad::Content("something follows its end".to_owned()));
    }
    if let Some(wrong) = wrong {
        return Err(Bad::Content(wrong));
    }
    if said != count {
        return Err(Bad::Content(format!("it says {said} resources and holds {count}")));
    }
    if node != interner.node() {
        return Err(Bad::Node(node));
    }
    Ok(Held { resources: all, policies, sequence })
}

/// By its type; what has none was a policy as well, since all others are encoded from what was understood.
fn is_policy(resource: &xds::Resource) -> bool {
    resource.resource.as_ref().is_none_or(|any| any.type_url != ADDRESS_TYPE)
}

fn array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn record(input: &mut impl Read, length: u32, buffer: &mut Vec<u8>) -> Result<(), Bad> {
    if length > RECORD_LIMIT {
        return Err(Bad::Content(format!("a record of {length} bytes")));
    }
    buffer.clear();
    // Not `resize`: a damaged length must not allocate more than the file holds.
    let read = input.take(length.into()).read_to_end(buffer)?;
    if read < length as usize { Err(Bad::Io(io::ErrorKind::UnexpectedEof.into())) } else { Ok(()) }
}

struct Summed<T> {
    inner: T,
    crc: Crc,
    length: u64,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.crc.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.crc.update(&buffer[..read]);
        self.length += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
