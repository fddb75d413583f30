//! Copies between an application's socket and a tunnel: half-closes, resets and backpressure pass through, buffers are held only
//! while bytes are on their way.

mod buffer;
mod plain;
mod socket;
mod stream;

use std::io;

pub use buffer::Budget;
pub use plain::relay as plain;
pub(super) use socket::failed;
pub use socket::{end_on_drop, reset_on_drop};
pub use stream::relay;

use super::stream::{Malformed, OutOfOrder};
use super::tls::TlsError;

/// Bytes that a relay has moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    /// From the application into the tunnel.
    pub sent: u64,
    /// From the tunnel to the application.
    pub received: u64,
}

/// A stream that did not end cleanly: neither the application's connection nor the tunnel may be used again.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The application's connection failed, mostly by a reset.
    #[error("the application's connection: {0}")]
    Application(io::Error),
    /// The tunnel's connection failed or ended.
    #[error("the tunnel: {0}")]
    Tunnel(io::Error),
    /// The peer has reset the stream.
    #[error("the peer has reset the stream")]
    Reset,
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// What the peer said.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// When it said so.
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
}

#[cfg(test)]
mod tests;
