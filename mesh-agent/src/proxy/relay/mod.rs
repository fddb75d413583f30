//! Copies between an application's socket and a tunnel: half-closes, resets and backpressure pass through, buffers are held only
//! while bytes are on their way.

mod buffer;
mod plain;
mod socket;
mod stream;

use std::io;
use std::pin::Pin;

pub use buffer::Budget;
pub(super) use buffer::EarlyRoom;
pub use plain::relay as plain;
pub use socket::{end_on_drop, reset_on_drop};
pub(super) use socket::{failed, read_now, readable};
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

/// A direction that always has something to do lets others on its thread have their turn after so many rounds: tokio does not count
/// what is done with sockets outside its own futures.
const TURN: u32 = 16;

/// Counts the rounds of a direction.
#[derive(Debug, Default)]
struct Rounds(u32);

impl Rounds {
    /// Whether it is the others' turn.
    fn over(&mut self) -> bool {
        self.0 += 1;
        let over = self.0 >= TURN;
        if over {
            self.0 = 0;
        }
        over
    }
}

/// Drives both directions to their ends. Whom nobody reads any more, since that direction is over, is watched by `after_up` or
/// `after_down`: nobody else would notice its failure. (Pinned by the caller, so that the future holds each only once.)
pub(super) async fn both(
    mut up: Pin<&mut impl Future<Output = Result<(), Cut>>>,
    mut down: Pin<&mut impl Future<Output = Result<(), Cut>>>,
    mut after_up: Pin<&mut impl Future<Output = Cut>>,
    mut after_down: Pin<&mut impl Future<Output = Cut>>,
) -> Result<(), Cut> {
    let (mut up_done, mut down_done) = (false, false);
    while !(up_done && down_done) {
        tokio::select! {
            done = &mut up, if !up_done => {
                done?;
                up_done = true;
            }
            done = &mut down, if !down_done => {
                done?;
                down_done = true;
            }
            cut = &mut after_up, if up_done => return Err(cut),
            cut = &mut after_down, if down_done => return Err(cut),
        }
    }
    Ok(())
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
