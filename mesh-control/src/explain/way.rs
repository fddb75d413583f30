//! By which way a connection would go: the kernel programs' table (`mesh_common::abi::path`), for nodes whose agents are well.

use mesh_common::{
    abi::Proxy,
    api::{
        istio::workload::{NetworkMode, Workload},
        mesh::v1::{WorkloadExtension, explained_backend::Path},
    },
};

use super::is_meshed;
use crate::index::Joined;

/// The way, and why it is this one.
pub(super) fn way(
    source: Option<&(Workload, WorkloadExtension)>,
    to: &Workload,
    port: u16,
    joined: &Joined,
) -> (Path, String) {
    let Some((from, extension)) = source else {
        return (Path::Plaintext, "the client is outside the mesh".to_owned());
    };
    if !joined.contains_key(from.node.as_str()) {
        return (Path::Plaintext, absent("the client", &from.node));
    }
    let reserved = matches!(port, Proxy::OUTBOUND | Proxy::PLAIN);
    let tunnel = || (Path::Plaintext, format!("port {port} is the backend's node proxy itself"));
    if from.node == to.node {
        return if from.uid == to.uid {
            (Path::Kernel, "a workload that connects to itself".to_owned())
        } else if to.network_mode() == NetworkMode::HostNetwork {
            (Path::Plaintext, "the backend shares the network of its node".to_owned())
        } else if reserved {
            (Path::Refused, format!("port {port} is reserved for node proxies"))
        } else if port == Proxy::TUNNEL {
            tunnel()
        } else {
            (Path::Kernel, "both are on the same node".to_owned())
        };
    }
    if !is_meshed(to) {
        return (Path::Plaintext, outside("the backend", to, joined));
    }
    if reserved {
        return (Path::Refused, format!("port {port} is reserved for node proxies"));
    }
    if port == Proxy::TUNNEL {
        return tunnel();
    }
    if !is_meshed(from) && !extension.outbound_meshed {
        return (Path::Plaintext, outside("the client", from, joined));
    }
    (Path::Mtls, "both are meshed, on different nodes".to_owned())
}

/// Why a workload is not announced as meshed.
fn outside(who: &str, workload: &Workload, joined: &Joined) -> String {
    if workload.network_mode() == NetworkMode::HostNetwork {
        format!("{who} shares the network of its node")
    } else if !joined.contains_key(workload.node.as_str()) {
        absent(who, &workload.node)
    } else {
        format!(
            "{who} has opted out, by its label, its namespace's, or (as a server) PeerAuthentication DISABLE"
        )
    }
}

pub(super) fn absent(who: &str, node: &str) -> String {
    if node.is_empty() {
        format!("{who} is on no node")
    } else {
        format!("no agent has joined on {who}'s node, {node}")
    }
}
