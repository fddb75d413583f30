//! A connection that goes on as it is, without a tunnel.

use std::io::{IoSlice, IoSliceMut};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::net::TcpStream;
use tokio::task::yield_now;

use super::buffer::{Budget, Size};
use super::socket::Room;
use super::{Cut, Moved, Rounds, socket};

/// Moves bytes until both directions have ended: `sent` from `application` to `other`. After any other end both are to be dropped,
/// and are reset by that.
pub async fn relay(
    application: &TcpStream,
    other: &TcpStream,
    budget: &Arc<Budget>,
) -> (Result<(), Cut>, Moved) {
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    let outcome = both(application, other, budget, &sent, &received).await;
    if outcome.is_err() {
        socket::reset_on_drop(application);
        socket::reset_on_drop(other);
    }
    (outcome, Moved { sent: sent.into_inner(), received: received.into_inner() })
}

async fn both(
    application: &TcpStream,
    other: &TcpStream,
    budget: &Arc<Budget>,
    sent: &AtomicU64,
    received: &AtomicU64,
) -> Result<(), Cut> {
    let up = pin!(copy((application, Cut::Application), (other, Cut::Tunnel), budget, sent));
    let down = pin!(copy((other, Cut::Tunnel), (application, Cut::Application), budget, received));
    let application = pin!(async { Cut::Application(socket::failed(application).await) });
    let other = pin!(async { Cut::Tunnel(socket::failed(other).await) });
    super::both(up, down, application, other).await
}

/// A socket, and whose failure its failure is.
type End<'a> = (&'a TcpStream, fn(std::io::Error) -> Cut);

async fn copy(from: End<'_>, to: End<'_>, budget: &Arc<Budget>, moved: &AtomicU64) -> Result<(), Cut> {
    let ((from, from_cut), (to, to_cut)) = (from, to);
    let (mut size, mut rounds) = (Size::Small, Rounds::default());
    loop {
        if rounds.over() {
            yield_now().await;
        }
        socket::readable(from).await.map_err(from_cut)?;
        let mut buffer = budget.take(size);
        let read = socket::read(from, &mut [IoSliceMut::new(&mut buffer.bytes)]).map_err(from_cut)?;
        let Some(read) = read else { continue };
        if read == 0 {
            return socket::end(to).map_err(to_cut);
        }
        size = if read == buffer.bytes.len() { Size::Large } else { Size::Small };
        let mut left = &buffer.bytes[..read];
        while !left.is_empty() {
            match socket::write(to, &[IoSlice::new(left)]).map_err(to_cut)? {
                Some(written) => left = &left[written..],
                None => match socket::room(to, from).await {
                    Room::Some => {}
                    Room::Failed(error) => return Err(from_cut(error)),
                },
            }
        }
        moved.fetch_add(read as u64, Relaxed);
    }
}
