//! `meshctl`: shows what the control plane serves and what a node's kernel holds.

mod agent;
mod authority;
mod control;
mod endpoints;
mod explain;
mod node;
mod resources;
mod status;
mod table;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};

use table::{Format, View};

/// Shows what the mesh does.
#[derive(Parser)]
#[command(name = "meshctl", version)]
struct Cli {
    /// Management address of the control plane.
    #[arg(
        long,
        env = "MESHCTL_CONTROL_PLANE",
        default_value = "http://127.0.0.1:15016",
        value_name = "URL",
        global = true
    )]
    control_plane: String,
    /// Admin socket of this node's agent.
    #[arg(
        long,
        env = "MESHCTL_AGENT_SOCKET",
        default_value = "/run/mesh-agent/admin.sock",
        value_name = "PATH",
        global = true
    )]
    agent_socket: PathBuf,
    /// Form of the output.
    #[arg(short, long, default_value = "table", global = true)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Resources as the control plane serves them.
    Get {
        what: Resource,
        /// Only of this namespace.
        #[arg(short, long, default_value = "", hide_default_value = true)]
        namespace: String,
    },
    /// The control plane, refused manifests, and every connected agent.
    Status,
    /// What the kernel of this node holds, from its agent.
    Node { what: NodeView },
    /// What would come of a connection, and why: the backends, the way to each, and the policy that decides.
    Explain {
        /// Who connects: a workload, an IP address outside the mesh, or "none" for anybody outside.
        #[arg(long, value_name = "NS/WORKLOAD")]
        from: String,
        /// To which service, by its name or host name.
        #[arg(long, value_name = "NS/SERVICE:PORT")]
        to: String,
    },
    /// Has peers treat the workloads of a node as outside the mesh: its agent was removed for good.
    ForgetNode { name: String },
    /// Rotates the certificate authority of a control plane, on its files; it takes them into force by itself.
    Ca {
        #[command(subcommand)]
        step: authority::Step,
        /// Directory of the certificate authority.
        #[arg(
            long,
            env = "MESH_CA_DIR",
            default_value = "/var/lib/mesh-control/ca",
            value_name = "DIR",
            global = true
        )]
        ca_dir: PathBuf,
        /// How long certificates live, which use-root and drop-roots wait for. It must be what the control plane has as
        /// --certificate-lifetime: with less a root goes while certificates of it are in use.
        #[arg(
            long,
            env = "MESH_CERTIFICATE_LIFETIME",
            default_value = "24h",
            value_parser = mesh_control::parse_duration,
            value_name = "TIME",
            global = true
        )]
        certificate_lifetime: Duration,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Resource {
    Services,
    Endpoints,
    Workloads,
}

#[derive(Clone, Copy, ValueEnum)]
enum NodeView {
    Services,
    Workloads,
    Stats,
    Status,
    Certificates,
    Denials,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = cli.output;
    if let Command::Ca { step, ca_dir, certificate_lifetime } = &cli.command {
        return match authority::take(*step, ca_dir, *certificate_lifetime) {
            Ok(said) => {
                println!("{said}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("meshctl: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let done = match &cli.command {
        Command::ForgetNode { name } => forget(&cli.control_plane, name).await,
        Command::Get { .. }
        | Command::Status
        | Command::Node { .. }
        | Command::Explain { .. }
        | Command::Ca { .. } => view(cli).await.and_then(|view| view.print(format)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn forget(control_plane: &str, node: &str) -> anyhow::Result<()> {
    control::Control::connect(control_plane).await?.forget_node(node).await?;
    println!("{node} is forgotten until an agent joins for it again.");
    Ok(())
}

async fn view(cli: Cli) -> anyhow::Result<View> {
    match cli.command {
        Command::Get { what, namespace } => {
            let mut control = control::Control::connect(&cli.control_plane).await?;
            match what {
                Resource::Services => resources::services(&control.services(&namespace).await?),
                Resource::Workloads => resources::workloads(&control.workloads(&namespace).await?),
                Resource::Endpoints => {
                    let services = control.services(&namespace).await?;
                    endpoints::endpoints(&services, &control.workloads("").await?)
                }
            }
        }
        Command::Status => {
            status::status(control::Control::connect(&cli.control_plane).await?.status().await?)
        }
        Command::Explain { from, to } => {
            let mut control = control::Control::connect(&cli.control_plane).await?;
            explain::explain(control.explain(&from, &to).await?)
        }
        Command::Ca { .. } | Command::ForgetNode { .. } => anyhow::bail!("shows nothing"),
        Command::Node { what } => {
            let socket = &cli.agent_socket;
            match what {
                NodeView::Services => node::services(agent::get(socket, "/services").await?),
                NodeView::Workloads => node::workloads(agent::get(socket, "/workloads").await?),
                NodeView::Stats => node::stats(agent::get(socket, "/stats").await?),
                NodeView::Status => node::status(agent::get(socket, "/status").await?),
                NodeView::Certificates => node::certificates(agent::get(socket, "/certificates").await?),
                NodeView::Denials => node::denials(agent::get(socket, "/denials").await?),
            }
        }
    }
}
