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
}

impl Reason {
    /// How many there are: the size of the map.
    pub const COUNT: u32 = 14;

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
