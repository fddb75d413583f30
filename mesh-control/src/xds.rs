//! Delta ADS: what agents subscribe to.

mod agents;
mod server;
mod session;
mod subscriptions;

pub(crate) use agents::Agents;
pub(crate) use server::{Discovery, Shared};
#[cfg(any(test, fuzzing))]
pub(crate) use session::{Answer, Next};
#[cfg(any(test, fuzzing))]
pub(crate) use subscriptions::{Offered, Subscriptions};
