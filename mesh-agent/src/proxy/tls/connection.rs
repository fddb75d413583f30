//! A secured connection.

use std::time::SystemTime;

use tokio::net::TcpStream;

use super::configs::Protocol;
use super::session::{Reader, Writer};
use super::standing::Standing;
use crate::identity::SpiffeId;

/// A secured connection, its record layer apart from its socket.
pub struct Tls {
    /// The connection.
    pub tcp: TcpStream,
    /// Opens records.
    pub reader: Reader,
    /// Seals records.
    pub writer: Writer,
    /// Received and not opened yet.
    pub received: Vec<u8>,
    /// Who is at the other end, verified.
    pub peer: SpiffeId,
    /// Until when its certificate is valid; no stream may begin after that.
    pub until: SystemTime,
    /// Whether its certificate is still one to trust; no stream may begin after that either.
    pub standing: Standing,
    /// What is spoken.
    pub protocol: Protocol,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
}

impl Tls {
    /// Whether a stream may begin on it: the peer's certificate is valid, nothing has been revoked since it was verified, and its root is trusted
    /// still.
    pub fn may_begin(&self) -> bool {
        SystemTime::now() < self.until && self.standing.is_current()
    }
}
