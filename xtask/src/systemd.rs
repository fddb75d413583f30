//! The systemd units: valid, confined to a score, and with enough capabilities for the agent's own check.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{line, output, run};
use crate::test::Outcome;
use crate::{debian, paths};

/// A unit, and the exposure (in tenths, of 100) that `systemd-analyze security` may find at most.
struct Unit {
    program: &'static str,
    threshold: &'static str,
}

/// Measured: the agent 2.9 (root, BPF, NET_ADMIN, and for pods' network namespaces SYS_ADMIN and SYS_PTRACE), the control plane 1.2.
const UNITS: &[Unit] =
    &[Unit { program: "mesh-agent", threshold: "30" }, Unit { program: "mesh-control", threshold: "13" }];

/// Where the units expect the programs.
const INSTALLED: &str = "/usr/local/bin/";

pub(crate) fn check() -> Result<Outcome> {
    if let Err(error) = debian::ensure(&["systemd"], "checking the units") {
        return Ok(Outcome::skipped(format!("units: {error:#}")));
    }
    let mut outcome = Outcome::default();
    for unit in UNITS {
        verify(unit)?;
        score(unit)?;
        outcome.add(Outcome { passed: 2, ..Outcome::default() });
    }
    outcome.add(agent_with_its_capabilities()?);
    Ok(outcome)
}

fn file(unit: &Unit) -> PathBuf {
    paths::root().join(format!("deploy/systemd/{}.service", unit.program))
}

/// A copy of the unit that starts the program just built: `verify` wants the program to exist.
fn verify(unit: &Unit) -> Result<()> {
    let source = file(unit);
    let text =
        std::fs::read_to_string(&source).with_context(|| format!("cannot read {}", source.display()))?;
    let program = paths::program(unit.program);
    if !program.exists() {
        bail!("{} is not built; run `cargo build`", program.display());
    }
    let folder = program.parent().unwrap_or(Path::new("/"));
    let copy = paths::own_target().join(format!("{}.service", unit.program));
    std::fs::write(&copy, text.replace(INSTALLED, &format!("{}/", folder.display())))
        .with_context(|| format!("cannot write {}", copy.display()))?;
    let mut verify = Command::new("systemd-analyze");
    let said =
        verify.args(["verify", "--man=no"]).arg(&copy).output().context("cannot start systemd-analyze")?;
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    // Units of the system itself are none of ours, and an unknown setting is a warning to systemd.
    let ours: Vec<&str> = said.lines().filter(|text| text.contains(unit.program)).collect();
    if !ours.is_empty() {
        bail!("`{}`: {}", line(&verify), ours.join("; "));
    }
    println!("xtask: {}.service is valid", unit.program);
    Ok(())
}

fn score(unit: &Unit) -> Result<()> {
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--offline=true", "--no-pager", "--threshold", unit.threshold]).arg(file(unit));
    let said = output(&mut analyze)?;
    let overall = said.lines().find(|text| text.contains("Overall exposure level"));
    println!("xtask: {}", overall.context("systemd-analyze security gave no score")?.trim());
    Ok(())
}

/// `mesh-agent check` as root with the unit's capabilities and no others.
fn agent_with_its_capabilities() -> Result<Outcome> {
    if !debian::is_root() {
        return Ok(Outcome::skipped(
            "mesh-agent check with the unit's capabilities: giving some up needs root",
        ));
    }
    let Some(unit) = UNITS.first() else { bail!("there is no unit") };
    let text = std::fs::read_to_string(file(unit))
        .with_context(|| format!("cannot read {}", file(unit).display()))?;
    let bounding = capabilities(&text).context("mesh-agent.service has no CapabilityBoundingSet")?;
    println!("xtask: mesh-agent check with {bounding} only");
    let mut check = Command::new("setpriv");
    check.arg(format!("--bounding-set={bounding}")).arg(format!("--inh-caps={bounding}"));
    check.args(["--no-new-privs"]).arg(paths::program("mesh-agent")).arg("check");
    run(&mut check).map(|()| Outcome { passed: 1, ..Outcome::default() })
}

/// `CAP_BPF CAP_PERFMON` as setpriv writes it: `-all,+bpf,+perfmon`.
fn capabilities(unit: &str) -> Option<String> {
    let names = unit.lines().find_map(|text| text.strip_prefix("CapabilityBoundingSet="))?;
    let names = names.split_whitespace().filter_map(|name| name.strip_prefix("CAP_"));
    Some(names.fold("-all".to_owned(), |all, name| format!("{all},+{}", name.to_lowercase())))
}

#[cfg(test)]
mod tests {
    use super::capabilities;

    #[test]
    fn capabilities_are_read_from_the_unit() {
        let unit = "[Service]\nCapabilityBoundingSet=CAP_BPF CAP_NET_ADMIN\n";
        assert_eq!(capabilities(unit).as_deref(), Some("-all,+bpf,+net_admin"));
        assert_eq!(capabilities("[Service]\n"), None);
    }
}
