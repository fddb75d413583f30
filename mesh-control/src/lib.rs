//! The control plane: manifests in, the workload API out.
//!
//! ```text
//! source (directory) → manifest (parse) → store → index → catalog ══ delta ADS ══ agents
//!                          files → keeper → ca, auth → certificates ══ TLS ══════════ agents
//! ```
//!
//! `manifest`, `store`, `index`, `catalog`, `explain`, `xds::session`, `xds::subscriptions`, `auth`, `identity` and what signs in `ca` are
//! pure; the shells around them are `source`, `last_good`, `joined`, `pipeline`, `keeper`, `tls`, `certificates`, `xds::server`, `management`
//! and `health`; `connections` says how many callers may come, and for how long they may do nothing.
//! `pipeline` is the only writer of what is served, `keeper` of what callers are judged and certified by.

mod app;
mod auth;
pub mod ca;
mod catalog;
mod certificates;
mod config;
mod connections;
mod descriptors;
mod duration;
mod explain;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod health;
mod identity;
mod index;
mod joined;
mod keeper;
mod last_good;
mod management;
pub mod manifest;
mod metrics;
mod pipeline;
mod source;
mod store;
mod tls;
mod xds;

pub use app::ControlPlane;
pub use config::Config;
pub use descriptors::allow_descriptors;
pub use duration::parse as parse_duration;
