//! `cargo xtask fuzz`: each parser against what nobody would send, with libFuzzer.
//!
//! The instrumentation is a pass of the stable compiler; the targets need no nightly and no `cargo fuzz`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, run as execute, timed};
use crate::test::Outcome;
use crate::{debian, paths};

/// What `cargo fuzz` gives the compiler, without its sanitizer: that one needs nightly.
const INSTRUMENTATION: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Where the targets are, and under `seeds/TARGET` what they begin with.
const FOLDER: &str = "tests/fuzz";

/// `cargo xtask fuzz`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets: the files of tests/fuzz/fuzz_targets; all without one.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each runs.
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let known = targets()?;
    if let Some(stranger) = args.targets.iter().find(|name| !known.contains(name)) {
        bail!("TARGET {stranger}: there are {}", known.join(", "));
    }
    let wanted = if args.targets.is_empty() { known } else { args.targets.clone() };
    let outcome = check(&wanted, args.seconds)?;
    if outcome.failed > 0 {
        bail!("{}", outcome.problems.join("; "));
    }
    Ok(())
}

/// The names of all targets.
pub(crate) fn targets() -> Result<Vec<String>> {
    let folder = paths::root().join(FOLDER).join("fuzz_targets");
    let files = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let stem = |file: std::fs::DirEntry| Some(file.path().file_stem()?.to_string_lossy().into_owned());
    let mut names: Vec<String> = files.flatten().filter_map(stem).collect();
    names.sort();
    Ok(names)
}

/// Builds the targets and runs each for so many seconds, two at a time.
pub(crate) fn check(targets: &[String], seconds: u32) -> Result<Outcome> {
    debian::ensure(&["g++"], "libFuzzer")?;
    let folder = paths::own_target().join("fuzz");
    timed("building the fuzz targets (the first time with all they depend on: about three minutes)", || {
        let mut build = cargo();
        build.args(["build", "--profile", "fuzz", "--package", "mesh-fuzz", "--target", TRIPLE]);
        execute(build.env("CARGO_TARGET_DIR", &folder).env("RUSTFLAGS", INSTRUMENTATION))
    })?;
    let mut outcome = Outcome::default();
    for pair in targets.chunks(2) {
        let results = std::thread::scope(|scope| {
            let running: Vec<_> =
                pair.iter().map(|target| scope.spawn(|| fuzz(target, seconds, &folder))).collect();
            let wait = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
                thread.join().unwrap_or_else(|_panic| Err(anyhow::anyhow!("panicked")))
            };
            running.into_iter().map(wait).collect::<Vec<_>>()
        });
        for (target, result) in pair.iter().zip(results) {
            outcome.add(match result {
                Ok(()) => Outcome::passed(),
                Err(error) => Outcome {
                    failed: 1,
                    problems: vec![format!("{target}: {error:#}")],
                    ..Outcome::default()
                },
            });
        }
    }
    Ok(outcome)
}

fn fuzz(target: &str, seconds: u32, folder: &std::path::Path) -> Result<()> {
    let make = |kind: &str| -> Result<PathBuf> {
        let path = folder.join(kind).join(target);
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    };
    // New inputs are kept in the first folder; seeds are only read.
    let (corpus, artifacts) = (make("corpus")?, make("artifacts")?);
    let seeds = paths::root().join(FOLDER).join("seeds").join(target);
    let mut command = Command::new(folder.join(TRIPLE).join("fuzz").join(target));
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()));
    // A hang is ten seconds, as much memory is more than any input of this size may cost.
    command.args(["-timeout=10", "-rss_limit_mb=1024", "-max_len=16384", "-print_final_stats=1"]).arg(corpus);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    let output = command.output().with_context(|| format!("cannot start {target}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let runs = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    if output.status.success() {
        println!("xtask: {target}: {} inputs in {seconds} s, none did harm", runs.unwrap_or("?").trim());
        return Ok(());
    }
    let end: Vec<&str> = said.lines().rev().take(30).collect();
    bail!("{}\n{}", output.status, end.into_iter().rev().collect::<Vec<_>>().join("\n"))
}
