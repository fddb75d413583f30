//! `mesh-agent`: see the crate's documentation.

use std::process::ExitCode;

use clap::Parser;
use mesh_agent::app;
use mesh_agent::config::{Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => app::run(args),
        Command::Check(args) => app::check(args),
        Command::Uninstall(args) => app::uninstall(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
