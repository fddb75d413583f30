//! Boots a kernel and reads the tester's verdict from the serial console.

use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Verdict;
use crate::command::watch_as;

/// Seconds for boot and tests together, of which a boot takes ten.
const LIMIT: &str = "900";

/// Lines of the console that are part of an error.
const LAST_LINES: usize = 12;

/// Runs until the machine powers itself off; `name` stands before each line of its console.
///
/// qemu's own exit status says nothing: it is 0 when tests fail and when the kernel panics. Only the tester's last
/// line counts.
pub(crate) fn boot(name: &str, kernel: &Path, initramfs: &Path, log: &Path) -> Result<Verdict> {
    let mut qemu = Command::new("timeout");
    qemu.args(["--kill-after=5", LIMIT, "qemu-system-x86_64", "-cpu", "max"]);
    // One thread for both processors: with one for each, a processor may run code that the kernel has patched meanwhile on the
    // other (`Oops: int3` at boot on a busy machine).
    qemu.args(["-accel", "tcg,thread=single"]);
    qemu.args([
        "-smp",
        "2",
        "-m",
        "512",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-monitor",
        "none",
    ]);
    qemu.args(["-nic", "none", "-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs).stdin(Stdio::null());
    let mut console =
        std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut verdict = None;
    let mut lost = None;
    let mut last = VecDeque::new();
    watch_as(&format!("{name} | "), &mut qemu, |line| {
        verdict = verdict.or_else(|| parse(line));
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line.to_owned());
        lost = lost.take().or(writeln!(console, "{line}").err());
    })?;
    if let Some(error) = lost {
        println!("xtask: {} is incomplete: {error}", log.display());
    }
    match verdict {
        Some(Verdict { passed: 0, failed: 0 }) => bail!("the tester ran no test"),
        Some(verdict) => Ok(verdict),
        None => {
            let last = last.make_contiguous().join("\n    ");
            bail!(
                "no verdict on the console: the kernel or the tester did not get that far. Its end:\n    {last}"
            )
        }
    }
}

/// The line `kernel tests: N passed, M failed`.
pub(crate) fn parse(line: &str) -> Option<Verdict> {
    let counts = line.trim().strip_prefix("kernel tests: ")?;
    let (passed, failed) = counts.split_once(", ")?;
    let passed = passed.strip_suffix(" passed")?.parse().ok()?;
    let failed = failed.strip_suffix(" failed")?.parse().ok()?;
    Some(Verdict { passed, failed })
}

#[cfg(test)]
mod tests {
    use super::{Verdict, parse};

    #[test]
    fn only_the_exact_line_is_a_verdict() {
        assert_eq!(parse("kernel tests: 12 passed, 1 failed\r"), Some(Verdict { passed: 12, failed: 1 }));
        assert_eq!(parse("kernel tests: 12 passed"), None);
        assert_eq!(parse("tests: 12 passed, 0 failed"), None);
        assert_eq!(parse("kernel tests: many passed, 0 failed"), None);
    }
}
