//! Flags and environment, parsed and checked once into one small struct for each subsystem.
//!
//! Nothing else reads the environment.

mod proxy;
mod server;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use proxy::{ProxyArgs, ProxyConfig};
pub use server::{ServerConfig, XdsConfig};

/// The per-node agent of the mesh.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the agent is asked to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load the kernel programs and keep their maps equal to the control plane's view
    Run(RunArgs),
    /// Say whether this machine and these privileges suffice
    Check(RunArgs),
    /// Remove everything that `run` left: links, programs, maps and saved state
    Uninstall(UninstallArgs),
}

/// Flags of `run` and `check`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Name of this node [default: the host name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Control plane, for example https://mesh-control:15012
    #[arg(long, env = "MESH_CONTROL_PLANE", value_name = "URL")]
    pub control_plane: Option<String>,
    /// Root certificates of the control plane, PEM; read anew for each connection
    #[arg(long, env = "MESH_CONTROL_PLANE_ROOT", value_name = "FILE")]
    pub control_plane_root: Option<PathBuf>,
    /// Name that the control plane's certificate has to be for [default: the host of --control-plane]
    #[arg(long, env = "MESH_CONTROL_PLANE_NAME", value_name = "NAME")]
    pub control_plane_name: Option<String>,
    /// Token that this node joins with; read anew for each use
    #[arg(long, env = "MESH_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Certificate authority: any server of Istio's API, with a certificate for the host of this URL and by the same roots
    /// [default: the control plane]
    #[arg(long, env = "MESH_CA_ADDRESS", value_name = "URL")]
    pub ca_address: Option<String>,
    /// Namespace of the service account that the token is for; an istiod compares
    #[arg(long, env = "POD_NAMESPACE", value_name = "NS", default_value = "mesh-system")]
    pub namespace: String,
    /// Id told to the control plane, TYPE~IP~NAME.NS~NS.svc.DOMAIN [default: made of the other flags, of type ztunnel]
    #[arg(long, value_name = "ID")]
    pub node_id: Option<String>,
    /// Address of this node, told to the control plane [default: 127.0.0.1]
    #[arg(long, env = "NODE_IP", value_name = "IP")]
    pub node_ip: Option<std::net::IpAddr>,
    /// Root of the cgroups that belong to this node [default: the first cgroup2 mount]
    #[arg(long, value_name = "PATH")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs for what outlives the agent
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_PATH)]
    pub pin_path: PathBuf,
    /// Directory for the last good snapshot
    #[arg(long, value_name = "PATH", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Unix socket of the admin interface
    #[arg(long, value_name = "PATH", default_value = "/run/mesh-agent/admin.sock")]
    pub admin_socket: PathBuf,
    /// Where /metrics, /healthz/live and /healthz/ready are served
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15020")]
    pub metrics_address: SocketAddr,
    /// Region of this node [default: as its workloads say]
    #[arg(long, value_name = "NAME")]
    pub region: Option<String>,
    /// Zone of this node [default: as its workloads say]
    #[arg(long, value_name = "NAME")]
    pub zone: Option<String>,
    /// Id of this node's cluster
    #[arg(long, value_name = "ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Most service ports (address, port, protocol)
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub max_services: u32,
    /// Most backends
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub max_backends: u32,
    /// Most pages of backend lists
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    pub max_pages: u32,
    /// Most workloads on this node
    #[arg(long, value_name = "N", default_value_t = 8_192)]
    pub max_workloads: u32,
    /// Most clients that keep their backend
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub max_affinity: u32,
    /// Most UDP flows
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub max_udp_flows: u32,
    /// Most (source, service, backend, outcome) counters
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub max_counters: u32,
    /// Most addresses of workloads in the whole mesh
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub max_peers: u32,
    /// Most connections that are on their way between the kernel programs and the node proxy
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    pub max_passages: u32,
    /// Most verdicts of policy (source, set of policies, port)
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub max_verdicts: u32,
    /// The node proxy
    #[command(flatten)]
    pub proxy: ProxyArgs,
    /// What the kernel programs log
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = KernelLog::Off)]
    pub kernel_log: KernelLog,
    /// Form of the log on standard error; its level comes from RUST_LOG
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Flags of `uninstall`.
#[derive(Debug, Clone, Args)]
pub struct UninstallArgs {
    /// Directory on a bpffs that `run` was given
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_PATH)]
    pub pin_path: PathBuf,
    /// Directory for the last good snapshot that `run` was given
    #[arg(long, value_name = "PATH", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
}

