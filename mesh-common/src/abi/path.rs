//! How a TCP connection goes on once its destination is known. The table of `ARCHITECTURE.md` is this function.

use super::{Endpoint, Node, Peer, Proxy, Reason};

/// What is known of the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// Identity of its workload; 0: a process of no workload.
    pub workload: u64,
    /// Cookie of its network namespace.
    pub netns: u64,
}

/// A way to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// As it is: the mesh has no part in it.
    Direct,
    /// As it is, to a workload of this node, which will be told who called.
    Local,
    /// To the caller's node proxy, at [`Proxy::listener`].
    Proxied,
    /// As it is, although it should have been proxied.
    Fallback(Reason),
    /// Not at all.
    Refused(Reason),
}

/// The way from `source` to `destination`, which is an address of `peer`'s. `proxy` is what this node's proxy has for the peer, where
/// that runs here, else for the source.
#[inline(always)]
pub fn path(
    source: Source,
    destination: &Endpoint,
    peer: &Peer,
    proxy: Option<&Proxy>,
    node: &Node,
    now_nanoseconds: u64,
) -> Path {
    let port = destination.port();
    if peer.is_local() {
        // A pod that talks to itself, and the proxy that hands it what came through a tunnel.
        if proxy.is_some_and(|theirs| theirs.netns == source.netns) {
            return Path::Direct;
        }
        let node_itself = source.workload == 0 && source.netns == node.netns;
        return match port {
            Proxy::OUTBOUND | Proxy::PLAIN => Path::Refused(Reason::ReservedPort),
            Proxy::TUNNEL => Path::Direct,
            // Its namespace would refuse it; but it may have none where anybody looks.
            _ if peer.is_steered() && !node_itself && node.alive_until_nanoseconds <= now_nanoseconds => {
                Path::Refused(Reason::ProxyDead)
            }
            _ if peer.is_steered() && !node_itself && proxy.is_none() => Path::Refused(Reason::ProxyNotReady),
            _ => Path::Local,
        };
    }
    if source.workload == 0 || !peer.is_meshed() {
        return Path::Direct;
    }
    match port {
        Proxy::OUTBOUND | Proxy::PLAIN => return Path::Refused(Reason::ReservedPort),
        // Proxies themselves, wherever they run: whoever else comes there has no certificate.
        Proxy::TUNNEL => return Path::Direct,
        _ => {}
    }
    if proxy.is_some_and(|ours| ours.flags & Proxy::DIRECT != 0) {
        return Path::Direct;
    }
    let guarded = peer.policies != 0;
    if node.alive_until_nanoseconds <= now_nanoseconds {
        return missing(guarded, Reason::ProxyDead, Reason::ProxyDeadDirect);
    }
    match proxy {
        Some(ours)
            if ours.flags & Proxy::READY != 0 && ours.listener(destination.address()).address().is_set() =>
        {
            Path::Proxied
        }
        Some(_) | None => missing(guarded, Reason::ProxyNotReady, Reason::ProxyNotReadyDirect),
    }
}

