//! What the control plane said: services, the workloads behind them, who belongs to whom, and policies.
//!
//! Pure but for `disk` and `journal`. Messages are parsed once, at the edge (`decode`), into types that cannot hold a wrong value;
//! everything behind reads those. The size matters: a node holds the whole mesh, so what many workloads have in common
//! is stored once (`intern`).

mod authorization;
mod crc;
mod decode;
pub mod disk;
mod encode;
mod intern;
pub mod journal;
mod model;
mod records;
mod state;

pub use authorization::{Authorization, Content, PolicyUpdate, Reach};
pub use decode::{decode, decode_one};
pub use intern::Interner;
pub use model::{
    Account, Addresses, Algorithm, App, Controller, Delta, Kin, Locality, Membership, Mode, Place,
    PortMapping, Protocol, Rejected, Resource, Scope, Service, ServicePort, Version, Versioned, Workload,
    split_uid,
};
pub use state::{Changed, Held, Snapshot};

#[cfg(test)]
pub mod fixtures;
