//! Whether a verified peer is still one to trust: none of its certificates revoked, and a root of today at their end.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};

use super::peer::{NotTrusted, parse};
use super::revocation::{Lists, Revocations, number};
use crate::identity::{Roots, Trust};

/// How the peer of a finished handshake stands.
#[derive(Debug, Clone)]
pub struct Standing {
    revocations: Arc<Revocations>,
    /// Of the lists that it was verified by.
    generation: u64,
    /// Until when these say something of it.
    until: Option<SystemTime>,
    trust: Arc<Trust>,
    chain: Arc<Chain>,
}

impl Standing {
    /// Of a peer that was verified by these lists.
    pub(super) fn new(
        revocations: &Arc<Revocations>,
        lists: &Lists,
        trust: &Arc<Trust>,
        chain: Arc<Chain>,
    ) -> Result<Self, NotTrusted> {
        let until = lists.until(&chain.certificates)?;
        let (revocations, trust) = (Arc::clone(revocations), Arc::clone(trust));
        Ok(Self { revocations, generation: lists.generation, until, trust, chain })
    }

    /// Whether the lists are those that it was verified by, none of them has lapsed since, and it leads to a root of today. Else it has to be
    /// verified anew before anything begins.
    pub fn is_current(&self) -> bool {
        self.revocations.is_current(self.generation) && !self.has_lapsed() && self.is_trusted()
    }

    /// Until when the lists that it was verified by say something; none: without end.
    pub fn until(&self) -> Option<SystemTime> {
        self.until
    }

    /// Whether a list that it was verified by says nothing any more.
    pub(super) fn has_lapsed(&self) -> bool {
        self.until.is_some_and(|until| SystemTime::now() >= until)
    }

    /// Whether it has been revoked meanwhile, or its root has.
    pub fn is_revoked(&self) -> bool {
        self.revocations.now().revoke(&self.chain.numbers) || !self.is_trusted()
    }

    /// Whether it leads to a root of today, whichever it led to when it was verified.
    pub(super) fn is_trusted(&self) -> bool {
        let known = self.chain.judged_by(self.trust.generation());
        known.unwrap_or_else(|| self.chain.judge(&self.trust.now()))
    }
}

/// What a peer showed its certificate for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Client,
    Server,
}

/// Of roots that nobody has judged a chain by.
const NEVER: u64 = u64::MAX;

/// A chain that was verified once, to be verified by other roots when these change.
#[derive(Debug)]
pub(super) struct Chain {
    certificates: Box<[CertificateDer<'static>]>,
    /// What revocation lists call them.
    numbers: Box<[u64]>,
    side: Side,
    /// When all of it is valid: that a certificate ends is no reason to end what is open.
    at: UnixTime,
    provider: Arc<CryptoProvider>,
    /// Twice the generation of the roots that it was judged by last, and one more if it leads to one of them.
    judged: AtomicU64,
}

impl Chain {
    fn new(
        certificates: &[CertificateDer<'_>],
        side: Side,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, NotTrusted> {
        let mut until = u64::MAX;
        let read = |certificate| {
            let parsed = parse(certificate)?;
            until = until.min(u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0));
            Ok(number(parsed.issuer().as_raw(), parsed.raw_serial()))
        };
        Ok(Self {
            numbers: certificates.iter().map(read).collect::<Result<_, NotTrusted>>()?,
            certificates: certificates.iter().map(|one| one.clone().into_owned()).collect(),
            side,
            at: UnixTime::since_unix_epoch(Duration::from_secs(until)),
            provider: Arc::clone(provider),
            judged: AtomicU64::new(NEVER),
        })
    }

    /// Whether it leads to a root of that generation, if somebody has looked.
    fn judged_by(&self, generation: u64) -> Option<bool> {
        let judged = self.judged.load(Ordering::Acquire);
        (judged != NEVER && judged >> 1 == generation).then_some(judged & 1 == 1)
    }

    fn note(&self, generation: u64, leads: bool) {
        self.judged.store(generation << 1 | u64::from(leads), Ordering::Release);
    }

    fn judge(&self, roots: &Roots) -> bool {
        let leads = self.leads_to(&roots.store);
        self.note(roots.generation, leads);
        leads
    }

    fn leads_to(&self, roots: &Arc<RootCertStore>) -> bool {
        let [leaf, intermediates @ ..] = &*self.certificates else { return false };
        match self.side {
            Side::Server => ParsedCertificate::try_from(leaf).is_ok_and(|leaf| {
                let algorithms = self.provider.signature_verification_algorithms.all;
                let verify = verify_server_cert_signed_by_trust_anchor;
                verify(&leaf, roots, intermediates, self.at, algorithms).is_ok()
            }),
            Side::Client => {
                let provider = Arc::clone(&self.provider);
                let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider);
                // Without any root there is no verifier.
                clients.build().is_ok_and(|one| one.verify_client_cert(leaf, intermediates, self.at).is_ok())
            }
        }
    }
}

/// The chains of the peers that there are. One for all connections with a peer, and judged once for all of them.
#[derive(Debug, Default)]
pub(super) struct Chains(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    chains: HashMap<u64, Weak<Chain>>,
    /// How many there were when those that have gone were last looked for.
    swept: usize,
}

impl Chains {
    /// The chain of a peer that has shown these in a handshake in which `roots` counted.
    ///
    /// # Errors
    ///
    /// One of the certificates cannot be read, so that nobody would notice its revocation.
    pub(super) fn of(
        &self,
        certificates: &[CertificateDer<'_>],
        side: Side,
        provider: &Arc<CryptoProvider>,
        (trust, roots): (&Trust, &Arc<RootCertStore>),
    ) -> Result<Arc<Chain>, NotTrusted> {
        let mut hasher = DefaultHasher::new();
        (side, certificates).hash(&mut hasher);
        let name = hasher.finish();
        let known = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |chain: &Arc<Chain>| chain.side == side && *chain.certificates == *certificates;
        if let Some(chain) = known.chains.get(&name).and_then(Weak::upgrade).filter(same) {
            return Ok(chain);
        }
        let chain = Arc::new(Chain::new(certificates, side, provider)?);
        let now = trust.now();
        // Others, if they have changed meanwhile: then it is judged by those when somebody asks.
        if Arc::ptr_eq(&now.store, roots) {
            chain.note(now.generation, true);
        }
        if known.chains.len() >= 64.max(known.swept * 2) {
            known.chains.retain(|_name, chain| chain.strong_count() > 0);
            known.swept = known.chains.len();
        }
        known.chains.insert(name, Arc::downgrade(&chain));
        Ok(chain)
    }
}

#[cfg(test)]
mod tests;
