//! Who makes handshakes: nobody is known before the end of one, so each address has a share of them. Else one pod that begins
//! many and ends none would keep all others out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// The part of all that one address has, as a divisor: a pod has two addresses and must not have most of it with both.
const SHARE: usize = 8;
/// The same of connections that wait for their handshake.
const WAITING: usize = 4;

/// The addresses that make handshakes now.
#[derive(Debug)]
pub(super) struct Sources {
    known: Mutex<HashMap<IpAddr, Source>>,
    share: usize,
    waiting: usize,
}

#[derive(Debug)]
struct Source {
    connections: usize,
    handshakes: Arc<Semaphore>,
}

impl Sources {
    /// Of so many handshakes at a time, and so many connections.
    pub(super) fn new(handshakes: usize, connections: usize) -> Self {
        let part = |of: usize, divisor: usize| (of / divisor).max(1);
        Self { known: Mutex::default(), share: part(handshakes, SHARE), waiting: part(connections, WAITING) }
    }

    /// A connection from `address` that wants a handshake; none: there are too many from there.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Entered> {
        let address = address.to_canonical();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let source = known
            .entry(address)
            .or_insert_with(|| Source { connections: 0, handshakes: Arc::new(Semaphore::new(self.share)) });
        if source.connections >= self.waiting {
            return None;
        }
        source.connections += 1;
        Some(Entered { sources: Arc::clone(self), address, handshakes: Arc::clone(&source.handshakes) })
    }
}

/// A connection that waits for its handshake, or makes it.
#[derive(Debug)]
pub(super) struct Entered {
    sources: Arc<Sources>,
    address: IpAddr,
    handshakes: Arc<Semaphore>,
}

impl Entered {
    /// Waits until the address has a handshake left; `waits` is told if that is not so now.
    pub(super) async fn turn(&self, at_most: Duration, waits: impl FnOnce()) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.handshakes).try_acquire_owned() {
            return Some(permit);
        }
        waits();
        timeout(at_most, Arc::clone(&self.handshakes).acquire_owned()).await.ok()?.ok()
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut known = self.sources.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = known.get_mut(&self.address) {
            source.connections -= 1;
            if source.connections == 0 {
                known.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_millis(10);

    #[tokio::test]
    async fn an_address_has_its_share_and_leaves_the_others_theirs() {
        let sources = Arc::new(Sources::new(16, 12));
        let [one, mapped, other] = ["10.0.0.1", "::ffff:10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap());
        let entered =
            [sources.enter(one).unwrap(), sources.enter(mapped).unwrap(), sources.enter(one).unwrap()];
        assert!(sources.enter(one).is_none());
        let first = entered[0].turn(NOW, || {}).await.unwrap();
        let _second = entered[1].turn(NOW, || {}).await.unwrap();
        assert!(entered[2].turn(NOW, || {}).await.is_none());
        assert!(sources.enter(other).unwrap().turn(NOW, || {}).await.is_some());
        drop(first);
        assert!(entered[2].turn(NOW, || {}).await.is_some());
        drop(entered);
        assert!(sources.known.lock().unwrap().is_empty());
    }
}
