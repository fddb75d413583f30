//! What the kernel says of a TCP socket.

use std::net::SocketAddr;

/// Where a TCP connection stands, as the kernel counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Both directions are open.
    Established = 1,
    /// Asked, and not answered.
    SynSent = 2,
    /// Answered, and not confirmed.
    SynReceived = 3,
    /// This end has closed; the peer may still send.
    FinWait1 = 4,
    /// The same, confirmed.
    FinWait2 = 5,
    /// The peer has closed; this end may still send.
    CloseWait = 8,
    /// Nobody connected yet.
    Listen = 10,
}

impl State {
    /// Those that are listed. The others carry nothing any more.
    pub const ALL: [Self; 7] = [
        Self::Established,
        Self::SynSent,
        Self::SynReceived,
        Self::FinWait1,
        Self::FinWait2,
        Self::CloseWait,
        Self::Listen,
    ];

    /// Their bits in a request.
    pub(super) fn mask() -> u32 {
        Self::ALL.into_iter().fold(0, |mask, state| mask | 1 << state as u8)
    }

    pub(super) fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u8 == number)
    }
}

/// A TCP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Its own end; IPv4 on an IPv6 socket is told as IPv4.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Where it stands.
    pub state: State,
    /// Who made it.
    pub uid: u32,
    /// Its file, as `/proc/PID/fd` has it; 0 while nobody has accepted it.
    pub inode: u32,
    /// Bound to IPv6 alone or to both: what a listener hears.
    pub family: u8,
    /// How the kernel finds it again, with a cookie that no later socket has.
    pub(super) id: [u8; 48],
}