const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/mesh";
const DEFAULT_STATE_DIR: &str = "/var/lib/mesh-agent";

/// Least severe message that the kernel programs emit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum KernelLog {
    /// None; the programs contain no logging then.
    Off,
    /// Errors.
    Error,
    /// Warnings.
    Warn,
    /// Information.
    Info,
    /// Debugging.
    Debug,
    /// Everything.
    Trace,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What `run` and `check` work with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who this agent is.
    pub node: NodeConfig,
    /// Where the control plane is; without one the agent serves what it has on disk.
    pub xds: Option<XdsConfig>,
    /// The kernel side.
    pub datapath: DatapathConfig,
    /// The node proxy.
    pub proxy: ProxyConfig,
    /// Directory for the last good snapshot.
    pub state_dir: PathBuf,
    /// Admin and metrics.
    pub admin: AdminConfig,
    /// Logs.
    pub log_format: LogFormat,
}

/// Who this agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// Name, as workloads carry it in `node`.
    pub name: String,
    /// Address, for the control plane.
    pub ip: std::net::IpAddr,
    /// Namespace of the agent's own service account.
    pub namespace: String,
    /// Id on the wire, in the form that Istio wants.
    pub id: String,
    /// Cluster.
    pub cluster_id: String,
    /// Overrides the region.
    pub region: Option<String>,
    /// Overrides the zone.
    pub zone: Option<String>,
}

/// The kernel side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatapathConfig {
    /// Root of this node's cgroups; programs attach here.
    pub cgroup_root: PathBuf,
    /// Where programs, links and maps are pinned.
    pub pin_path: PathBuf,
    /// Sizes of the maps.
    pub sizes: MapSizes,
    /// What the programs log.
    pub kernel_log: KernelLog,
}

/// Most entries of each map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    /// Service ports.
    pub services: u32,
    /// Backends.
    pub backends: u32,
    /// Pages of backend lists.
    pub pages: u32,
    /// Workloads on this node.
    pub workloads: u32,
    /// Client affinities.
    pub affinity: u32,
    /// UDP flows.
    pub udp_flows: u32,
    /// Counters.
    pub counters: u32,
    /// Addresses of workloads.
    pub peers: u32,
    /// Connections between the kernel programs and the node proxy.
    pub passages: u32,
    /// Verdicts of policy.
    pub verdicts: u32,
}

/// Where the agent can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    /// Unix socket.
    pub socket: PathBuf,
    /// Address of metrics and health.
    pub metrics_address: SocketAddr,
}

/// A flag that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{flag}: {reason}")]
pub struct ConfigError {
    /// The flag.
    pub flag: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// Maps of this size would take more than the kernel lets one allocation have, or gigabytes.
const SIZE_LIMIT: u32 = 1 << 24;

impl RunArgs {
    /// Checks the flags and fills in what the machine knows.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        self.validate_on(hostname.trim(), &mountinfo)
    }

    /// [`Self::validate`] on a machine with that host name and those mounts.
    fn validate_on(self, hostname: &str, mountinfo: &str) -> Result<Config, ConfigError> {
        let node = self.node(hostname)?;
        let xds = self.xds(&node)?;
        let cgroup_root = match &self.cgroup_root {
            Some(path) => absolute("--cgroup-root", path)?,
            None => cgroup2_mount(mountinfo).ok_or_else(|| ConfigError {
                flag: "--cgroup-root",
                reason: "no cgroup2 is mounted here; mount one (mount -t cgroup2 none /sys/fs/cgroup) or name its path"
                    .to_owned(),
            })?,
        };
        let datapath = DatapathConfig {
            cgroup_root,
            pin_path: absolute("--pin-path", &self.pin_path)?,
            sizes: self.sizes()?,
            kernel_log: self.kernel_log,
        };
        let admin =
            AdminConfig { socket: socket(&self.admin_socket)?, metrics_address: self.metrics_address };
        let state_dir = absolute("--state-dir", &self.state_dir)?;
        let proxy = self.proxy.validate()?;
        Ok(Config { node, xds, datapath, proxy, state_dir, admin, log_format: self.log_format })
    }

