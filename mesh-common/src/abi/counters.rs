//! What is counted per connection, without an event per connection.

/// What became of an attempt to connect.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum Outcome {
    /// TCP: established. UDP: a backend was chosen for a socket.
    Connected = 0,
    /// TCP: the handshake did not complete.
    Failed = 1,
    /// Refused by the kernel programs; see [`super::Reason`].
    Refused = 2,
}

impl Outcome {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Connected, Self::Failed, Self::Refused];

    /// Its name in metrics and in `meshctl`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }

    /// By number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| *outcome as u32 == number)
    }
}

/// Who, to what, and how it ended.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct CounterKey {
    /// Identity of the source workload; 0: a process that is none.
    pub source: u64,
    /// Service number; 0: not a service of the mesh.
    pub service: u32,
    /// Backend number; 0: none was chosen.
    pub backend: u32,
    /// [`Outcome`] by number.
    pub outcome: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<CounterKey>() == 24);

/// The counts, one copy per CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Attempts with this outcome.
    pub attempts: u64,
    /// TCP: of those, closed since.
    pub closed: u64,
    /// TCP, added at close: bytes that the peer acknowledged (the kernel counts a SYN, which is taken off).
    pub bytes_sent: u64,
    /// TCP, added at close: bytes received in order.
    pub bytes_received: u64,
    /// TCP, added at close: segments sent again.
    pub retransmits: u64,
    /// TCP: nanoseconds from `connect()` to established, summed.
    pub connect_nanoseconds: u64,
}
const _: () = assert!(size_of::<Counters>() == 48);

impl Counters {
    /// Adds what another CPU counted.
    pub fn add(&mut self, other: &Self) {
        self.attempts += other.attempts;
        self.closed += other.closed;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.retransmits += other.retransmits;
        self.connect_nanoseconds += other.connect_nanoseconds;
    }
}
