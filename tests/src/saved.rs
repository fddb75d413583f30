//! The snapshot that an agent has saved, opened to change what it says of policies: as if these had never come, or could not be understood.
//! The layout is that of `mesh-agent/src/snapshot/disk.rs`.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// What is in every policy, and in nothing else: the name of its type.
const POLICY: &[u8] = b"istio.security.Authorization";
/// `scope: WORKLOAD_SELECTOR, action: DENY` of one, by field numbers.
const DENY: [u8; 4] = [3 << 3, 2, 4 << 3, 1];
const END: u32 = u32::MAX;

/// The file of an agent that does not run.
#[derive(Debug)]
pub struct Saved {
    path: PathBuf,
    /// All before the records; its last byte says whether policies are known.
    header: Vec<u8>,
    records: Vec<Vec<u8>>,
}

impl Saved {
    /// Reads what is in that state directory.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        let path = state_dir.join("snapshot");
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        // Magic, format, the last change, and the node's name by its length.
        let node = number(&bytes, 20)? as usize;
        let mut at = 24 + node + 1;
        let header = bytes.get(..at).context("it ends in its header")?.to_vec();
        let mut records = Vec::new();
        loop {
            let length = number(&bytes, at)?;
            if length == END {
                break;
            }
            let end = at + 4 + length as usize;
            records.push(bytes.get(at + 4..end).context("it ends in a record")?.to_vec());
            at = end;
        }
        Ok(Self { path, header, records })
    }

    /// Without policies: what becomes of them is not known, or (`known`) others are all there are.
    pub fn without_policies(mut self, known: bool) -> anyhow::Result<()> {
        ensure!(self.records.iter().any(|record| contains(record, POLICY)), "there is none");
        self.records.retain(|record| !contains(record, POLICY));
        *self.header.last_mut().context("no header")? = known.into();
        self.write()
    }

    /// With an action that nobody knows instead of each DENY for workloads by their labels.
    pub fn with_a_strange_action(mut self) -> anyhow::Result<()> {
        let denials = self.records.iter_mut().filter(|record| contains(record, POLICY));
        let actions = denials.filter_map(|record| {
            let at = record.windows(DENY.len()).position(|bytes| bytes == DENY)?;
            record.get_mut(at + DENY.len() - 1)
        });
        let changed = actions.map(|action| *action = 99).count();
        ensure!(changed > 0, "there is none");
        self.write()
    }

    fn write(&self) -> anyhow::Result<()> {
        let mut bytes = self.header.clone();
        for record in &self.records {
            bytes.extend(u32::try_from(record.len())?.to_le_bytes());
            bytes.extend(record);
        }
        bytes.extend(END.to_le_bytes());
        bytes.extend((self.records.len() as u64).to_le_bytes());
        bytes.extend(crc32(&bytes).to_le_bytes());
        Ok(std::fs::write(&self.path, bytes)?)
    }
}

fn number(bytes: &[u8], at: usize) -> anyhow::Result<u32> {
    let four = bytes.get(at..at + 4).context("it ends too early")?;
    Ok(u32::from_le_bytes(four.try_into()?))
}

fn contains(record: &[u8], word: &[u8]) -> bool {
    record.windows(word.len()).any(|bytes| bytes == word)
}

/// As in IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    let shift = |value: u32| if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
    !bytes.iter().fold(u32::MAX, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), |value, _| shift(value)))
}
