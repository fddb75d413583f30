//! Who the workloads of this node are, and the certificates that show it.
//!
//! Parts without IO, in reading order: `spiffe` names identities, `request` and `answer` are the two messages of a
//! certificate authority, `schedule` decides when which certificate is fetched, `announced` which ones the node needs. Around
//! them: `access` opens connections to the control plane, `store` holds what is in force, `trust` the roots, `task` ties them together. Private
//! keys are made here and never written anywhere.

pub mod access;
mod announced;
pub mod answer;
mod authority;
pub mod report;
pub mod request;
pub mod schedule;
mod spiffe;
mod store;
mod task;
mod trust;

#[cfg(test)]
pub(crate) mod testing;

use std::sync::Arc;
use std::time::SystemTime;

pub use announced::{Announced, PATIENCE, Wanted, spiffe_of};
pub use spiffe::{InvalidSpiffeId, SpiffeId, names_node};
pub use store::Store;
pub use task::run;
pub use trust::{Roots, Trust};

/// The certificate of a workload with all that a handshake needs.
#[derive(Debug)]
pub struct WorkloadCertificate {
    /// Chain (without root) and private key.
    pub certified: Arc<rustls::sign::CertifiedKey>,
    /// Whom to trust: the roots of the last answer of the certificate authority.
    pub roots: Arc<rustls::RootCertStore>,
    /// When it expires.
    pub not_after: SystemTime,
    /// Another one for each renewal and whenever the roots change.
    pub serial: u64,
}

/// Certificates of the workloads of this node.
pub trait Certificates: Send + Sync {
    /// The one to use for `id` now; `None` when there is none yet, or it has expired.
    fn current(&self, id: &SpiffeId) -> Option<Arc<WorkloadCertificate>>;

    /// Whom to trust now, whatever certificate one has.
    fn trusted(&self) -> &Arc<Trust>;
}
