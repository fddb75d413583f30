//! What the agent can be asked: JSON on a unix socket for people, metrics and health on a port for machines.
//!
//! The state has one owner. Each question travels to it, and the answer back; nothing here reads the state itself.

mod http;
mod socket;
pub mod view;

use tokio::sync::oneshot;

pub use http::{serve_admin, serve_metrics};
pub use socket::bind;

use crate::metrics;
use crate::policy::DenialsView;

/// A question to the owner of the state, with where the answer goes.
#[derive(Debug)]
pub enum AdminRequest {
    /// How the agent is.
    Status(oneshot::Sender<view::Status>),
    /// The services in the kernel maps.
    Services(oneshot::Sender<Vec<view::Service>>),
    /// The workloads of this node.
    Workloads(oneshot::Sender<Vec<view::Workload>>),
    /// What the kernel counted.
    Stats(oneshot::Sender<view::Stats>),
    /// The certificates of this node and its workloads.
    Certificates(oneshot::Sender<Vec<view::Certificate>>),
    /// What policy refused.
    Denials(oneshot::Sender<DenialsView>),
    /// The figures of a scrape.
    Metrics(oneshot::Sender<metrics::View>),
    /// Whether a snapshot (from the control plane or the disk) is in force and certificates are there; why not, otherwise.
    Ready(oneshot::Sender<Result<(), String>>),
}