    fn node(&self, hostname: &str) -> Result<NodeConfig, ConfigError> {
        let name = self.node_name.as_deref().unwrap_or(hostname);
        let label = |flag: &'static str, text: &str| {
            let wrong = |reason: &str| Err(ConfigError { flag, reason: format!("{text:?} {reason}") });
            match text {
                "" => wrong("is empty"),
                long if long.len() > 253 => wrong("is longer than 253 bytes"),
                // `~` separates the parts of the node id on the wire; names also travel as headers.
                odd if odd.contains(|c: char| !c.is_ascii_graphic() || c == '~' || c == '/') => {
                    wrong("holds a space, a control character, '/', '~', or what is not ASCII")
                }
                good => Ok(good.to_owned()),
            }
        };
        let optional = |flag, text: &Option<String>| text.as_deref().map(|t| label(flag, t)).transpose();
        let name = label("--node-name", name)?;
        let namespace = label("--namespace", &self.namespace)?;
        let ip = self.node_ip.unwrap_or(std::net::Ipv4Addr::LOCALHOST.into());
        let id = match &self.node_id {
            Some(id) => server::node_id(id)?,
            None => format!("ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        };
        Ok(NodeConfig {
            name,
            ip,
            namespace,
            id,
            cluster_id: label("--cluster-id", &self.cluster_id)?,
            region: optional("--region", &self.region)?,
            zone: optional("--zone", &self.zone)?,
        })
    }

    fn sizes(&self) -> Result<MapSizes, ConfigError> {
        let size = |flag, value| match value {
            0 => Err(ConfigError { flag, reason: "0 leaves no room for anything".to_owned() }),
            n if n > SIZE_LIMIT => {
                Err(ConfigError { flag, reason: format!("{n} is more than the limit of {SIZE_LIMIT}") })
            }
            n => Ok(n),
        };
        Ok(MapSizes {
            services: size("--max-services", self.max_services)?,
            backends: size("--max-backends", self.max_backends)?,
            pages: size("--max-pages", self.max_pages)?,
            workloads: size("--max-workloads", self.max_workloads)?,
            affinity: size("--max-affinity", self.max_affinity)?,
            udp_flows: size("--max-udp-flows", self.max_udp_flows)?,
            counters: size("--max-counters", self.max_counters)?,
            peers: size("--max-peers", self.max_peers)?,
            passages: size("--max-passages", self.max_passages)?,
            verdicts: size("--max-verdicts", self.max_verdicts)?,
        })
    }
}

fn absolute(flag: &'static str, path: &std::path::Path) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    Err(ConfigError { flag, reason: format!("{:?} is not an absolute path", path.display().to_string()) })
}

/// `sun_path` holds 108 bytes, the last of them a NUL; the socket is made under a name that is one byte longer.
fn socket(path: &std::path::Path) -> Result<PathBuf, ConfigError> {
    let path = absolute("--admin-socket", path)?;
    let length = path.as_os_str().len();
    if length > 106 {
        let reason = format!("{length} bytes are too long for a socket's path (106)");
        return Err(ConfigError { flag: "--admin-socket", reason });
    }
    Ok(path)
}

/// Mount point of the first cgroup2 in a `/proc/PID/mountinfo`.
pub fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        (kind.split(' ').next() == Some("cgroup2")).then_some(())?;
        mount.split(' ').nth(4).map(|path| PathBuf::from(unescape(path)))
    })
}

/// Undoes mountinfo's octal escapes of space, tab, newline and backslash.
pub(crate) fn unescape(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (code, plain)| path.replace(code, plain))
}

#[cfg(test)]
mod tests;
