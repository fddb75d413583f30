//! The certificates in force, and whom to trust: one writer, many readers.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::SystemTime;

use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use super::answer::{self, Answer, Bundle};
use super::{Certificates, SpiffeId, Trust, WorkloadCertificate};

/// Certificates by identity, and this node's own.
#[derive(Debug, Default)]
pub struct Store {
    held: RwLock<Held>,
    trust: Arc<Trust>,
    /// Sent when this node's own certificate is another one.
    renewed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Held {
    workloads: HashMap<SpiffeId, Entry>,
    node: Option<OwnCertificate>,
    roots: Option<Bundle>,
    /// The order whose answer brought the roots.
    roots_of: u64,
    serial: u64,
}

#[derive(Debug)]
struct Entry {
    not_before: SystemTime,
    number: String,
    certificate: Arc<WorkloadCertificate>,
}

/// This node's own certificate, for TLS to the control plane.
#[derive(Debug, Clone)]
pub struct OwnCertificate {
    /// Chain and private key.
    pub certified: Arc<CertifiedKey>,
    /// When it expires.
    pub not_after: SystemTime,
    /// Another one for each renewal.
    pub serial: u64,
}

impl Certificates for Store {
    fn current(&self, id: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        self.at(id, SystemTime::now())
    }

    fn trusted(&self) -> &Arc<Trust> {
        &self.trust
    }
}

impl Store {
    /// The certificate to use for `id` at that time.
    pub fn at(&self, id: &SpiffeId, now: SystemTime) -> Option<Arc<WorkloadCertificate>> {
        let held = self.read();
        let entry = held.workloads.get(id)?;
        (entry.not_before <= now && now < entry.certificate.not_after).then(|| Arc::clone(&entry.certificate))
    }

    /// This node's own certificate at that time.
    pub fn node(&self, now: SystemTime) -> Option<OwnCertificate> {
        self.read().node.clone().filter(|own| now < own.not_after)
    }

    /// X.509 serial number of the certificate of `id`, and its serial number here.
    pub fn numbers(&self, id: &SpiffeId) -> Option<(String, u64)> {
        let held = self.read();
        held.workloads.get(id).map(|entry| (entry.number.clone(), entry.certificate.serial))
    }

    /// Takes the certificate of a workload in. Whether it leads to the roots that are trusted now: those of a later order may
    /// have come first.
    pub fn put(&self, id: SpiffeId, answer: &Answer, now: SystemTime) -> bool {
        let held = &mut *self.write();
        let roots = held.roots.as_ref().unwrap_or(&answer.roots);
        let leads = *roots == answer.roots || answer::verify(&answer.certified.cert, roots, now).is_ok();
        held.serial += 1;
        let certificate = WorkloadCertificate {
            certified: Arc::clone(&answer.certified),
            roots: Arc::clone(&roots.store),
            not_after: answer.not_after,
            serial: held.serial,
        };
        let entry = Entry {
            not_before: answer.not_before,
            number: answer.number.clone(),
            certificate: Arc::new(certificate),
        };
        held.workloads.insert(id, entry);
        leads
    }

    /// Takes this node's own in, or that there is none.
    pub fn put_node(&self, answer: Option<&Answer>) {
        let held = &mut *self.write();
        held.serial += 1;
        held.node = answer.map(|answer| OwnCertificate {
            certified: Arc::clone(&answer.certified),
            not_after: answer.not_after,
            serial: held.serial,
        });
        // Whoever is woken waits for what this one holds until it is done.
        self.renewed.send_replace(());
    }

    /// Wakes whoever waits when this node's own certificate is another one, or is no more.
    pub fn renewed(&self) -> watch::Receiver<()> {
        self.renewed.subscribe()
    }

    /// Takes the roots that came with the answer to the order `ticket`. If they are others than before, every certificate gets
    /// another serial; the identities whose certificates do not lead to the new roots are returned.
    ///
    /// Answers may overtake each other: the roots of an order that was made earlier are not the newer ones.
    pub fn trust(&self, roots: &Bundle, ticket: u64, now: SystemTime) -> Vec<SpiffeId> {
        let held = &mut *self.write();
        if ticket < held.roots_of {
            return Vec::new();
        }
        held.roots_of = ticket;
        if held.roots.as_ref() == Some(roots) {
            return Vec::new();
        }
        held.roots = Some(roots.clone());
        let mut strange = Vec::new();
        for (id, entry) in &mut held.workloads {
            held.serial += 1;
            if answer::verify(&entry.certificate.certified.cert, roots, now).is_err() {
                strange.push(id.clone());
            }
            entry.certificate = Arc::new(WorkloadCertificate {
                certified: Arc::clone(&entry.certificate.certified),
                roots: Arc::clone(&roots.store),
                not_after: entry.certificate.not_after,
                serial: held.serial,
            });
        }
        // After the certificates: whoever learns of it finds these roots with each of them.
        self.trust.set(Arc::clone(&roots.store));
        strange
    }

    /// Drops the certificate of an identity that has no workload here any more.
    pub fn forget(&self, id: &SpiffeId) {
        self.write().workloads.remove(id);
    }

    // Nothing in here panics half-way through a change; a reader that panicked with the lock has changed nothing.
    fn read(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
