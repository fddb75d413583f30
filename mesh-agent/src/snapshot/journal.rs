//! What has changed since the snapshot was saved, change by change: the snapshot is large and saved now and then, a change is written before
//! it is put in force, and acknowledged when it is safe.
//!
//! A file is a header (magic, format) and entries: length, number of the change, a `DeltaDiscoveryResponse` of what changed, CRC-32 of all that.
//! Changes are numbered without a gap, and a snapshot says which is the last in it; so those that it has are skipped, whatever became of the
//! file when the snapshot was saved. What follows a gap, or an entry that is not whole, does not count: a process, or the machine, ended while it was written.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_common::api::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use mesh_common::api::{ADDRESS_TYPE, AUTHORIZATION_TYPE, COMPLETE};
use prost::Message;

use super::authorization::{Authorization, PolicyUpdate};
use super::crc::Crc;
use super::decode::decode_one;
use super::disk::{FORMAT, LoadError};
use super::encode::encode;
use super::intern::Interner;
use super::model::{Delta, Resource, Version};
use super::state::Held;

const MAGIC: &[u8; 8] = b"MESHJRNL";
const FILE: &str = "journal";
const HEADER: u64 = 12;
/// Length and number, before what an entry says.
const HEAD: usize = 12;
/// The checksum, after it.
const TAIL: usize = 4;

/// More than any control plane says between two snapshots: where it comes to that, these cannot be saved, and no disk is to be filled instead.
const LIMIT: u64 = 256 << 20;

/// Where the journal lies in a state directory.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// A change of services and workloads, as an entry says it.
pub fn of_addresses(delta: &Delta) -> Vec<u8> {
    let message = DeltaDiscoveryResponse {
        type_url: ADDRESS_TYPE.to_owned(),
        resources: delta.updated.iter().map(|update| encode(&update.resource, &update.version)).collect(),
        removed_resources: delta.removed.clone(),
        ..DeltaDiscoveryResponse::default()
    };
    message.encode_to_vec()
}

/// A change of policies, as an entry says it. `complete`: with it all have been named.
pub fn of_policies(update: &PolicyUpdate, complete: bool) -> Vec<u8> {
    let message = DeltaDiscoveryResponse {
        type_url: AUTHORIZATION_TYPE.to_owned(),
        resources: update.updated.iter().map(|policy| policy.resource().clone()).collect(),
        removed_resources: update.removed.clone(),
        system_version_info: if complete { COMPLETE.to_owned() } else { String::new() },
        ..DeltaDiscoveryResponse::default()
    };
    message.encode_to_vec()
}

/// The file, to write to.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Option<Arc<File>>,
    /// How much of the file counts.
    length: u64,
    /// The last change in the file.
    newest: u64,
    /// The last that is in the file or in the snapshot, with all before it: only the next may follow.
    sequence: u64,
    /// Up to this change the disk may have lost what it had taken: nothing follows until a snapshot has them all.
    distrusted: Option<u64>,
}

/// A journal that was found, and what was in it.
#[derive(Debug)]
pub struct Found {
    /// To go on with.
    pub journal: Journal,
    /// How many changes the snapshot did not have.
    pub changes: u64,
    /// How many bytes did not count.
    pub lost: u64,
}

impl Journal {
    /// Where no snapshot can be used there is nothing to go on from. Numbers begin at the clock, so that no older file is
    /// taken for what follows.
    pub fn begin(state_dir: &Path, now: SystemTime) -> Self {
        let past = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::empty(state_dir, u64::try_from(past.as_micros()).unwrap_or_default())
    }

