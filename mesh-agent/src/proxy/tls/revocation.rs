//! Certificates that were revoked, by lists in a file (RFC 5280). A list that cannot be used refuses everybody, one that is missing for an issuer
//! nobody: the same as in the control plane.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, Der, TrustAnchor};
use rustls::server::WebPkiClientVerifier;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::peer::{NotTrusted, parse as parse_certificate};
use crate::identity::answer::provider;

/// The lists as the file has them now.
#[derive(Debug)]
pub struct Revocations {
    path: Option<PathBuf>,
    now: RwLock<Arc<Lists>>,
    /// Of the lists that are in force.
    generation: AtomicU64,
}

/// The lists as they were at a time.
#[derive(Debug, Default)]
pub(super) struct Lists {
    content: Option<Vec<u8>>,
    pub(super) lists: Vec<CertificateRevocationListDer<'static>>,
    /// Why they cannot be used.
    pub(super) broken: Option<String>,
    revoked: HashSet<u64>,
    /// Until when the list of an issuer, by its name, says something; none: it does not say.
    ends: HashMap<Vec<u8>, Option<SystemTime>>,
    /// How many there were before.
    pub(super) generation: u64,
}

impl Revocations {
    /// Nothing is revoked.
    pub fn none() -> Arc<Self> {
        Arc::new(Self { path: None, now: RwLock::default(), generation: AtomicU64::new(0) })
    }

    /// By the lists in a file, in PEM or one in DER.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or its content not be used.
    pub fn read(path: &Path) -> Result<Arc<Self>, String> {
        let lists = Lists::of(std::fs::read(path).map_err(|error| error.to_string()));
        match lists.broken {
            Some(reason) => Err(reason),
            None => Ok(Arc::new(Self {
                path: Some(path.to_owned()),
                now: RwLock::new(Arc::new(lists)),
                generation: AtomicU64::new(0),
            })),
        }
    }

    /// Reads the file again. Whether it has changed, and if it cannot be used why.
    pub fn look(&self) -> Option<Result<(), String>> {
        let content = std::fs::read(self.path.as_ref()?).map_err(|error| error.to_string());
        let former = self.now();
        let same = match &content {
            Ok(bytes) => former.content.as_ref() == Some(bytes),
            Err(reason) => former.broken.as_ref() == Some(reason),
        };
        if same {
            return None;
        }
        // There is one writer.
        let generation = former.generation + 1;
        let lists = Lists { generation, ..Lists::of(content) };
        let outcome = lists.broken.clone().map_or(Ok(()), Err);
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(lists);
        // After the lists: who sees the number finds them.
        self.generation.store(generation, Ordering::Release);
        Some(outcome)
    }

    /// Whether those lists are still in force.
    pub(super) fn are_current(&self, lists: &Lists) -> bool {
        self.is_current(lists.generation)
    }

    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.generation.load(Ordering::Acquire) == generation
    }

    pub(super) fn now(&self) -> Arc<Lists> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Lists {
    /// By the content of a file, or why there is none.
    pub(super) fn of(content: Result<Vec<u8>, String>) -> Self {
        let bytes = match content {
            Ok(bytes) => bytes,
            Err(reason) => return Self { broken: Some(reason), ..Self::default() },
        };
        match parse(&bytes) {
            Ok((lists, revoked, ends)) => {
                Self { content: Some(bytes), lists, revoked, ends, ..Self::default() }
            }
            Err(reason) => Self { content: Some(bytes), broken: Some(reason), ..Self::default() },
        }
    }

    /// Whether one of these, by their [`number`], is on them.
    pub(super) fn revoke(&self, chain: &[u64]) -> bool {
        chain.iter().any(|certificate| self.revoked.contains(certificate))
    }

    /// Until when they say something of the certificates of a chain; none: without end.
    ///
    /// # Errors
    ///
    /// One of the certificates cannot be read.
    pub(super) fn until(&self, chain: &[CertificateDer<'_>]) -> Result<Option<SystemTime>, NotTrusted> {
        let mut until = None::<SystemTime>;
        for certificate in chain.iter().filter(|_| !self.ends.is_empty()) {
            let end = self.ends.get(parse_certificate(certificate)?.issuer().as_raw()).copied().flatten();
            until = end.map_or(until, |end| Some(until.map_or(end, |until| until.min(end))));
        }
        Ok(until)
    }

    /// Whether nothing is to be asked of them.
    pub(super) fn is_empty(&self) -> bool {
        self.lists.is_empty() && self.broken.is_none()
    }
}

type Parsed =
    (Vec<CertificateRevocationListDer<'static>>, HashSet<u64>, HashMap<Vec<u8>, Option<SystemTime>>);

fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let lists = if bytes.windows(11).any(|window| window == b"-----BEGIN ") {
        let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(bytes).collect();
        found.map_err(|error| error.to_string())?
    } else {
        vec![CertificateRevocationListDer::from(bytes.to_vec())]
    };
    if lists.is_empty() {
        return Err("holds no revocation list".to_owned());
    }
    let (mut revoked, mut ends) = (HashSet::new(), HashMap::new());
    for list in &lists {
        let (_, parsed) = CertificateRevocationList::from_der(list.as_ref())
            .map_err(|error| format!("a revocation list cannot be read: {error}"))?;
        let issuer = parsed.tbs_cert_list.issuer.as_raw();
        let end = parsed.next_update().map(|end| u64::try_from(end.timestamp()).unwrap_or(0));
        let end = end.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        // Of several lists of an issuer the first counts, as when a certificate is verified.
        ends.entry(issuer.to_vec()).or_insert(end);
        revoked.extend(parsed.iter_revoked_certificates().map(|one| number(issuer, one.raw_serial())));
    }
    usable(&lists)?;
    Ok((lists, revoked, ends))
}

/// Whether rustls takes them as well: it refuses more of them, such as those that say only what has changed since another.
fn usable(lists: &[CertificateRevocationListDer<'static>]) -> Result<(), String> {
    let empty = || Der::from_slice(&[]);
    // Its lists are only looked at for some roots, whichever they are.
    let nobody = TrustAnchor { subject: empty(), subject_public_key_info: empty(), name_constraints: None };
    let roots = Arc::new(RootCertStore { roots: vec![nobody] });
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let built = verifier.with_crls(lists.iter().cloned()).build();
    built.map(drop).map_err(|error| format!("a revocation list cannot be used: {error}"))
}

/// What a certificate is called here: two of them share a number with a chance of one in 10¹⁹.
pub(super) fn number(issuer: &[u8], serial: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    // Leading zeros are how the number is written.
    let serial = serial.iter().skip_while(|byte| **byte == 0).collect::<Vec<_>>();
    (issuer, serial).hash(&mut hasher);
    hasher.finish()
}
