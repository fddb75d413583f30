//! Backends: where a service's connections may go.

use super::Endpoint;

/// One endpoint of one service port. A backend belongs to one service port only, so that its number alone says both.
///
/// The agent writes a slot while nothing refers to it, and frees it by writing zeros after the last page that named it has
/// been replaced.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backend {
    /// Where to connect.
    pub endpoint: Endpoint,
    /// Number of the service port; 0: the slot is free.
    pub service: u32,
    /// Raised each time the slot is given to another endpoint, so that what remembers a backend sees that it has gone.
    pub incarnation: u32,
    /// For later use; zero.
    pub reserved: u32,
}
const _: () = assert!(size_of::<Backend>() == 32);

impl Backend {
    /// Whether this slot still holds the backend that a socket or an affinity entry remembers.
    #[inline(always)]
    pub const fn is(&self, service: u32, incarnation: u32) -> bool {
        self.service == service && self.incarnation == incarnation
    }
}

/// Open connections of a backend; a type of its own since the kernel writes it and the agent does not.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Load {
    /// Established TCP connections from this node that have not closed.
    pub open: u64,
}
const _: () = assert!(size_of::<Load>() == 8);
