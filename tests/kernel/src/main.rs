//! Runs the kernel tests whose name contains the argument (all without one), and ends with a verdict line.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_kernel_tests::runner::run(&std::env::args().nth(1).unwrap_or_default())
}
