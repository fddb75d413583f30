//! What a control plane is told when it starts.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;

use crate::{duration, keeper};

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        Ok(_) | Err(_) => Err("is no number from 1".to_owned()),
    }
}

/// Options of `mesh-control run`.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Directory of manifests (*.yaml, *.yml, *.json), read with all directories below it and watched.
    #[arg(long, env = "MESH_MANIFESTS", value_name = "DIR")]
    pub manifests: PathBuf,
    /// Directory for what outlives the control plane: the last good content of each manifest, and which nodes have joined.
    #[arg(long, env = "MESH_STATE_DIR", default_value = "/var/lib/mesh-control", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where agents subscribe and get certificates (gRPC over TLS).
    #[arg(long, env = "MESH_XDS_ADDRESS", default_value = "0.0.0.0:15012", value_name = "ADDR")]
    pub xds_address: SocketAddr,
    /// Where meshctl asks (gRPC).
    #[arg(long, env = "MESH_MANAGEMENT_ADDRESS", default_value = "127.0.0.1:15016", value_name = "ADDR")]
    pub management_address: SocketAddr,
    /// Serves /metrics, /healthz/live and /healthz/ready.
    #[arg(long, env = "MESH_METRICS_ADDRESS", default_value = "0.0.0.0:15014", value_name = "ADDR")]
    pub metrics_address: SocketAddr,
    /// Connections of agents at a time; one more ends the oldest whose caller has not authenticated, and is refused if there is none.
    #[arg(long, env = "MESH_MAX_CONNECTIONS", default_value_t = 32_768, value_parser = at_least_one, value_name = "N")]
    pub max_connections: usize,
    /// Connections at a time from one address (IPv6: one /64) whose callers have not authenticated yet; one more, and the oldest of them
    /// ends. Of all addresses together there are at most 4,096. Agents that have authenticated do not count, however many share an
    /// address.
    #[arg(
        long,
        env = "MESH_MAX_UNAUTHENTICATED_PER_ADDRESS",
        default_value_t = 1_024,
        value_parser = at_least_one,
        value_name = "N"
    )]
    pub max_unauthenticated_per_address: usize,
    /// How long a connection may take for its TLS handshake, and then to authenticate.
    #[arg(long, env = "MESH_AUTHENTICATION_TIMEOUT", default_value = "10s", value_parser = duration::parse, value_name = "TIME")]
    pub authentication_timeout: Duration,
    /// How long a connection without an open request may go on, of agents and of meshctl.
    #[arg(long, env = "MESH_IDLE_TIMEOUT", default_value = "5m", value_parser = duration::parse, value_name = "TIME")]
    pub idle_timeout: Duration,
    /// First part of every workload's uid.
    #[arg(long, env = "MESH_CLUSTER_ID", default_value = "Kubernetes", value_name = "NAME")]
    pub cluster_id: String,
    /// Last part of every service's host name.
    #[arg(long, env = "MESH_CLUSTER_DOMAIN", default_value = "cluster.local", value_name = "NAME")]
    pub cluster_domain: String,
    /// Directory of the certificate authority, made at the first start if it is empty: ca-cert.pem, ca-key.pem,
    /// cert-chain.pem, root-cert.pem. Changed files are taken into force.
    #[arg(long, env = "MESH_CA_DIR", default_value = "/var/lib/mesh-control/ca", value_name = "DIR")]
    pub ca_dir: PathBuf,
    /// First part of every identity.
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = "cluster.local", value_name = "NAME")]
    pub trust_domain: String,
    /// Policies in this namespace hold for the whole mesh.
    #[arg(long, env = "MESH_ROOT_NAMESPACE", default_value = "mesh-system", value_name = "NAME")]
    pub root_namespace: String,
    /// How long certificates live: by default and at most.
    #[arg(long, env = "MESH_CERTIFICATE_LIFETIME", default_value = "24h", value_parser = duration::parse, value_name = "TIME")]
    pub certificate_lifetime: Duration,
    /// Revocation lists (PEM or DER): callers with a certificate on them are refused, and their streams end. While the file
    /// cannot be used, and once a list has lapsed, that is all whom it is for.
    #[arg(long, env = "MESH_CRL", value_name = "FILE")]
    pub crl: Option<PathBuf>,
    /// A further host name or address in the certificate of the control plane.
    #[arg(long, value_name = "NAME")]
    pub tls_name: Vec<String>,
    /// Tokens by which agents join: `NODE TOKEN` in each line, NODE being `*` for any node.
    #[arg(long, env = "MESH_JOIN_TOKENS", value_name = "FILE")]
    pub join_tokens: Option<PathBuf>,
    /// Whose JWTs are accepted.
    #[arg(long, env = "MESH_TOKEN_ISSUER", value_name = "URL")]
    pub token_issuer: Option<String>,
    /// The audience that they must be for.
    #[arg(long, env = "MESH_TOKEN_AUDIENCE", default_value = "istio-ca", value_name = "NAME")]
    pub token_audience: String,
    /// The keys that they are signed by (JWKS).
    #[arg(long, env = "MESH_TOKEN_JWKS", value_name = "FILE")]
    pub token_jwks: Option<PathBuf>,
    /// A service account that may join.
    #[arg(long, default_value = "mesh-system/mesh-agent", value_name = "NS/SA")]
    pub token_service_account: Vec<String>,
}

impl Config {
    /// A control plane over `manifests` on free ports of the loopback address, as tests want it. Its state is kept and its
    /// authority is made in `state`, and `state`/join-tokens is read, which must be there.
    pub fn on_loopback(manifests: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        let state = state.into();
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            manifests: manifests.into(),
            state_dir: state.clone(),
            xds_address: free,
            management_address: free,
            metrics_address: free,
            max_connections: 32_768,
            max_unauthenticated_per_address: 1_024,
            authentication_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            ca_dir: state.join("ca"),
            trust_domain: "cluster.local".to_owned(),
            root_namespace: "mesh-system".to_owned(),
            certificate_lifetime: Duration::from_secs(86_400),
            crl: None,
            tls_name: Vec::new(),
            join_tokens: Some(state.join("join-tokens")),
            token_issuer: None,
            token_audience: "istio-ca".to_owned(),
            token_jwks: None,
            token_service_account: vec!["mesh-system/mesh-agent".to_owned()],
        }
    }

    /// The roots by which agents verify this control plane: a file that is there once it has started.
    pub fn root_certificates(&self) -> PathBuf {
        keeper::roots(&self.ca_dir)
    }
}
