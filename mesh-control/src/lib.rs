//! The control plane: manifests in, the workload API out.
//!
//! ```text
//! source (directory) → manifest (parse) → store → index → catalog ══ delta ADS ══ agents
//! ```
//!
//! `manifest`, `store`, `index`, `catalog` and `xds::session` are pure; the shells around them are `source`, `kept`,
//! `pipeline`, `xds::server`, `management` and `health`. `pipeline` is the only writer.

mod app;
mod catalog;
mod config;
mod health;
mod index;
mod kept;
mod management;
pub mod manifest;
mod metrics;
mod pipeline;
mod source;
mod store;
mod xds;

pub use app::ControlPlane;
pub use config::Config;
