//! `cargo xtask bench NAME`: how every figure of this project is taken.
//!
//! Rounds of all variants are interleaved, so that what disturbs the machine disturbs all of them; ratios are taken within
//! a round. Shown are medians, with the interquartile range as spread.

mod l4;
mod machine;
mod mtls;
mod report;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use report::Report;

/// `cargo xtask bench NAME`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure.
    name: Bench,
    /// Write the figures to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Rounds of each variant.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of each variant in a round.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// l4: services in the large case.
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// mtls: idle connections, for their memory.
    #[arg(long, default_value_t = 2_000)]
    idle: usize,
    /// mtls: pods of the node whose agent's memory is measured.
    #[arg(long, default_value_t = 50)]
    pods: usize,
    /// mtls: congestion control of all lanes, as Linux names it [default: this machine's]
    #[arg(long, value_name = "NAME")]
    congestion_control: Option<String>,
    /// mtls: only these, beside `direct`; ratios that lack one are left out.
    #[arg(long, value_name = "LANE", value_delimiter = ',', default_value = "stream,hbone,nginx,plain")]
    lanes: Vec<mtls::Kind>,
    /// mtls: only these figures.
    #[arg(
        long,
        value_name = "PART",
        value_delimiter = ',',
        default_value = "memory,throughput,round-trips,connects"
    )]
    parts: Vec<mtls::Part>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Bench {
    /// Kernel load balancing beside a direct connection and beside kube-proxy's iptables rules.
    L4,
    /// Mutual TLS between nodes, by our protocol and by HBONE, beside a direct connection and a pair of nginx.
    Mtls,
}

pub(crate) fn run(args: Args) -> Result<()> {
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    let mut report = Report::new(match args.name {
        Bench::L4 => "l4",
        Bench::Mtls => "mtls",
    });
    match args.name {
        Bench::L4 => l4::run(&args, &mut report)?,
        Bench::Mtls => mtls::run(&args, &mut report)?,
    }
    report.print();
    if let Some(file) = &args.json {
        std::fs::write(file, report.json()?).with_context(|| file.display().to_string())?;
        println!("written to {}", file.display());
    }
    Ok(())
}
