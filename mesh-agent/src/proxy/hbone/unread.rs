//! What has come by HTTP/2 and applications do not read. Each stream may have a window of it, which thousands of slow ones together could fill: when they
//! hold too much of a pod's memory, the windows of all are made small until they hold less.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// What a peer may send on a stream before it is read.
pub(super) const WINDOW: u32 = 512 << 10;
/// The same while memory is short: with this each stream still goes on.
pub(super) const SMALL_WINDOW: u32 = 16 << 10;

/// How soon a peer is given another window that has not yet taken the last one.
const AGAIN: Duration = Duration::from_millis(100);

/// Of all streams of one side of a pod.
#[derive(Debug)]
pub struct Unread {
    bytes: AtomicUsize,
    limit: usize,
    short: watch::Sender<bool>,
    reached: Arc<AtomicU64>,
}

impl Unread {
    /// The least limit to be given, in bytes: with less a single stream would make the windows of all small, and large again.
    pub const LEAST: usize = 8 * WINDOW as usize;

    /// Memory is short from half of `limit` bytes on: what is on its way when windows get small is still to come. It is short no more below a quarter.
    /// `reached` counts how often it has become so.
    pub fn new(limit: usize, reached: Arc<AtomicU64>) -> Arc<Self> {
        Arc::new(Self { bytes: AtomicUsize::new(0), limit, short: watch::Sender::new(false), reached })
    }

    /// Bytes now, as streams have told last.
    pub fn held(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// The window that streams are to have, as it is and will be.
    pub(super) fn windows(&self) -> Windows {
        Windows { short: self.short.subscribe(), given: WINDOW, not_before: None }
    }

    fn changed(&self) {
        self.short.send_if_modified(|short| {
            // Not before: whoever comes last here must not have looked first.
            let held = self.held();
            let now = if *short { held > self.limit / 4 } else { held > self.limit / 2 };
            if now && !*short {
                self.reached.fetch_add(1, Relaxed);
            }
            std::mem::replace(short, now) != now
        });
    }
}

/// A stream's part.
#[derive(Debug)]
pub(super) struct Share {
    of: Arc<Unread>,
    bytes: usize,
}

impl Share {
    /// Nothing yet.
    pub(super) fn new(of: &Arc<Unread>) -> Self {
        Self { of: Arc::clone(of), bytes: 0 }
    }

    /// Whether it holds anything, as was told last.
    pub(super) fn is_some(&self) -> bool {
        self.bytes > 0
    }

    /// It holds so many bytes now.
    pub(super) fn set(&mut self, bytes: usize) {
        if bytes == self.bytes {
            return;
        }
        self.of.bytes.fetch_add(bytes, Relaxed);
        self.of.bytes.fetch_sub(self.bytes, Relaxed);
        self.bytes = bytes;
        self.of.changed();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Tells a tunnel which window its streams are to have.
#[derive(Debug)]
pub(super) struct Windows {
    short: watch::Receiver<bool>,
    given: u32,
    not_before: Option<Instant>,
}

impl Windows {
    /// Waits until it is another than the one that was given last.
    pub(super) async fn changed(&mut self) -> u32 {
        loop {
            let wanted = if *self.short.borrow_and_update() { SMALL_WINDOW } else { WINDOW };
            if wanted != self.given {
                if let Some(time) = self.not_before {
                    sleep_until(time).await;
                    self.not_before = None;
                    continue;
                }
                return wanted;
            }
            if self.short.changed().await.is_err() {
                // The pod has gone, and its tunnels with it.
                std::future::pending::<()>().await;
            }
        }
    }

    /// It has been given.
    pub(super) fn given(&mut self, window: u32) {
        self.given = window;
    }

    /// It could not be given yet: the peer has still to take the last one.
    pub(super) fn put_off(&mut self) {
        self.not_before = Some(Instant::now() + AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None: it stays as it is.
    async fn next(windows: &mut Windows) -> Option<u32> {
        tokio::time::timeout(Duration::from_millis(200), windows.changed()).await.ok()
    }

    #[tokio::test]
    async fn windows_get_small_when_memory_is_short_and_large_again_when_it_is_not() {
        let reached = Arc::new(AtomicU64::new(0));
        let unread = Unread::new(1_000, Arc::clone(&reached));
        let mut windows = unread.windows();
        let (mut one, mut other) = (Share::new(&unread), Share::new(&unread));
        one.set(400);
        other.set(100);
        assert_eq!(next(&mut windows).await, None, "half of it is not too much");
        other.set(101);
        assert_eq!((next(&mut windows).await, reached.load(Relaxed)), (Some(SMALL_WINDOW), 1));
        windows.given(SMALL_WINDOW);
        drop(other);
        assert_eq!(next(&mut windows).await, None, "it would come and go");
        one.set(250);
        assert_eq!((next(&mut windows).await, unread.held()), (Some(WINDOW), 250));
        windows.given(WINDOW);
        // Who comes while it is short learns that at once.
        one.set(2_000);
        assert_eq!((next(&mut unread.windows()).await, reached.load(Relaxed)), (Some(SMALL_WINDOW), 2));
        drop(one);
        assert_eq!(unread.held(), 0);
    }
}
