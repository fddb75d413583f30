//! The tiers, in the order in which they run: what fails fast comes first.

use anyhow::Result;

use super::Outcome;
use super::targets::{TestFile, others, with_prefix};
use super::{cargo_test, deny};
use crate::command::{cargo, run, watch};
use crate::{debian, ebpf, fuzz, systemd, vm};

/// A group of tests with the same needs.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Tier {
    /// The source is formatted.
    Fmt,
    /// The kernel programs and everything else compile.
    Build,
    /// No lint warns.
    Clippy,
    /// Tests beside the code.
    Unit,
    /// The control plane in process.
    Api,
    /// Each hook with real traffic, on this kernel.
    Kernel,
    /// Nodes and pods with real processes.
    Node,
    /// Real third-party programs.
    Interop,
    /// Each hook on Debian's kernels.
    Vm,
    /// Each parser, for a few seconds.
    Fuzz,
    /// The units are valid, and confine what they start.
    Systemd,
    /// The documentation builds without a warning.
    Doc,
    /// Licences, duplicate and banned crates.
    Deny,
}

/// How long each fuzz target runs.
const FUZZ_SECONDS: u32 = 12;
/// Programs that the namespaces of the tests need, what peers are made of that are not ours, and what moves a clock.
const NODE_PACKAGES: &[&str] = &["iproute2", "iptables", "procps", "openssl", "python3-h2", "libfaketime"];

impl Tier {
    pub(crate) const ALL: [Self; 13] = [
        Self::Fmt,
        Self::Build,
        Self::Clippy,
        Self::Unit,
        Self::Api,
        Self::Kernel,
        Self::Node,
        Self::Interop,
        Self::Vm,
        Self::Fuzz,
        Self::Systemd,
        Self::Doc,
        Self::Deny,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Build => "build",
            Self::Clippy => "clippy",
            Self::Unit => "unit",
            Self::Api => "api",
            Self::Kernel => "kernel",
            Self::Node => "node",
            Self::Interop => "interop",
            Self::Vm => "vm",
            Self::Fuzz => "fuzz",
            Self::Systemd => "systemd",
            Self::Doc => "doc",
            Self::Deny => "deny",
        }
    }

    pub(crate) fn run(self) -> Result<Outcome> {
        match self {
            Self::Fmt => one(cargo().args(["fmt", "--all", "--check"])),
            Self::Build => build(),
            Self::Clippy => one(cargo().args(["clippy", "--all-targets", "--", "--deny", "warnings"])),
            Self::Unit => unit(),
            Self::Api => tier("api_"),
            Self::Kernel => kernel(),
            Self::Node => node("node_"),
            Self::Interop => node("interop_"),
            Self::Vm => virtual_machines(),
            Self::Fuzz => fuzz::check(&fuzz::targets()?, FUZZ_SECONDS),
            Self::Systemd => systemd::check(),
            Self::Doc => one(cargo().args(["doc", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings")),
            Self::Deny => deny::check(),
        }
    }
}

fn one(command: &mut std::process::Command) -> Result<Outcome> {
    run(command).map(|()| Outcome::passed())
}

fn build() -> Result<Outcome> {
    ebpf::build(false)?;
    run(cargo().arg("build"))?;
    Ok(Outcome { passed: 2, ..Outcome::default() })
}

/// Everything beside the code, and test files of no tier.
fn unit() -> Result<Outcome> {
    // Some of these start programs of the workspace.
    run(cargo().arg("build"))?;
    let mut outcome = cargo_test::run(cargo().args(["test", "--no-fail-fast", "--lib", "--bins"]))?;
    outcome.add(cargo_test::run(cargo().args(["test", "--no-fail-fast", "--doc"]))?);
    let files = others()?;
    if !files.is_empty() {
        outcome.add(cargo_test::run(&mut of(&files))?);
    }
    Ok(outcome)
}

fn tier(prefix: &str) -> Result<Outcome> {
    let files = with_prefix(prefix)?;
    if files.is_empty() {
        return Ok(Outcome::skipped(format!("there is no {prefix}* test yet")));
    }
    cargo_test::run(&mut of(&files))
}

/// `cargo test` of these files.
fn of(files: &[TestFile]) -> std::process::Command {
    let mut command = cargo();
    command.args(["test", "--no-fail-fast"]);
    for file in files {
        command.args(["--test", &file.name]);
    }
    command
}

fn kernel() -> Result<Outcome> {
    if !debian::is_root() {
        return Ok(Outcome::skipped("kernel tests: loading programs needs root"));
    }
    ebpf::build(false)?;
    let mut verdict = None;
    let mut problems = Vec::new();
    let mut command = cargo();
    command.args(["run", "--quiet", "--package", "mesh-kernel-tests", "--bin", "mesh-kernel-tests"]);
    let succeeded = watch(&mut command, |line| {
        verdict = verdict.or_else(|| vm::parse(line));
        problems.extend(line.strip_prefix("FAILED ").map(str::to_owned));
    })?;
    match verdict {
        Some(verdict) if succeeded == (verdict.failed == 0) => {
            Ok(Outcome { passed: verdict.passed, failed: verdict.failed, problems, ..Outcome::default() })
        }
        Some(_) | None => anyhow::bail!("the kernel tests did not finish"),
    }
}

/// Tests with real nodes: as many at a time as there are processors, each in namespaces of its own.
fn node(prefix: &str) -> Result<Outcome> {
    if !debian::is_root() {
        return Ok(Outcome::skipped(format!("{prefix}* tests: network namespaces and cgroups need root")));
    }
    let files = with_prefix(prefix)?;
    if files.is_empty() {
        return Ok(Outcome::skipped(format!("there is no {prefix}* test yet")));
    }
    debian::ensure(NODE_PACKAGES, "the nodes of the tests")?;
    ebpf::build(false)?;
    // The nodes run the programs, which `cargo test` builds only for the packages it tests.
    run(cargo().arg("build"))?;
    cargo_test::run(of(&files).args(["--", "--test-threads=2"]))
}

fn virtual_machines() -> Result<Outcome> {
    if !debian::has_apt() {
        return Ok(Outcome::skipped("other kernels: they are Debian packages, and this system has no apt"));
    }
    let tester = vm::prepare()?;
    let mut outcome = Outcome::default();
    for (series, verdict) in vm::on_kernels(vm::SERIES, &tester, "") {
        outcome.add(match verdict {
            Ok(verdict) => {
                let problems =
                    (verdict.failed > 0).then(|| format!("{} tests on Linux {series}", verdict.failed));
                let problems = problems.into_iter().collect();
                Outcome { passed: verdict.passed, failed: verdict.failed, problems, ..Outcome::default() }
            }
            Err(error) => Outcome {
                failed: 1,
                problems: vec![format!("Linux {series}: {error:#}")],
                ..Outcome::default()
            },
        });
    }
    Ok(outcome)
}
