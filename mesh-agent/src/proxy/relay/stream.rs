//! A stream of our own protocol.
//!
//! Application to tunnel: one `readv` into the slots of the records, sealed where they lie, one `write`. Tunnel to application:
//! one `read` of many records, opened where they lie, one `writev`.
//!
//! Most connections are idle most of the time, so what an idle one holds counts: its futures are blocks in functions, since an `async fn`
//! keeps its arguments twice.
#![expect(clippy::manual_async_fn, reason = "an async fn is larger")]

mod down;
mod up;

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use tokio::net::TcpStream;

use super::buffer::{Budget, Size};
use super::{Cut, Moved, socket};
use crate::proxy::stream::{MAX_DATA, Message};
use crate::proxy::tls::{Reader, Tls, Writer};
use down::down;
use up::up;

/// Full reads in a row after which a connection gets a large buffer.
const BUSY: u32 = 2;

/// One task sets and reads it; atomic, because its future must be fit to be sent to the thread that carries it.
#[derive(Default)]
struct Flag(AtomicBool);

impl Flag {
    fn get(&self) -> bool {
        self.0.load(Relaxed)
    }

    fn set(&self, value: bool) {
        self.0.store(value, Relaxed);
    }
}

/// What both directions know.
struct Common<'a> {
    application: &'a TcpStream,
    tunnel: &'a TcpStream,
    budget: &'a Arc<Budget>,
    /// A record is only partly in the socket, so nothing else may be sent.
    within_record: Flag,
    /// END has been sent, received.
    sent_end: Flag,
    received_end: Flag,
    sent: AtomicU64,
    received: AtomicU64,
}

/// Moves a stream that has been accepted, which the client has still to be told if `owed`, until both directions have ended: then `tls` may carry the next one. After any other
/// end both connections are to be dropped, and are reset by that.
pub fn relay<'a>(
    application: &'a TcpStream,
    tls: &'a mut Tls,
    budget: &'a Arc<Budget>,
    owed: bool,
) -> impl Future<Output = (Result<(), Cut>, Moved)> + Send {
    let Tls { tcp, reader, writer, received, .. } = tls;
    // What has been said to begin may be all for long.
    writer.rest();
    if received.is_empty() {
        reader.rest();
    }
    let common = Common {
        application,
        tunnel: tcp,
        budget,
        within_record: Flag::default(),
        sent_end: Flag::default(),
        received_end: Flag::default(),
        sent: AtomicU64::new(0),
        received: AtomicU64::new(0),
    };
    async move {
        let outcome = both(&common, reader, received, (writer, owed)).await;
        match &outcome {
            // It may lie idle for long, and this task is to be gone then.
            Ok(()) => socket::wake_nobody(common.tunnel),
            Err(cut) => {
                socket::reset_on_drop(common.application);
                tear_down(&common, writer, cut);
            }
        }
        let moved = Moved { sent: common.sent.load(Relaxed), received: common.received.load(Relaxed) };
        (outcome, moved)
    }
}

/// Tells the peer, if it can be told at once; or else a reset of the connection does.
fn tear_down(common: &Common<'_>, writer: &mut Writer, cut: &Cut) {
    let told = match cut {
        Cut::Application(_) if !common.within_record.get() => {
            writer.data(&Message::Reset.encode()).is_ok_and(|record| {
                let whole = record.len();
                matches!(socket::write(common.tunnel, &[IoSlice::new(&record)]), Ok(Some(n)) if n == whole)
            })
        }
        Cut::Reset => true,
        Cut::Application(_) | Cut::Tunnel(_) | Cut::Tls(_) | Cut::Malformed(_) | Cut::OutOfOrder(_) => false,
    };
    if !told {
        socket::reset_on_drop(common.tunnel);
    }
}

fn both<'a>(
    common: &'a Common<'_>,
    reader: &'a mut Reader,
    received: &'a mut Vec<u8>,
    (writer, owed): (&'a mut Writer, bool),
) -> impl Future<Output = Result<(), Cut>> + Send {
    async move {
        let mut up = pin!(up(common, writer, owed));
        let mut down = pin!(down(common, reader, received));
        loop {
            if common.sent_end.get() && common.received_end.get() {
                // Before the next poll of `down`: what follows belongs to the next stream.
                return Ok(());
            }
            tokio::select! {
                biased;
                done = &mut up, if !common.sent_end.get() => done?,
                done = &mut down => return done,
                // Nobody reads the application's connection any more, so nobody else would notice.
                error = half_closed(common.application), if common.sent_end.get() => {
                    return Err(Cut::Application(error));
                }
            }
        }
    }
}

/// Waits for the failure of a connection that is not read any more; in a box, as few are.
async fn half_closed(tcp: &TcpStream) -> io::Error {
    Box::pin(socket::failed(tcp)).await
}

/// Waits in a box of its own: who copies is blocked rarely, and a future is as large as the largest thing that it may wait for.
fn blocked<'a, T>(
    waits: impl Future<Output = Result<T, Cut>> + Send + 'a,
) -> Pin<Box<dyn Future<Output = Result<T, Cut>> + Send + 'a>> {
    Box::pin(waits)
}

/// Decides by what was moved how much to move at a time.
struct Pace {
    full: u32,
}

impl Pace {
    fn new() -> Self {
        Self { full: 0 }
    }

    fn size(&self) -> Size {
        if self.full >= BUSY { Size::Large } else { Size::Small }
    }

    fn moved(&mut self, bytes: usize, size: Size) {
        self.full = match size {
            Size::Small if bytes >= MAX_DATA => (self.full + 1).min(BUSY * 2),
            Size::Large if bytes > MAX_DATA => BUSY * 2,
            Size::Small | Size::Large => self.full.saturating_sub(1),
        };
    }
}
