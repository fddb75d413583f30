//! Who may connect to whom: what the control plane said of it, put in the forms in which kernel and proxy ask.
//!
//! `catalog` holds the policies and knows which apply to a workload; `shared` judges single connections for the proxies.
//! [`Policies`] belongs to the owner of the snapshot: it gives every workload the number of its set of policies, and plans what
//! the kernel must hold so that it can decide by numbers (`table`). All of it is pure, but for the lock in `shared`.
//!
//! Nothing fails open: before policies have come, where a workload names one that has not, and where one that applies is not
//! understood, the workload's set refuses everything, by the name of what is missing.

mod catalog;
mod classes;
mod denials;
mod ledger;
mod numbers;
mod plan;
mod policies;
mod sets;
mod shared;
mod table;
#[cfg(test)]
pub(crate) mod testing;

pub use catalog::Cause;
pub use classes::Bearing;
pub use denials::{Caller, Denials, DenialsView, Refusal, Side};
pub use plan::{PolicyPlan, VerdictMaps};
pub use policies::{Counts, Policies};
pub use shared::{Judgement, Shared};

/// Stands for a policy where none has come yet, so that nobody can know what is allowed.
pub const NOT_ARRIVED: &str = "not-arrived";
/// Stands for a policy where the kernel has no verdict, not yet or for want of room.
pub const NO_VERDICT: &str = "no-verdict";
/// Stands for a policy where there are ALLOW policies and none matches.
pub const NO_MATCH: &str = "no-allow-matches";
