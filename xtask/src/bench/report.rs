//! Figures with their targets: a table for people, JSON for programs.

use anyhow::Result;
use serde_json::{Value, json};

use super::machine;

/// What a figure should reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Target {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
    /// Neither less nor more.
    Within(f64, f64),
    /// Shown beside the others.
    None,
}

impl Target {
    fn met(self, value: f64) -> Option<bool> {
        match self {
            Self::AtLeast(limit) => Some(value >= limit),
            Self::AtMost(limit) => Some(value <= limit),
            Self::Within(low, high) => Some((low..=high).contains(&value)),
            Self::None => None,
        }
    }

    fn text(self) -> Option<String> {
        match self {
            Self::AtLeast(limit) => Some(format!("≥ {limit}")),
            Self::AtMost(limit) => Some(format!("≤ {limit}")),
            Self::Within(low, high) => Some(format!("{low} to {high}")),
            Self::None => None,
        }
    }
}

struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    spread: f64,
    target: Target,
}

/// The figures of one run.
pub(crate) struct Report {
    name: &'static str,
    conditions: Vec<String>,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, conditions: Vec::new(), rows: Vec::new() }
    }

    /// What was so while it was measured, besides the machine.
    pub(crate) fn under(&mut self, condition: String) {
        self.conditions.push(condition);
    }

    fn place(&self) -> String {
        [vec![machine::describe()], self.conditions.clone()].concat().join(", ")
    }

    /// Adds the median of `samples`.
    pub(crate) fn add(
        &mut self,
        what: impl Into<String>,
        samples: &[f64],
        unit: &'static str,
        target: Target,
    ) {
        let (value, spread) = (quantile(samples, 0.5), quantile(samples, 0.75) - quantile(samples, 0.25));
        self.rows.push(Row { what: what.into(), value, unit, spread, target });
    }

    /// Adds a figure that is not a median, with the spread it was found with.
    pub(crate) fn add_value(
        &mut self,
        what: &str,
        value: f64,
        spread: f64,
        unit: &'static str,
        target: Target,
    ) {
        self.rows.push(Row { what: what.into(), value, unit, spread, target });
    }

    pub(crate) fn print(&self) {
        let width = self.rows.iter().map(|row| row.what.chars().count()).max().unwrap_or(0);
        println!("\n{}: {}\n", self.name, self.place());
        println!(
            "{:<width$}  {:>12}  {:>10}  {:<9} {:<14} met",
            "what", "median", "spread", "unit", "target"
        );
        for row in &self.rows {
            let (target, met) = (row.target.text().unwrap_or_default(), row.target.met(row.value));
            let met = met.map_or("", |met| if met { "yes" } else { "NO" });
            println!(
                "{:<width$}  {:>12}  {:>10}  {:<9} {target:<14} {met}",
                row.what,
                figures(row.value),
                figures(row.spread),
                row.unit
            );
        }
    }

    pub(crate) fn json(&self) -> Result<String> {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "what": row.what, "value": row.value, "unit": row.unit, "spread": row.spread,
                    "target": row.target.text(), "met": row.target.met(row.value),
                })
            })
            .collect();
        let report = json!({"name": self.name, "machine": self.place(), "rows": rows});
        Ok(serde_json::to_string_pretty(&report)? + "\n")
    }
}

/// Three or more significant figures.
fn figures(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// The value below which `part` of the samples lie, between neighbours in proportion.
pub(crate) fn quantile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let samples = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(
            (quantile(&samples, 0.5), quantile(&samples, 0.0), quantile(&samples, 1.0)),
            (2.5, 1.0, 4.0)
        );
    }

    #[test]
    fn a_missed_target_is_said_to_be_missed() {
        assert_eq!(Target::AtLeast(0.97).met(0.96), Some(false));
        assert_eq!(Target::Within(0.98, 1.02).met(1.02), Some(true));
        assert_eq!(Target::None.met(1.0), None);
    }
}