    /// Goes on with what lies beside the snapshot that was loaded, and brings that up to date.
    pub fn resume(state_dir: &Path, saved: &mut Held, interner: &mut Interner) -> Result<Found, LoadError> {
        let mut journal = Self::empty(state_dir, saved.sequence);
        let path = path(state_dir);
        let io = |source| LoadError::Io { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Found { journal, changes: 0, lost: 0 });
            }
            Err(error) => return Err(io(error)),
        };
        let there = file.metadata().map_err(io)?.len();
        let mut input = BufReader::new(file);
        let (mut changes, mut state) = (0, None);
        if header(&mut input).map_err(io)? {
            journal.length = HEADER;
            while let Some(entry) = Entry::read(&mut input).map_err(io)? {
                if entry.sequence > journal.sequence + 1 {
                    break;
                }
                if entry.sequence > journal.sequence {
                    let state = state.get_or_insert_with(|| State::of(saved));
                    let damaged = |what| LoadError::Damaged { path: path.clone(), what };
                    state.apply(entry.message(), interner).map_err(damaged)?;
                    journal.sequence = entry.sequence;
                    changes += 1;
                }
                journal.newest = entry.sequence;
                journal.length += entry.bytes.len() as u64;
            }
        }
        if let Some(state) = state {
            *saved = state.held(journal.sequence);
        }
        let lost = there.saturating_sub(journal.length);
        Ok(Found { journal, changes, lost })
    }

    fn empty(state_dir: &Path, sequence: u64) -> Self {
        Self { path: path(state_dir), file: None, length: 0, newest: 0, sequence, distrusted: None }
    }

    /// The number of the last change.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The file, if there are changes in it: by its `sync_data` they are safe.
    pub fn written(&mut self) -> io::Result<Option<Arc<File>>> {
        if self.length > HEADER { self.open().map(Some) } else { Ok(None) }
    }

    /// The disk has failed to keep what was written.
    pub fn distrust(&mut self) {
        self.distrusted = Some(self.sequence);
    }

    /// Writes a change, which is there for the next process from then on; the file, by whose `sync_data` it is safe from a power failure, too.
    /// Where one before it could not be written it fails, until a snapshot has that one.
    pub fn append(&mut self, sequence: u64, change: &[u8]) -> io::Result<Arc<File>> {
        if sequence != self.sequence + 1 {
            return Err(io::Error::other("one before it is missing"));
        }
        if let Some(file) = &self.file
            && file.metadata()?.nlink() == 0
        {
            // Somebody has removed it, and with it what was in it.
            (self.file, self.length, self.newest) = (None, 0, 0);
            self.distrust();
        }
        if self.distrusted.is_some() {
            return Err(io::Error::other("what was written before it may be lost"));
        }
        let entry = Entry::new(sequence, change)?;
        if self.length + entry.bytes.len() as u64 > LIMIT {
            return Err(io::Error::other("it has grown too long without a snapshot"));
        }
        let file = self.open()?;
        // At its place, so that what is left of an attempt that failed is written over.
        file.write_all_at(&entry.bytes, self.length)?;
        self.length += entry.bytes.len() as u64;
        (self.sequence, self.newest) = (sequence, sequence);
        Ok(file)
    }

    /// A snapshot has been saved with all up to this change: they go.
    pub fn covered(&mut self, sequence: u64) -> io::Result<()> {
        self.sequence = self.sequence.max(sequence);
        self.distrusted = self.distrusted.filter(|last| *last > sequence);
        if self.length <= HEADER {
            return Ok(());
        }
        let file = self.open()?;
        if self.newest <= sequence {
            file.set_len(HEADER)?;
            self.length = HEADER;
            return Ok(());
        }
        let mut input = BufReader::new(&*file);
        input.seek(SeekFrom::Start(HEADER))?;
        let mut rest = new_header();
        while let Some(entry) = Entry::read(&mut input)? {
            if entry.sequence > sequence && entry.sequence <= self.newest {
                rest.extend(entry.bytes);
            }
        }
        let temporary = self.path.with_file_name(format!(".{FILE}.new"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&temporary)?;
        file.write_all_at(&rest, 0)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        // Before anything else may fail: what is written to the former one is nowhere.
        self.length = rest.len() as u64;
        self.file = Some(Arc::new(file));
        self.sync_directory()
    }

    fn open(&mut self) -> io::Result<Arc<File>> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&self.path)?;
        file.set_len(self.length)?;
        if self.length == 0 {
            file.write_all_at(&new_header(), 0)?;
            self.length = HEADER;
        }
        // What is in a file that is not in its directory after a power failure is nowhere.
        self.sync_directory()?;
        Ok(Arc::clone(self.file.insert(Arc::new(file))))
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

