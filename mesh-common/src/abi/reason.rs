//! Why a connection went the way it went.

/// Each way through the kernel programs, counted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Reason {
    /// A backend was chosen.
    Balanced = 0,
    /// Passed: the destination is no service of the mesh.
    NotService = 1,
    /// Refused: the service has no backend that may be used.
    NoBackends = 2,
    /// A pointer led to a page of another service; looked up again.
    Stale = 3,
    /// Refused: stale again, or the backend has been given to another service.
    StaleTwice = 4,
    /// Refused: the service's tree leads nowhere.
    BrokenTree = 5,
    /// No storage could be had for the socket: balanced, but the application sees the backend as its peer.
    NoSocketStorage = 6,
    /// The connection is not counted: the counter map is full.
    CountersFull = 7,
    /// A client went back to the backend that it had.
    AffinityHit = 8,
    /// A client's backend has gone or its time is over; another was chosen.
    AffinityMiss = 9,
    /// UDP: the flow could not be remembered.
    FlowsFull = 10,
    /// UDP: the backend of a flow has gone; another was chosen.
    FlowMoved = 11,
    /// A process that is in no workload's cgroup made a UDP socket, or called a service: balanced, counted without a source.
    NotWorkload = 12,
    /// Passed: neither TCP nor UDP.
    OtherProtocol = 13,
    /// Led to the node proxy, which carries it to the other node under mutual TLS.
    Proxied = 14,
    /// Refused: it needs the node proxy, which is not alive, and its destination is guarded by policy.
    ProxyDead = 15,
    /// Passed without TLS: the node proxy is not alive, and no policy guards the destination.
    ProxyDeadDirect = 16,
    /// Refused: it needs the node proxy, which is not ready for the workload, and its destination is guarded by policy.
    ProxyNotReady = 17,
    /// Passed without TLS: the node proxy is not ready for the workload, and no policy guards the destination.
    ProxyNotReadyDirect = 18,
    /// Refused by policy where the client runs.
    Denied = 19,
    /// Refused where the client runs: policies guard the destination, and none of them is known for this client.
    NoVerdict = 20,
    /// Refused: nobody but the proxy itself connects to a port of the proxy.
    ReservedPort = 21,
    /// Inbound: policy lets it in.
    InboundAdmitted = 22,
    /// Inbound: refused by policy.
    InboundDenied = 23,
    /// Inbound: policies guard the workload, and none of them is known for this client.
    InboundNoVerdict = 24,
    /// Inbound: refused, since the port is the proxy's own, or the address no workload's where policies are in force.
    InboundReserved = 25,
    /// A connection between workloads of this node could not be noted: where policy guards the server, it counts as one without identity.
    CallersLost = 26,
    /// A connection to the node proxy could not be noted: it is reset.
    OriginalLost = 27,
    /// A denial was counted, but could not be told: too many at a time.
    DenialLost = 28,
    /// A connection was let in of which the agent should have been told, since policies in dry run apply: too many at a time.
    RehearsalLost = 29,
    /// Inbound: policy lets it in so far, and leads it to the node proxy.
    InboundSteered = 30,
    /// Inbound: refused, since policy leads it to the node proxy, which is not alive or does not listen for the workload.
    InboundNoProxy = 31,
    /// The congestion control of a connection between an application and the node proxy could not be set: it has the node's, and may be slower.
    Paced = 32,
}

impl Reason {
    /// How many there are: the size of the map.
    pub const COUNT: u32 = 33;

    /// All, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::Balanced,
        Self::NotService,
        Self::NoBackends,
        Self::Stale,
        Self::StaleTwice,
        Self::BrokenTree,
        Self::NoSocketStorage,
        Self::CountersFull,
        Self::AffinityHit,
        Self::AffinityMiss,
        Self::FlowsFull,
        Self::FlowMoved,
        Self::NotWorkload,
        Self::OtherProtocol,
        Self::Proxied,
        Self::ProxyDead,
        Self::ProxyDeadDirect,
        Self::ProxyNotReady,
        Self::ProxyNotReadyDirect,
        Self::Denied,
        Self::NoVerdict,
        Self::ReservedPort,
        Self::InboundAdmitted,
        Self::InboundDenied,
        Self::InboundNoVerdict,
        Self::InboundReserved,
        Self::CallersLost,
        Self::OriginalLost,
        Self::DenialLost,
        Self::RehearsalLost,
        Self::InboundSteered,
        Self::InboundNoProxy,
        Self::Paced,
    ];

    /// Its name in metrics and in `meshctl`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::NotService => "not_service",
            Self::NoBackends => "no_backends",
            Self::Stale => "stale",
            Self::StaleTwice => "stale_twice",
            Self::BrokenTree => "broken_tree",
            Self::NoSocketStorage => "no_socket_storage",
            Self::CountersFull => "counters_full",
            Self::AffinityHit => "affinity_hit",
            Self::AffinityMiss => "affinity_miss",
            Self::FlowsFull => "flows_full",
            Self::FlowMoved => "flow_moved",
            Self::NotWorkload => "not_workload",
            Self::OtherProtocol => "other_protocol",
            Self::Proxied => "proxied",
            Self::ProxyDead => "proxy_dead",
            Self::ProxyDeadDirect => "proxy_dead_direct",
            Self::ProxyNotReady => "proxy_not_ready",
            Self::ProxyNotReadyDirect => "proxy_not_ready_direct",
            Self::Denied => "denied",
            Self::NoVerdict => "no_verdict",
            Self::ReservedPort => "reserved_port",
            Self::InboundAdmitted => "inbound_admitted",
            Self::InboundDenied => "inbound_denied",
            Self::InboundNoVerdict => "inbound_no_verdict",
            Self::InboundReserved => "inbound_reserved",
            Self::CallersLost => "callers_lost",
            Self::OriginalLost => "original_lost",
            Self::DenialLost => "denial_lost",
            Self::RehearsalLost => "rehearsal_lost",
            Self::InboundSteered => "inbound_steered",
            Self::InboundNoProxy => "inbound_no_proxy",
            Self::Paced => "paced",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Reason;

    #[test]
    fn the_list_is_in_the_order_of_the_numbers() {
        for (i, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i, "{}", reason.name());
        }
    }
}