#[inline(always)]
const fn missing(guarded: bool, refused: Reason, direct: Reason) -> Path {
    if guarded { Path::Refused(refused) } else { Path::Fallback(direct) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Address;

    const POD: Source = Source { workload: 7, netns: 70 };
    const NOW: u64 = 1_000;
    const ALIVE: Node = Node { alive_until_nanoseconds: NOW + 1, netns: 1, flags: 0, zero: 0 };
    const DEAD: Node = Node { alive_until_nanoseconds: NOW, ..ALIVE };
    const V4: Address = Address::from_v4([10, 0, 0, 7]);
    const READY: Proxy = Proxy { netns: 70, flags: Proxy::READY, zero: 0, v4: V4, v6: Address::new([0; 16]) };
    const THEIRS: Proxy = Proxy { netns: 80, ..READY };

    fn peer(flags: u32, policies: u32) -> Peer {
        Peer { workload: 8, flags, policies }
    }

    fn to(port: u16) -> Endpoint {
        Endpoint::new(Address::from_v4([10, 0, 0, 8]), port)
    }

    fn remote(policies: u32, ours: Option<&Proxy>, node: &Node) -> Path {
        path(POD, &to(80), &peer(Peer::MESHED, policies), ours, node, NOW)
    }

    #[test]
    fn the_listener_is_of_the_family_of_the_destination() {
        assert_eq!(READY.listener(V4), Endpoint::new(V4, 15001));
        assert!(!READY.listener(Address::new([1; 16])).address().is_set());
    }

    #[test]
    fn a_meshed_workload_of_another_node_is_reached_through_the_proxy() {
        assert_eq!(remote(0, Some(&READY), &ALIVE), Path::Proxied);
        assert_eq!(remote(3, Some(&READY), &ALIVE), Path::Proxied);
    }

    #[test]
    fn without_a_proxy_policy_says_what_happens() {
        assert_eq!(remote(0, Some(&READY), &DEAD), Path::Fallback(Reason::ProxyDeadDirect));
        assert_eq!(remote(3, Some(&READY), &DEAD), Path::Refused(Reason::ProxyDead));
        let unready = Proxy { flags: 0, ..READY };
        for ours in [None, Some(&unready)] {
            assert_eq!(remote(0, ours, &ALIVE), Path::Fallback(Reason::ProxyNotReadyDirect));
            assert_eq!(remote(3, ours, &ALIVE), Path::Refused(Reason::ProxyNotReady));
        }
    }

    #[test]
    fn a_workload_that_is_not_meshed_is_left_to_the_policy_of_its_peers() {
        let host = Proxy { flags: Proxy::DIRECT, ..Proxy::default() };
        for node in [&ALIVE, &DEAD] {
            assert_eq!(remote(3, Some(&host), node), Path::Direct);
        }
    }

    #[test]
    fn a_family_that_the_proxy_does_not_listen_in_counts_as_not_ready() {
        let six = Endpoint::new(Address::new([1; 16]), 80);
        let path = path(POD, &six, &peer(Peer::MESHED, 3), Some(&READY), &ALIVE, NOW);
        assert_eq!(path, Path::Refused(Reason::ProxyNotReady));
    }

    #[test]
    fn whoever_is_no_workload_or_calls_none_of_the_mesh_goes_direct() {
        let nobody = Source { workload: 0, ..POD };
        let direct = path(nobody, &to(80), &peer(Peer::MESHED, 3), None, &ALIVE, NOW);
        assert_eq!(direct, Path::Direct);
        let direct = path(POD, &to(80), &peer(0, 3), Some(&READY), &ALIVE, NOW);
        assert_eq!(direct, Path::Direct);
    }

    #[test]
    fn a_workload_of_this_node_is_told_who_calls_unless_it_calls_itself() {
        let local = |source| path(source, &to(80), &peer(Peer::LOCAL, 3), Some(&THEIRS), &DEAD, NOW);
        assert_eq!(local(POD), Path::Local);
        assert_eq!(local(Source { workload: 0, netns: 1 }), Path::Local);
        assert_eq!(local(Source { workload: 8, netns: 80 }), Path::Direct);
    }

    #[test]
    fn a_workload_of_this_node_that_needs_its_proxy_is_not_reached_without() {
        let local = |source, flags, proxy, node| {
            path(source, &to(80), &peer(Peer::LOCAL | flags, 3), proxy, node, NOW)
        };
        let steered = Peer::STEERED;
        assert_eq!(local(POD, steered, Some(&THEIRS), &ALIVE), Path::Local);
        assert_eq!(local(POD, steered, Some(&THEIRS), &DEAD), Path::Refused(Reason::ProxyDead));
        assert_eq!(local(POD, steered, None, &ALIVE), Path::Refused(Reason::ProxyNotReady));
        let stranger = Source { workload: 0, netns: 5 };
        assert_eq!(local(stranger, steered, None, &ALIVE), Path::Refused(Reason::ProxyNotReady));
        // A probe of the node's, and what the workload says to itself.
        assert_eq!(local(Source { workload: 0, netns: 1 }, steered, None, &DEAD), Path::Local);
        assert_eq!(local(Source { workload: 8, netns: 80 }, steered, Some(&THEIRS), &DEAD), Path::Direct);
        assert_eq!(local(POD, 0, None, &DEAD), Path::Local);
    }

    #[test]
    fn the_ports_of_the_proxy_are_its_own() {
        for (flags, proxy) in [(Peer::MESHED, READY), (Peer::LOCAL | Peer::MESHED, THEIRS)] {
            let to = |port| path(POD, &to(port), &peer(flags, 0), Some(&proxy), &ALIVE, NOW);
            assert_eq!(to(15001), Path::Refused(Reason::ReservedPort));
            assert_eq!(to(15006), Path::Refused(Reason::ReservedPort));
            assert_eq!(to(15008), Path::Direct);
        }
    }
}
