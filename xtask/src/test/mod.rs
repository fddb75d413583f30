//! `cargo xtask test`: every tier that can run on this machine, and a clear list of what could not and why.

mod cargo_test;
mod deny;
mod report;
mod targets;
mod tiers;

use std::time::Instant;

use anyhow::{Result, bail};

use crate::command::seconds;
pub(crate) use report::Outcome;
use report::Report;
use tiers::Tier;

/// `cargo xtask test`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only this tier; may be repeated.
    #[arg(long, value_name = "TIER")]
    only: Vec<Tier>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut report = Report::default();
    for tier in Tier::ALL {
        let wanted = args.only.is_empty() || args.only.contains(&tier);
        if wanted {
            report.run(tier.name(), || tier.run());
        }
    }
    report.print();
    println!("xtask: all of it took {}", seconds(start.elapsed()));
    println!("{}", report.closing_line());
    if report.failed() > 0 {
        bail!("{}", report.failures());
    }
    Ok(())
}