fn new_header() -> Vec<u8> {
    [&MAGIC[..], &FORMAT.to_le_bytes()].concat()
}

/// Whether it begins as a journal: it may have been cut short.
fn header(input: &mut impl Read) -> io::Result<bool> {
    let mut found = Vec::new();
    input.take(HEADER).read_to_end(&mut found)?;
    Ok(found == new_header())
}

struct Entry {
    sequence: u64,
    /// All of it.
    bytes: Vec<u8>,
}

impl Entry {
    fn new(sequence: u64, change: &[u8]) -> io::Result<Self> {
        let length = u32::try_from(change.len()).map_err(|_long| io::Error::other("a change is too long"))?;
        let mut bytes = Vec::with_capacity(HEAD + change.len() + TAIL);
        bytes.extend(length.to_le_bytes());
        bytes.extend(sequence.to_le_bytes());
        bytes.extend(change);
        bytes.extend(Crc::of(&bytes).to_le_bytes());
        Ok(Self { sequence, bytes })
    }

    /// The next; `None` where there is none that is whole.
    fn read(input: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        input.by_ref().take(HEAD as u64).read_to_end(&mut bytes)?;
        let Some((length, sequence)) = bytes.split_first_chunk().and_then(|(length, rest)| {
            Some((u32::from_le_bytes(*length), u64::from_le_bytes(*rest.first_chunk()?)))
        }) else {
            return Ok(None);
        };
        // Not allocated at once: a damaged length must not ask for more than the file has.
        let rest = u64::from(length) + TAIL as u64;
        if input.take(rest).read_to_end(&mut bytes)? as u64 != rest {
            return Ok(None);
        }
        let said = bytes.split_last_chunk().map(|(all, sum)| Crc::of(all) == u32::from_le_bytes(*sum));
        Ok((said == Some(true)).then_some(Self { sequence, bytes }))
    }

    fn message(&self) -> &[u8] {
        &self.bytes[HEAD..self.bytes.len() - TAIL]
    }
}

/// What is held, by name.
struct State {
    resources: HashMap<String, (Resource, Version)>,
    policies: BTreeMap<Arc<str>, Arc<Authorization>>,
    /// All policies have been named once.
    complete: bool,
}

impl State {
    fn of(held: &mut Held) -> Self {
        let resources = std::mem::take(&mut held.resources).into_iter();
        let policies = held.policies.take();
        Self {
            resources: resources.map(|held| (held.0.name(), held)).collect(),
            complete: policies.is_some(),
            policies: policies.into_iter().flatten().map(|one| (Arc::clone(&one.name), one)).collect(),
        }
    }

    fn apply(&mut self, message: &[u8], interner: &mut Interner) -> Result<(), String> {
        let change = DeltaDiscoveryResponse::decode(message).map_err(|error| error.to_string())?;
        if change.type_url == AUTHORIZATION_TYPE {
            for resource in change.resources {
                let policy = Authorization::read(resource);
                self.policies.insert(Arc::clone(&policy.name), Arc::new(policy));
            }
            change.removed_resources.iter().for_each(|name| drop(self.policies.remove(&**name)));
            self.complete |= change.system_version_info == COMPLETE;
            return Ok(());
        }
        for resource in change.resources {
            let read =
                decode_one(resource, interner).map_err(|bad| format!("{:?}: {}", bad.name, bad.reason))?;
            self.resources.insert(read.name, (read.resource, read.version));
        }
        change.removed_resources.iter().for_each(|name| drop(self.resources.remove(name)));
        Ok(())
    }

    fn held(self, sequence: u64) -> Held {
        Held {
            resources: self.resources.into_values().collect(),
            policies: self.complete.then(|| self.policies.into_values().collect()),
            sequence,
        }
    }
}

#[cfg(test)]
mod tests;
