//! Who may connect to whom, at L4, as Istio means it.
//!
//! A policy is read from `istio.security.Authorization` whole, or refused with the field that is wrong: half a policy would
//! admit what its author did not. What holds for a connection is worked out by [`evaluate`], without IO and without state.
//! A verdict can be tabulated as well: [`Mentions`] says by which ports and blocks of addresses the outcome can differ.

mod block;
mod evaluate;
mod mentions;
mod model;
mod parse;
#[cfg(test)]
mod sample;

pub use block::Block;
pub use evaluate::{Attempt, Decision, Principal, Ref, SourceIp, evaluate, rehearse};
pub use mentions::Mentions;
pub use model::{Account, Action, Clause, Match, Policy, Rule, Scope, Text};
pub use parse::Invalid;
