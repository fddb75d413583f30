//! TCP connections of a pod's network namespace, and ending those that may no longer be.
//!
//! The kernel lists and destroys them by netlink ([`Diag`]); [`message`] is that wire, [`revoke`] says which ones. Needs Linux 4.5 with
//! `CONFIG_INET_DIAG_DESTROY`; without it connections go on until they end by themselves, which [`Sweeper`] counts and says once.

mod connection;
mod diag;
pub mod message;
mod revoke;
mod sweep;

pub use connection::{Connection, State};
pub use diag::{Diag, DiagError};
pub use revoke::{Caller, Ground, Judge, revoke};
pub use sweep::{Counts, Sweeper, Swept};

#[cfg(test)]
mod tests;
