//! Hears from the control plane by delta ADS.
//!
//! `session` decides what to say, `backoff` when to try again; both are pure. `client` owns the connection. What is held
//! belongs to the receiver of the events: a stream begins by asking it, so there is no second copy that could differ.

pub mod backoff;
mod client;
pub mod session;

use std::collections::HashMap;

use tokio::sync::oneshot;

pub(crate) use client::random;
pub use client::run;

use crate::snapshot::{Delta, PolicyUpdate, Rejected};

/// Name and version of what is held, by type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions {
    /// Services and workloads.
    pub addresses: HashMap<String, String>,
    /// Policies.
    pub policies: HashMap<String, String>,
}

/// What became of a change that is in force.
#[derive(Debug, Default)]
pub struct Applied {
    /// The resources that could not be taken.
    pub refused: Vec<Rejected>,
    /// Told when the response may be acknowledged, which holds up no other; `None`: now. Dropping it says so, too.
    pub saved: Option<oneshot::Receiver<()>>,
}

/// What the client tells the owner of the snapshot.
#[derive(Debug)]
pub enum XdsEvent {
    /// A stream is about to begin: which resources, at which versions, are held?
    Versions {
        /// Takes the answer.
        reply: oneshot::Sender<Versions>,
    },
    /// The control plane took the stream.
    Connected,
    /// There is no stream any more, or none could be had. Another attempt follows by itself.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// The control plane said something.
    Delta {
        /// What changes.
        delta: Delta,
        /// Resources of the response that are in no shape to be used.
        rejected: Vec<Rejected>,
        /// The control plane has now said all that it knows. This usually comes with a change that is empty, when it has
        /// been silent for a while; it stays true for the rest of the stream.
        synced: bool,
        /// To be answered when the change is in force. Dropping it ends the client.
        applied: oneshot::Sender<Applied>,
    },
    /// The control plane said something of policies. Those that are not understood are in it, too: nobody may drop them.
    Policies {
        /// What changes.
        update: PolicyUpdate,
        /// The control plane has now named all policies; as in [`XdsEvent::Delta`].
        synced: bool,
        /// As in [`XdsEvent::Delta`].
        applied: oneshot::Sender<Applied>,
    },
}
