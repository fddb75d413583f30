//! The JSON of the admin socket.

use serde::{Deserialize, Serialize};

/// `/status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// Whether a snapshot is in force.
    pub ready: bool,
    /// The control plane.
    pub control_plane: ControlPlane,
    /// The certificate authority.
    #[serde(default)]
    pub certificate_authority: Authority,
    /// What is in force.
    pub snapshot: SnapshotView,
    /// Resources of the control plane that were refused.
    pub rejected: Vec<RejectedView>,
    /// Services that are known and cannot be in force.
    pub refused: Vec<Refused>,
    /// Kernel programs.
    pub programs: Vec<Program>,
    /// Kernel maps.
    pub maps: Vec<Map>,
    /// Writes to kernel maps that failed.
    pub write_failures: u64,
    /// Writes to kernel maps that were tried again.
    pub write_retries: u64,
}

/// The control plane, seen from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlPlane {
    /// Its URL; empty without one.
    pub address: String,
    /// Whether there is a stream to it.
    pub connected: bool,
    /// Why the last stream ended or could not be had.
    pub last_error: Option<String>,
}

/// The certificate authority, seen from here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// Its URL; empty without one.
    pub address: String,
    /// The identity that it gave this node; empty before.
    pub node_identity: String,
    /// Why the last attempt for this node's own certificate failed, or else one for a workload.
    pub last_error: Option<String>,
    /// Certificates by their state.
    pub certificates: std::collections::BTreeMap<String, u64>,
}

/// One of `/certificates`. Times are as in RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The identity in it; empty for a node that has none yet.
    pub identity: String,
    /// It is this node's own.
    pub node: bool,
    /// `ready`, `fetching`, `failed` or `expired`.
    pub state: String,
    /// A fetch is under way.
    pub fetching: bool,
    /// Its X.509 serial number, hexadecimal.
    pub serial_number: Option<String>,
    /// When it begins to be valid.
    pub not_before: Option<String>,
    /// When it expires.
    pub not_after: Option<String>,
    /// When it will be renewed.
    pub renewal: Option<String>,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
}

/// Where the snapshot came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// There is none.
    None,
    /// Saved by an earlier run.
    Disk,
    /// The control plane.
    ControlPlane,
}

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotView {
    /// Where it came from.
    pub source: Source,
    /// Services known.
    pub services: u64,
    /// Workloads known.
    pub workloads: u64,
}

/// A resource of the control plane that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedView {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// A service that cannot be in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Its key.
    pub service: String,
    /// Why.
    pub reason: String,
}

/// A kernel program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// The hook that it is attached to.
    pub attach: String,
    /// Its id in the kernel.
    pub id: u32,
}

/// A kernel map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// Its name.
    pub name: String,
    /// Entries.
    pub entries: u64,
    /// Most entries.
    pub capacity: u64,
}

/// One of `/services`: a service port as the kernel maps hold it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// `namespace/hostname`.
    pub service: String,
    /// Virtual address.
    pub address: String,
    /// Port.
    pub port: u16,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// How a backend is chosen.
    pub algorithm: String,
    /// How long a client keeps its backend; 0 is not at all.
    pub affinity_seconds: u64,
    /// Generation of its list of backends.
    pub generation: u64,
    /// Its number in the maps.
    pub id: u32,
    /// Its backends.
    pub backends: Vec<Backend>,
}

/// A backend of a service port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its number in the maps.
    pub id: u32,
    /// Address.
    pub address: String,
    /// Port.
    pub port: u16,
    /// Share.
    pub weight: u32,
    /// Uid of its workload.
    pub workload: String,
    /// Connections of this node that are open.
    pub open_connections: u64,
}

/// One of `/workloads`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Unique name.
    pub uid: String,
    /// Its number in the maps: 16 hexadecimal digits.
    pub identity: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Service account.
    pub service_account: String,
    /// Its cgroups on this node; none yet, if only announced.
    pub cgroups: Vec<Cgroup>,
    /// How far the proxy is that carries its connections to other nodes, and theirs to it; empty: it has none.
    #[serde(default)]
    pub proxy: String,
}

/// A cgroup of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its id.
    pub id: u64,
    /// Its path below the root.
    pub path: String,
}

/// `/stats`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// What was counted for each (source, service, backend, outcome).
    pub connections: Vec<Connection>,
    /// How often the kernel programs decided for each reason.
    pub reasons: Vec<Reason>,
    /// Kernel maps.
    pub maps: Vec<Map>,
}

/// What was counted for one (source, service, backend, outcome).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// Uid of the workload that dialled, or `-`.
    pub source: String,
    /// Service.
    pub service: String,
    /// `address:port`, or `-`.
    pub backend: String,
    /// What became of it.
    pub outcome: String,
    /// Connections.
    pub connections: u64,
    /// Of those, closed again.
    pub closed: u64,
    /// Bytes that the source sent.
    pub bytes_sent: u64,
    /// Bytes that the source received.
    pub bytes_received: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Sum of the times that connecting took.
    pub connect_seconds_sum: f64,
    /// How many times that sum has.
    pub connect_seconds_count: u64,
}

/// How often a reason was met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The reason.
    pub reason: String,
    /// How often.
    pub count: u64,
}
