//! Runs `cargo test` and adds up what its test programs count.

use std::process::Command;

use anyhow::Result;

use super::Outcome;
use crate::command::{line, watch};
use crate::debian;

/// Runs the command and counts.
pub(crate) fn run(command: &mut Command) -> Result<Outcome> {
    println!("xtask: {}", line(command));
    if debian::is_root() {
        // Root has all that a test may ask for, so none may pass by not running.
        command.env("MESH_REQUIRE", "1");
    }
    let mut outcome = Outcome::default();
    let succeeded = watch(command, |text| outcome.add(count(text)))?;
    if !succeeded && outcome.failed == 0 {
        // It did not compile, or a test program crashed before its summary.
        outcome.failed = 1;
        outcome.problems.push(format!("`{}` did not finish", line(command)));
    }
    Ok(outcome)
}

/// What one line of a test program's output adds.
fn count(line: &str) -> Outcome {
    if let Some(summary) = line.strip_prefix("test result: ") {
        let number = |what: &str| -> u32 {
            let parts = summary.split(['.', ';']).map(str::trim);
            parts
                .filter_map(|part| part.strip_suffix(what))
                .find_map(|count| count.trim().parse().ok())
                .unwrap_or(0)
        };
        return Outcome { passed: number(" passed"), failed: number(" failed"), ..Outcome::default() };
    }
    let Some((test, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) else {
        return Outcome::default();
    };
    if let Some(reason) = result.strip_prefix("ignored") {
        let reason = reason.trim_start_matches([',', ' ']);
        let reason = if reason.is_empty() { "ignored in the source" } else { reason };
        return Outcome::skipped(format!("{test}: {reason}"));
    }
    if result == "FAILED" {
        return Outcome { problems: vec![test.to_owned()], ..Outcome::default() };
    }
    Outcome::default()
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn counts_come_from_the_summary_and_names_from_the_lines() {
        let summary =
            count("test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out");
        assert_eq!((summary.passed, summary.failed), (12, 2));
        assert_eq!(count("test a::b ... ignored, needs root").skipped, ["a::b: needs root"]);
        assert_eq!(count("test a::b ... FAILED").problems, ["a::b"]);
        assert_eq!(count("test a::b ... ok"), super::Outcome::default());
        assert_eq!(count("testing"), super::Outcome::default());
    }
}
