//! TLS 1.3 with both ends verified.
//!
//! rustls makes the handshake and gives the keys; the record layer is ours, so that records are sealed and opened where they
//! lie, and an idle connection holds keys but no buffer.

mod configs;
mod connection;
mod handshake;
mod io;
mod peer;
mod record;
mod revocation;
mod secret;
mod session;
mod standing;

pub use configs::{ConfigError, Configs, NoCertificate, Protocol};
pub use connection::Tls;
pub use handshake::{HandshakeError, accept, connect};
pub use io::TlsIo;
pub use peer::{NotTrusted, identity_of};
pub use record::{HEADER, MAX_PLAINTEXT, OVERHEAD, RecordError};
pub use revocation::Revocations;
pub use session::{Event, Reader, TlsError, Writer};
pub use standing::Standing;

#[cfg(any(test, fuzzing))]
#[expect(clippy::unwrap_used, reason = "only tests and fuzz targets have it")]
#[cfg_attr(not(test), expect(dead_code, reason = "tests use more of it"))]
pub(crate) mod fixtures;
#[cfg(any(test, fuzzing))]
#[expect(clippy::unwrap_used, reason = "only tests and fuzz targets have it")]
pub mod fuzzing;
#[cfg(test)]
mod tests;
