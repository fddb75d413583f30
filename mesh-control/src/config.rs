//! What a control plane is told when it starts.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

/// Options of `mesh-control run`.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Directory of manifests (*.yaml, *.yml, *.json), read with all directories below it and watched.
    #[arg(long, env = "MESH_MANIFESTS", value_name = "DIR")]
    pub manifests: PathBuf,
    /// Directory for what outlives the control plane: the last good content of each manifest.
    #[arg(long, env = "MESH_STATE_DIR", default_value = "/var/lib/mesh-control", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where agents subscribe (gRPC, delta ADS).
    #[arg(long, env = "MESH_XDS_ADDRESS", default_value = "0.0.0.0:15010", value_name = "ADDR")]
    pub xds_address: SocketAddr,
    /// Where meshctl asks (gRPC).
    #[arg(long, env = "MESH_MANAGEMENT_ADDRESS", default_value = "127.0.0.1:15016", value_name = "ADDR")]
    pub management_address: SocketAddr,
    /// Serves /metrics, /healthz/live and /healthz/ready.
    #[arg(long, env = "MESH_METRICS_ADDRESS", default_value = "0.0.0.0:15014", value_name = "ADDR")]
    pub metrics_address: SocketAddr,
    /// First part of every workload's uid.
    #[arg(long, env = "MESH_CLUSTER_ID", default_value = "Kubernetes", value_name = "NAME")]
    pub cluster_id: String,
    /// Last part of every service's host name.
    #[arg(long, env = "MESH_CLUSTER_DOMAIN", default_value = "cluster.local", value_name = "NAME")]
    pub cluster_domain: String,
}

impl Config {
    /// A control plane over `manifests` on free ports of the loopback address, as tests want it; its state is in a hidden
    /// directory below.
    pub fn on_loopback(manifests: impl Into<PathBuf>) -> Self {
        let manifests = manifests.into();
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            state_dir: manifests.join(".state"),
            manifests,
            xds_address: free,
            management_address: free,
            metrics_address: free,
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
        }
    }
}
