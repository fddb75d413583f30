//! Whether this machine and these privileges suffice, in sentences that say what to do.
//!
//! `facts` looks, `judge` decides (pure), so every verdict is tested without the machine that deserves it.

mod facts;
mod features;
mod judge;

use std::fmt;

pub use facts::{CAPABILITIES, Capability, Facts};
pub use judge::judge;

use crate::config::Config;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub name: String,
    /// Whether it is as needed.
    pub ok: bool,
    /// What was found; if not ok: what is missing and what to do.
    pub detail: String,
}

/// All that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In the order in which a person would mend them.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether everything is as needed.
    pub fn ok(&self) -> bool {
        self.checks.iter().all(|check| check.ok)
    }

    /// What is missing.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.ok)
    }

    /// Exit status of `mesh-agent check`.
    pub fn exit_code(&self) -> u8 {
        if self.ok() { 0 } else { 1 }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            writeln!(f, "{mark}  {:width$}  {}", check.name, check.detail)?;
        }
        match self.failed().count() {
            0 => writeln!(f, "This machine can run the agent."),
            1 => writeln!(f, "This machine cannot run the agent: 1 check failed."),
            failed => writeln!(f, "This machine cannot run the agent: {failed} checks failed."),
        }
    }
}

/// Looks at this machine.
pub fn check(config: &Config) -> Report {
    judge(&Facts::gather(&config.datapath))
}

#[cfg(test)]
mod tests;
