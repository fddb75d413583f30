//! The listeners of a pod.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use mesh_common::abi::{Proxy, identity_of};
use tokio::net::TcpListener;
use tokio::runtime::Handle;

use super::Shared;
use super::host::Enrolled;
use crate::proxy::congestion::Congestion;
use crate::proxy::netns::Namespace;

/// What takes a pod's connections.
#[derive(Default)]
pub(super) struct Listeners {
    pub(super) outbound: Vec<TcpListener>,
    pub(super) tunnels: Vec<TcpListener>,
    /// Of what comes without TLS and is led to the proxy.
    pub(super) plain: Vec<TcpListener>,
}

/// A listener could not be opened.
#[derive(Debug)]
pub(super) struct ListenError {
    address: SocketAddr,
    error: io::Error,
}

impl ListenError {
    /// Whether the address is not there yet: it may be set up at this moment.
    pub(super) fn is_early(&self) -> bool {
        self.error.kind() == io::ErrorKind::AddrNotAvailable
    }
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, error } = self;
        match error.kind() == io::ErrorKind::AddrInUse {
            true => {
                write!(
                    f,
                    "{address} is in use: the application listens at a port of the proxy's (15001, 15006, 15008)"
                )
            }
            false => write!(f, "listening at {address}: {error}"),
        }
    }
}

/// Opens them at each of the pod's addresses: the wildcard address would take connections to any other one from the application.
/// They belong to the event loop of `home`.
pub(super) async fn open(
    shared: &Shared,
    namespace: &Namespace,
    enrolled: &Enrolled,
    home: &Handle,
) -> Result<Listeners, ListenError> {
    let (addresses, workload) = (&enrolled.workload.addresses, identity_of(&enrolled.uid).0);
    let mut listeners = Listeners::default();
    for ip in addresses.iter() {
        for (port, list, congestion) in [
            (Proxy::OUTBOUND, &mut listeners.outbound, &Congestion::WITHIN_POD),
            (Proxy::TUNNEL, &mut listeners.tunnels, &shared.congestion),
            (Proxy::PLAIN, &mut listeners.plain, &Congestion::OF_NAMESPACE),
        ] {
            let address = SocketAddr::new(*ip, port);
            let (namespace, congestion) = (namespace.clone(), congestion.clone());
            let opened = home.spawn(async move { namespace.listen_with(&congestion, address).await }).await;
            // An error of the task: the thread has ended.
            let opened = opened.map_err(io::Error::other).and_then(|opened| opened);
            list.push(opened.map_err(|error| ListenError { address, error })?);
        }
    }
    // All or none: with some of its listeners a pod is not ready.
    for (ip, listener) in addresses.iter().zip(&listeners.plain) {
        let address = SocketAddr::new(*ip, Proxy::PLAIN);
        shared
            .kernel
            .steer(workload, *ip, listener.as_fd())
            .map_err(|error| ListenError { address, error })?;
    }
    Ok(listeners)
}
