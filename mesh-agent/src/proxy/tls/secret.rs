//! The traffic secrets of a connection: how they come out of rustls, and the keys that follow from them (RFC 8446, sections 7.1 to 7.3).
//!
//! rustls would update keys itself, but for that it keeps all that it knows of a connection, certificates included.

use std::cell::RefCell;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Algorithm};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use rustls::KeyLog;
use zeroize::Zeroizing;

use super::record::{NONCE, RecordError};

/// Longest key.
pub(super) const KEY: usize = 32;
/// Longest secret: as long as a hash.
const SECRET: usize = 48;

/// A key and its initialization vector.
pub(super) struct Material {
    pub(super) algorithm: &'static Algorithm,
    pub(super) key: Zeroizing<[u8; KEY]>,
    pub(super) iv: [u8; NONCE],
}

/// What the keys of one direction follow from. As its bytes: what the library makes of them is twice as large, and needed only for
/// a moment.
pub(super) struct Secret {
    bytes: Zeroizing<[u8; SECRET]>,
    length: u8,
}

impl Secret {
    /// None: not of a suite that is offered.
    fn new(bytes: &[u8]) -> Option<Self> {
        [HKDF_SHA256, HKDF_SHA384].iter().find(|hash| hash.len() == bytes.len())?;
        let mut secret = Self { bytes: Zeroizing::new([0; SECRET]), length: bytes.len() as u8 };
        secret.bytes[..bytes.len()].copy_from_slice(bytes);
        Some(secret)
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    fn hash(&self) -> hkdf::Algorithm {
        if self.bytes().len() == HKDF_SHA256.len() { HKDF_SHA256 } else { HKDF_SHA384 }
    }

    /// The next secret takes the place of this one; its key.
    pub(super) fn update(&mut self) -> Result<Material, RecordError> {
        let mut next = Zeroizing::new([0; SECRET]);
        self.expand(b"traffic upd", &mut next[..usize::from(self.length)])?;
        self.bytes = next;
        self.material()
    }

    /// The key of this secret.
    pub(super) fn material(&self) -> Result<Material, RecordError> {
        // Each suite of TLS 1.3 with AES-GCM has its own hash.
        let algorithm = if self.hash() == HKDF_SHA256 { &AES_128_GCM } else { &AES_256_GCM };
        let mut material = Material { algorithm, key: Zeroizing::new([0; KEY]), iv: [0; NONCE] };
        self.expand(b"key", &mut material.key[..algorithm.key_len()])?;
        self.expand(b"iv", &mut material.iv)?;
        Ok(material)
    }

    /// HKDF-Expand-Label without context.
    fn expand(&self, label: &[u8], out: &mut [u8]) -> Result<(), RecordError> {
        const PREFIX: &[u8] = b"tls13 ";
        let length = (out.len() as u16).to_be_bytes();
        let info: [&[u8]; 5] = [&length, &[(PREFIX.len() + label.len()) as u8], PREFIX, label, &[0]];
        let secret = Prk::new_less_safe(self.hash(), self.bytes());
        let expanded = secret.expand(&info, Length(out.len())).map_err(|_long| RecordError::Suite)?;
        expanded.fill(out).map_err(|_long| RecordError::Suite)
    }
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// What the client sends under, and the server.
#[derive(Default)]
pub(super) struct Secrets {
    pub(super) client: Option<Secret>,
    pub(super) server: Option<Secret>,
}

thread_local! {
    static TOLD: RefCell<Secrets> = RefCell::default();
}

/// rustls tells traffic secrets to nobody but a log of keys. This one keeps them for whoever makes a handshake at this moment on
/// this thread, and writes them nowhere.
#[derive(Debug)]
pub(super) struct Listener;

impl Listener {
    /// Does a step of a handshake, and adds the secrets that rustls told meanwhile.
    pub(super) fn during<T>(secrets: &mut Secrets, step: impl FnOnce() -> T) -> T {
        TOLD.set(Secrets::default());
        let done = step();
        let told = TOLD.take();
        secrets.client = told.client.or(secrets.client.take());
        secrets.server = told.server.or(secrets.server.take());
        done
    }
}

impl KeyLog for Listener {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        TOLD.with_borrow_mut(|told| match label {
            "CLIENT_TRAFFIC_SECRET_0" => told.client = Secret::new(secret),
            "SERVER_TRAFFIC_SECRET_0" => told.server = Secret::new(secret),
            _ => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn keys_are_those_of_the_example() {
        // RFC 8448, section 3: "derive write traffic keys for application data" of the server.
        let secret = bytes("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643");
        let material = Secret::new(&secret).unwrap().material().unwrap();
        assert_eq!(material.key[..16], bytes("9f02283b6c9c07efc26bb9f2ac92e356"));
        assert_eq!(material.iv[..], bytes("cf782b88dd83549aadf1e984"));
        assert_eq!(material.algorithm, &AES_128_GCM);
        assert!(Secret::new(&secret[1..]).is_none());
    }
}
