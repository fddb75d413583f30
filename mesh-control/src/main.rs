//! The control plane of the mesh.

use std::{io::IsTerminal as _, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use mesh_control::{Config, ControlPlane, allow_descriptors};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

/// Control plane of the mesh: reads manifests and feeds every agent.
#[derive(Parser)]
#[command(name = "mesh-control", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Reads manifests and serves them to agents until it is told to stop.
    Run {
        #[command(flatten)]
        config: Config,
        /// Form of the log, which RUST_LOG filters.
        #[arg(long, default_value = "text", value_name = "FORM")]
        log_format: LogFormat,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Command::Run { config, log_format } = Cli::parse().command;
    match run(config, log_format).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config, log_format: LogFormat) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    match allow_descriptors() {
        Ok(descriptors) => info!(descriptors, "a connection takes one of them"),
        Err(error) => warn!(%error, "the limit of descriptors stays as it was"),
    }
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
    let told = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(told);
    let control = tokio::select! {
        // Reading many manifests takes a moment, in which it may be told to stop already.
        () = &mut told => return Ok(()),
        control = ControlPlane::start(config) => control?,
    };
    control.run_until(told).await
}
