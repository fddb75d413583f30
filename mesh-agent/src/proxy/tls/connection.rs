//! A secured connection.

use std::time::SystemTime;

use tokio::net::TcpStream;

use super::configs::Protocol;
use super::session::{Reader, Writer};
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
    /// What is spoken.
    pub protocol: Protocol,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
}
