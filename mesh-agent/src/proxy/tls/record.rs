//! TLS 1.3 records (RFC 8446, section 5), sealed and opened where they lie. Pure.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce, UnboundKey};

use super::secret::Material;

/// Bytes before a record's content.
pub const HEADER: usize = 5;
/// Bytes that a record adds: header, type, tag.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// Most bytes in a record.
pub const MAX_PLAINTEXT: usize = 1 << 14;
const TAG: usize = 16;
/// Bytes of a nonce, and of an initialization vector.
pub(super) const NONCE: usize = 12;
/// Most bytes after a record's header: other implementations may pad.
const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;

/// What a record carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Content {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}

/// The peer does not speak TLS, or somebody has changed what it said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A header that no record after the handshake has.
    #[error("not a TLS record")]
    Header,
    /// Longer than allowed.
    #[error("a TLS record is too long")]
    TooLong,
    /// It was not sealed with the keys of this connection, or not as the next record.
    #[error("a TLS record does not verify")]
    Forged,
    /// No content, or one of an unknown type.
    #[error("a TLS record carries nothing known")]
    Content,
    /// A suite that was not offered.
    #[error("not an AES-GCM suite")]
    Suite,
}

/// A key with what its algorithm makes of it, which is much larger, and only there while records come and go.
struct Key {
    material: Material,
    tables: Option<LessSafeKey>,
    sequence: u64,
}

impl Key {
    fn new(sequence: u64, material: Material) -> Self {
        Self { material, tables: None, sequence }
    }

    fn next(&mut self) -> Result<(Nonce, &LessSafeKey), RecordError> {
        let nonce = self.nonce();
        let Material { algorithm, key, .. } = &self.material;
        if self.tables.is_none() {
            let key = UnboundKey::new(algorithm, &key[..algorithm.key_len()]);
            self.tables = Some(LessSafeKey::new(key.map_err(|_length| RecordError::Suite)?));
        }
        Ok((nonce, self.tables.as_ref().ok_or(RecordError::Suite)?))
    }

    /// Each number is used once: it counts up, and a key is replaced long before it wraps.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.material.iv;
        for (byte, sequence) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= sequence;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals what is sent.
pub(super) struct Sealer(Key);

impl Sealer {
    pub(super) fn new(sequence: u64, material: Material) -> Self {
        Self(Key::new(sequence, material))
    }

    /// Keeps no more than it needs to go on.
    pub(super) fn rest(&mut self) {
        self.0.tables = None;
    }

    /// Records sealed with this key.
    pub(super) fn used(&self) -> u64 {
        self.0.sequence
    }

    /// Makes a record of the `length` bytes that lie at [`HEADER`] in `record`, and returns the record's length.
    pub(super) fn seal(
        &mut self,
        content: Content,
        record: &mut [u8],
        length: usize,
    ) -> Result<usize, RecordError> {
        let total = length + OVERHEAD;
        let Some(record) = record.get_mut(..total).filter(|_| length <= MAX_PLAINTEXT) else {
            return Err(RecordError::TooLong);
        };
        let size = ((total - HEADER) as u16).to_be_bytes();
        let header = [Content::Data as u8, 3, 3, size[0], size[1]];
        record[..HEADER].copy_from_slice(&header);
        record[HEADER + length] = content as u8;
        let (inner, tag) = record[HEADER..].split_at_mut(length + 1);
        let (nonce, key) = self.0.next()?;
        let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(header), inner);
        tag.copy_from_slice(sealed.map_err(|_failed| RecordError::Forged)?.as_ref());
        Ok(total)
    }
}

/// A record at the beginning of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opened {
    pub(super) content: Content,
    /// Length of the content, which lies at [`HEADER`].
    pub(super) length: usize,
    /// Length of the record.
    pub(super) total: usize,
}

/// Length of the record that begins so, if its header is there.
pub(super) fn length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    if header[..3] != [Content::Data as u8, 3, 3] {
        return Err(RecordError::Header);
    }
    let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if length > MAX_CIPHERTEXT {
        return Err(RecordError::TooLong);
    }
    Ok(Some(HEADER + length))
}

/// Opens what is received.
pub(super) struct Opener(Key);

impl Opener {
    pub(super) fn new(sequence: u64, material: Material) -> Self {
        Self(Key::new(sequence, material))
    }

    /// Keeps no more than it needs to go on.
    pub(super) fn rest(&mut self) {
        self.0.tables = None;
    }

    /// Opens the record at the beginning of `bytes`; none when it is not whole yet.
    pub(super) fn open(&mut self, bytes: &mut [u8]) -> Result<Option<Opened>, RecordError> {
        let Some(total) = length(bytes)?.filter(|total| *total <= bytes.len()) else { return Ok(None) };
        let (header, sealed) = bytes[..total].split_at_mut(HEADER);
        let (nonce, key) = self.0.next()?;
        let opened = key.open_in_place(nonce, Aad::from(&*header), sealed);
        let inner = opened.map_err(|_failed| RecordError::Forged)?;
        // Zeros after the type are padding.
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Content)?;
        if end > MAX_PLAINTEXT {
            return Err(RecordError::TooLong);
        }
        let content = match inner[end] {
            21 => Content::Alert,
            22 => Content::Handshake,
            23 => Content::Data,
            _ => return Err(RecordError::Content),
        };
        Ok(Some(Opened { content, length: end, total }))
    }
}
