//! The figures of one scrape.

/// All figures of one scrape; the owner of the state fills it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Connections by source, service, backend and outcome. Entries with equal labels are summed.
    pub connections: Vec<Connections>,
    /// How often the kernel programs decided for each reason.
    pub reasons: Vec<(String, u64)>,
    /// Kernel maps.
    pub maps: Vec<MapUse>,
    /// Writes to kernel maps that failed.
    pub map_write_failures: u64,
    /// Writes to kernel maps that were tried again.
    pub map_write_retries: u64,
    /// Whether there is a stream to the control plane.
    pub xds_connected: bool,
    /// Resources refused so far.
    pub xds_rejected: u64,
    /// Streams that ended or failed so far.
    pub xds_disconnects: u64,
    /// Whether a snapshot is in force.
    pub ready: bool,
    /// Services known.
    pub services: u64,
    /// Services that are not in force because a map is full.
    pub refused_services: u64,
    /// Workloads known.
    pub workloads: u64,
    /// Cgroups of this node that are a workload's.
    pub enrolled_cgroups: u64,
    /// From [`crate::workloads::watch::WatchStats`].
    pub cgroup_overflows: u64,
    /// From [`crate::workloads::watch::WatchStats`].
    pub cgroup_polls: u64,
    /// From [`crate::workloads::watch::WatchStats`].
    pub cgroup_watch_limited: bool,
    /// Times that the snapshot could not be saved.
    pub snapshot_save_failures: u64,
    /// Changes that were acknowledged and are not on disk.
    pub unsaved_changes: u64,
    /// Times that the control plane did not take a token or the node's certificate.
    pub refused_credentials: u64,
    /// Certificates.
    pub certificates: Certificates,
    /// Policy.
    pub policy: super::Policy,
    /// The node proxy.
    pub proxy: super::Proxy,
}

/// Figures of the certificates of this node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Certificates {
    /// How many by state.
    pub states: Vec<(&'static str, u64)>,
    /// Fetches by outcome.
    pub fetches: Vec<(&'static str, u64)>,
    /// Seconds until the first of those that serve expires.
    pub earliest_expiry: Option<f64>,
}

/// One end of connections. Empty fields are shown as `unknown`, as Istio does.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Peer {
    /// Workload name.
    pub workload: String,
    /// Its namespace.
    pub namespace: String,
    /// SPIFFE id.
    pub principal: String,
}

/// What is counted for one (source, service, backend, outcome).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Connections {
    /// Who dialled.
    pub source: Peer,
    /// Host name of the service.
    pub service: String,
    /// First part of it, as Istio has it.
    pub service_name: String,
    /// Its namespace.
    pub service_namespace: String,
    /// Who answered.
    pub destination: Peer,
    /// Envoy's short word for what went wrong (`UF`, `UH`, …); empty for nothing.
    pub response_flags: String,
    /// Connections established.
    pub opened: u64,
    /// Of those, closed again.
    pub closed: u64,
    /// Connections refused, or that could not be made.
    pub failed: u64,
    /// Bytes that the source sent.
    pub bytes_sent: u64,
    /// Bytes that the source received.
    pub bytes_received: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Sum of the times that connecting took.
    pub connect_seconds: f64,
    /// How many times that sum has.
    pub connect_count: u64,
}

/// How full a kernel map is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MapUse {
    /// Its name.
    pub name: String,
    /// Entries.
    pub entries: u64,
    /// Most entries.
    pub capacity: u64,
}
