//! The kernel tests as part of `cargo test`: on this machine's kernel, as root.

use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() != 0) {
        println!("kernel tests: skipped: loading kernel programs needs root");
        return ExitCode::SUCCESS;
    }
    // What cargo passes on, like `--test-threads=1`, is not a filter.
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    mesh_kernel_tests::runner::run(&filter.unwrap_or_default())
}
