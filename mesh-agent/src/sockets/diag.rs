//! The netlink socket that lists and destroys. Its calls block, for as long as the kernel takes: milliseconds for thousands of sockets.

use std::io::{self, Read};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::connection::Connection;
use super::message::{self, FAMILIES, Malformed, Part};
use crate::proxy::netns::Namespace;

/// The kernel fills datagrams of at most 32 KiB.
const DATAGRAM: usize = 64 << 10;
/// The kernel answers at once; without an answer something is wrong.
const PATIENCE: Duration = Duration::from_secs(2);
/// Datagrams of one answer: many more sockets than a pod can have.
const MOST_PARTS: usize = 1 << 16;

/// Sockets cannot be listed or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum DiagError {
    /// The netlink socket.
    #[error("netlink sock_diag: {0}")]
    Io(#[from] io::Error),
    /// What it gives.
    #[error("netlink sock_diag: {0}")]
    Malformed(#[from] Malformed),
    /// Datagrams without end.
    #[error("netlink sock_diag: an answer without end")]
    Endless,
    /// The kernel refuses.
    #[error("netlink sock_diag: {0}")]
    Refused(io::Error),
    /// The kernel cannot do this.
    #[error("this kernel cannot destroy sockets: it needs CONFIG_INET_DIAG_DESTROY and the module tcp_diag")]
    Unsupported,
}

/// The TCP sockets of a network namespace.
#[derive(Debug)]
pub struct Diag {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Diag {
    /// Of a pod.
    pub async fn of(namespace: &Namespace) -> Result<Self, DiagError> {
        Self::over(namespace.run(socket).await?)
    }

    /// Of the namespace that this thread is in.
    pub fn here() -> Result<Self, DiagError> {
        Self::over(socket()?)
    }

    fn over(socket: Socket) -> Result<Self, DiagError> {
        // The peer of a new netlink socket is the kernel. Connected to it, nobody else in the pod can put words in its mouth.
        socket.connect(&socket.peer_addr()?)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; DATAGRAM] })
    }

    /// All sockets that carry something or listen.
    pub fn list(&mut self) -> Result<Vec<Connection>, DiagError> {
        let mut sockets = Vec::new();
        for family in FAMILIES {
            self.sequence = self.sequence.wrapping_add(1);
            match self.ask(&message::list(family, self.sequence), &mut sockets)? {
                None => {}
                // Nobody there to ask about TCP.
                Some(libc::ENOENT) => return Err(DiagError::Unsupported),
                Some(code) => return Err(DiagError::Refused(io::Error::from_raw_os_error(code))),
            }
        }
        Ok(sockets)
    }

    /// Ends a connection: this end gets ECONNABORTED, the other a reset. False: it had ended before.
    pub fn destroy(&mut self, connection: &Connection) -> Result<bool, DiagError> {
        self.sequence = self.sequence.wrapping_add(1);
        destroyed(self.ask(&message::destroy(connection, self.sequence), &mut Vec::new())?)
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> io::Result<socket2::SockAddr> {
        self.socket.local_addr()
    }

    /// Sends a request and reads its answer; some: the kernel refuses it, with this error number.
    fn ask(&mut self, request: &[u8], sockets: &mut Vec<Connection>) -> Result<Option<i32>, DiagError> {
        self.socket.send(request)?;
        for _part in 0..MOST_PARTS {
            let length = match (&self.socket).read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            match message::read(&self.buffer[..length], self.sequence, sockets)? {
                Part::More => {}
                Part::Whole => return Ok(None),
                Part::Refused(code) => return Ok(Some(code)),
            }
        }
        Err(DiagError::Endless)
    }
}

pub(super) fn destroyed(refused: Option<i32>) -> Result<bool, DiagError> {
    match refused {
        None => Ok(true),
        Some(libc::ENOENT) => Ok(false),
        // Without the option; before Linux 4.5.
        Some(libc::EOPNOTSUPP | libc::EINVAL) => Err(DiagError::Unsupported),
        Some(code) => Err(DiagError::Refused(io::Error::from_raw_os_error(code))),
    }
}

pub(super) fn socket() -> io::Result<Socket> {
    let protocol = Protocol::from(libc::NETLINK_SOCK_DIAG);
    Socket::new(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(protocol))
}
