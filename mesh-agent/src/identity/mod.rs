//! Who a workload is, and the certificate that proves it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

/// `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: Arc<str>,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

/// Not the identity of a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a workload's SPIFFE identity (spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT)")]
pub struct NotAWorkload;

impl FromStr for SpiffeId {
    type Err = NotAWorkload;

    fn from_str(text: &str) -> Result<Self, NotAWorkload> {
        let mut parts = text.strip_prefix("spiffe://").ok_or(NotAWorkload)?.split('/');
        let mut segment = || {
            let valid = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
            parts.next().filter(|part| !part.is_empty() && part.bytes().all(valid)).ok_or(NotAWorkload)
        };
        let (trust_domain, ns, namespace, sa, service_account) =
            (segment()?, segment()?, segment()?, segment()?, segment()?);
        if ns != "ns" || sa != "sa" || parts.next().is_some() {
            return Err(NotAWorkload);
        }
        Ok(Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

/// A certificate with its key, and whom its holder trusts.
#[derive(Debug, Clone)]
pub struct WorkloadCertificate {
    /// Chain and key.
    pub certified: Arc<rustls::sign::CertifiedKey>,
    /// Issuers of the peers' certificates.
    pub roots: Arc<rustls::RootCertStore>,
    /// When it ends.
    pub not_after: SystemTime,
    /// Another for each renewal and for each change of the roots.
    pub serial: u64,
}

/// Where the certificates of this node's workloads are.
pub trait Certificates: Send + Sync {
    /// The certificate in force; none: not there yet, or expired.
    fn current(&self, id: &SpiffeId) -> Option<Arc<WorkloadCertificate>>;
}
