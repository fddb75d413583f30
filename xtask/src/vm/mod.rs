//! `cargo xtask vmtest`: each hook's kernel test on Debian's kernels, under qemu's software emulation.
//!
//! Never with KVM: a `/dev/kvm` that opens may still be unable to run a stock kernel (measured with `kvm_pvm`).

mod initramfs;
mod kernel;
mod qemu;

pub(crate) use qemu::parse;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, run as execute, seconds};
use crate::{debian, ebpf, paths};

/// Kernel series of Debian that the mesh promises to work on.
pub(crate) const SERIES: &[&str] = &["6.1", "6.12"];

/// `cargo xtask vmtest`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernel series, as in Debian's package names; may be repeated.
    #[arg(long = "kernel", value_name = "SERIES", default_values = SERIES)]
    kernels: Vec<String>,
    /// Run only the tests whose name contains this.
    #[arg(long, default_value = "")]
    filter: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let tester = prepare()?;
    let mut failed = Vec::new();
    for (series, verdict) in on_kernels(&args.kernels, &tester, &args.filter) {
        match verdict {
            Ok(verdict) if verdict.failed == 0 => {}
            Ok(verdict) => {
                failed.push(format!("Linux {series}: {} of {} tests failed", verdict.failed, verdict.total()))
            }
            Err(error) => failed.push(format!("Linux {series}: {error:#}")),
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

/// What the tester said in the virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
}

impl Verdict {
    fn total(self) -> u32 {
        self.passed + self.failed
    }
}

/// Installs what is needed and builds the tester. Returns its path.
pub(crate) fn prepare() -> Result<PathBuf> {
    debian::ensure(&["qemu-system-x86", "busybox-static", "cpio", "xz-utils"], "testing on other kernels")?;
    ebpf::build(false)?;
    execute(cargo().args(["build", "--package", "mesh-kernel-tests", "--bins"]))?;
    Ok(paths::program("mesh-kernel-tests"))
}

/// Boots these kernels with the tester in them, side by side, and returns what each said.
pub(crate) fn on_kernels<S: AsRef<str> + Sync>(
    series: &[S],
    tester: &Path,
    filter: &str,
) -> Vec<(String, Result<Verdict>)> {
    // One after the other: apt wants to be alone.
    let kernels: Vec<_> =
        series.iter().map(|series| (series.as_ref(), kernel::fetch(series.as_ref()))).collect();
    std::thread::scope(|scope| {
        let boot = |(series, kernel)| scope.spawn(move || on_kernel(series, kernel?, tester, filter));
        let running: Vec<_> = kernels.into_iter().map(|kernel| (kernel.0, boot(kernel))).collect();
        let wait = |thread: std::thread::ScopedJoinHandle<'_, Result<Verdict>>| {
            thread.join().unwrap_or_else(|_panic| Err(anyhow::anyhow!("panicked")))
        };
        running.into_iter().map(|(series, thread)| (series.to_owned(), wait(thread))).collect()
    })
}

fn on_kernel(series: &str, kernel: kernel::Kernel, tester: &Path, filter: &str) -> Result<Verdict> {
    let start = Instant::now();
    println!("xtask: {} under qemu without KVM", kernel.package);
    let initramfs = initramfs::build(&kernel.folder, tester, filter)?;
    let log = kernel.folder.join("console.log");
    let verdict = qemu::boot(series, &kernel.image, &initramfs, &log)
        .with_context(|| format!("{}; the whole console is in {}", kernel.package, log.display()))?;
    println!(
        "xtask: {}: {} passed, {} failed in {}",
        kernel.package,
        verdict.passed,
        verdict.failed,
        seconds(start.elapsed())
    );
    Ok(verdict)
}
