//! Delta ADS: what agents subscribe to.

mod agents;
mod server;
mod session;

pub(crate) use agents::Agents;
pub(crate) use server::{Discovery, Shared};
