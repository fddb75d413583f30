//! What ran, what it counted, how long it took, and what was skipped and why.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::command::seconds;

/// What one tier found. A tier that counts nothing itself counts as one.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    /// Each thing skipped, with the reason.
    pub(crate) skipped: Vec<String>,
    /// What went wrong, for the list at the end.
    pub(crate) problems: Vec<String>,
}

impl Outcome {
    pub(crate) fn passed() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    pub(crate) fn skipped(reason: impl Into<String>) -> Self {
        Self { skipped: vec![reason.into()], ..Self::default() }
    }

    /// Adds what another part of the same tier found.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
        self.problems.extend(other.problems);
    }
}

struct Line {
    tier: &'static str,
    outcome: Outcome,
    time: Duration,
}

/// All tiers so far.
#[derive(Default)]
pub(crate) struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// Runs a tier; an error is one failure.
    pub(crate) fn run(&mut self, tier: &'static str, action: impl FnOnce() -> Result<Outcome>) {
        println!("\n== {tier}");
        let start = Instant::now();
        let outcome = action().unwrap_or_else(|error| {
            println!("xtask: {error:#}");
            Outcome { failed: 1, problems: vec![format!("{error:#}")], ..Outcome::default() }
        });
        let time = start.elapsed();
        println!("== {tier}: {}, {}", summary(&outcome), seconds(time));
        self.lines.push(Line { tier, outcome, time });
    }

    /// The list at the end.
    pub(crate) fn print(&self) {
        println!("\n{:<10} {:>10}  result", "tier", "time");
        for line in &self.lines {
            println!("{:<10} {:>10}  {}", line.tier, seconds(line.time), summary(&line.outcome));
        }
        for line in &self.lines {
            for reason in &line.outcome.skipped {
                println!("skipped in {}: {reason}", line.tier);
            }
        }
        for line in &self.lines {
            for problem in &line.outcome.problems {
                println!("failed in {}: {problem}", line.tier);
            }
        }
    }

    /// `N passed, M failed, K skipped`
    pub(crate) fn closing_line(&self) -> String {
        let passed: u32 = self.lines.iter().map(|line| line.outcome.passed).sum();
        let skipped: usize = self.lines.iter().map(|line| line.outcome.skipped.len()).sum();
        format!("{passed} passed, {} failed, {skipped} skipped", self.failed())
    }

    pub(crate) fn failed(&self) -> u32 {
        self.lines.iter().map(|line| line.outcome.failed).sum()
    }

    /// The names of the tiers that failed.
    pub(crate) fn failures(&self) -> String {
        let failed = self.lines.iter().filter(|line| line.outcome.failed > 0).map(|line| line.tier);
        format!("failed: {}", failed.collect::<Vec<_>>().join(", "))
    }
}

fn summary(outcome: &Outcome) -> String {
    format!("{} passed, {} failed, {} skipped", outcome.passed, outcome.failed, outcome.skipped.len())
}

#[cfg(test)]
mod tests {
    use super::{Outcome, Report};

    #[test]
    fn the_closing_line_adds_up_and_an_error_is_a_failure() {
        let mut report = Report::default();
        report.run("one", || Ok(Outcome::passed()));
        report.run("two", || Ok(Outcome::skipped("not root")));
        report.run("three", || anyhow::bail!("broken"));
        assert_eq!(report.closing_line(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(report.failures(), "failed: three");
    }
}
