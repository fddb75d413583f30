//! Which connections of a pod may no longer be. Pure.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use super::connection::{Connection, State};

/// Where the node proxy listens in a pod.
const PROXY: [u16; 3] = [15001, 15006, TUNNEL];
/// Where it takes tunnels. Those that it makes itself it also ends itself.
const TUNNEL: u16 = 15008;

/// Who made a connection that came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Caller {
    /// A workload of this node, known by its cgroup.
    Workload(u64),
    /// A process of the node itself.
    Node,
    /// A process of this node that is nobody's: without identity, whatever address it has.
    Stranger,
    /// From elsewhere, without identity.
    Unknown,
}

/// What policy and the mesh say now.
pub trait Judge {
    /// Whether the node proxy carries the connection from `remote` to `local`: it ends that itself, and knows better who made it.
    fn is_carried(&self, local: SocketAddr, remote: SocketAddr) -> bool;
    /// Who made the connection from `remote` to `local`; none: nobody of this node, as far as is known.
    fn caller(&self, local: SocketAddr, remote: SocketAddr) -> Option<Caller>;
    /// Whether policy lets `caller`, at address `remote`, connect to `local`.
    fn permits(&self, caller: Caller, remote: IpAddr, local: SocketAddr) -> bool;
    /// Whether this endpoint has gone, longer ago than its grace time.
    fn gone(&self, remote: SocketAddr) -> bool;
}

/// Why a connection is to be destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ground {
    /// It came in, and policy does not permit it.
    Policy(Caller),
    /// It goes to an endpoint that has gone.
    Gone,
}

/// Those of `sockets` that are to be destroyed. They are all of a pod's, its listeners among them: what came in is told from what
/// went out by who listens at its port. Where nobody does (any more), a port of `ephemeral` went out.
pub fn revoke<'a>(
    sockets: &'a [Connection],
    pod: &[IpAddr],
    ephemeral: &RangeInclusive<u16>,
    judge: &impl Judge,
) -> Vec<(&'a Connection, Ground)> {
    let listening: HashSet<u16> = sockets
        .iter()
        .filter(|socket| socket.state == State::Listen)
        .map(|socket| socket.local.port())
        .collect();
    let decide = |socket: &'a Connection| {
        let (local, remote) = (socket.local, socket.remote);
        // Whoever comes in may come from any port.
        let tunnel = remote.port() == TUNNEL && !listening.contains(&local.port());
        let ours = PROXY.contains(&local.port()) || tunnel;
        let inside = remote.ip().is_loopback() || pod.contains(&remote.ip());
        if socket.state == State::Listen || ours || inside || judge.is_carried(local, remote) {
            return None;
        }
        let caller = judge.caller(local, remote);
        let out = socket.state == State::SynSent
            || (caller.is_none() && !listening.contains(&local.port()) && ephemeral.contains(&local.port()));
        if out {
            return judge.gone(remote).then_some((socket, Ground::Gone));
        }
        let caller = caller.unwrap_or(Caller::Unknown);
        let permitted = judge.permits(caller, remote.ip(), local);
        (!permitted).then_some((socket, Ground::Policy(caller)))
    };
    sockets.iter().filter_map(decide).collect()
}
