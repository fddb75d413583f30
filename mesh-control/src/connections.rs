//! How many connections there may be, and how long one may do nothing: whoever reaches a port may open them.
//!
//! A caller is a stranger until its handshake has shown a verified certificate, or one of its requests was accepted. There are few
//! strangers at a time, fewer from one address, and each has little time. One more, and the oldest is given up: it is the least likely
//! to be an honest one. Who is known counts among all only, since a whole mesh may share one address.

mod carried;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

pub(crate) use carried::{Carried, Peer};
use tokio::sync::Notify;

use crate::metrics::Metrics;

/// What connections to one port may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// At a time.
    pub(crate) all: usize,
    /// Those of strangers at a time.
    pub(crate) strangers: usize,
    /// Those of strangers at a time from one address.
    pub(crate) of_address: usize,
    /// How long one has to become known, or to end its handshake.
    pub(crate) strange: Duration,
    /// How long one without a request may go on.
    pub(crate) idle: Duration,
}

/// The connections to one port.
#[derive(Debug)]
pub(crate) struct Connections {
    /// As it is counted.
    pub(crate) port: &'static str,
    pub(crate) bounds: Bounds,
    pub(crate) metrics: Arc<Metrics>,
    counted: Mutex<Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    all: usize,
    next: u64,
    /// In the order in which they came.
    strangers: BTreeMap<u64, (IpAddr, Arc<Exit>)>,
    of_address: HashMap<IpAddr, BTreeSet<u64>>,
}

/// There is no place for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// One connection's; given up when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    connections: Arc<Connections>,
    number: u64,
    state: Mutex<State>,
    exit: Arc<Exit>,
}

/// How a stranger is told to make room.
#[derive(Debug, Default)]
struct Exit {
    told: Notify,
    /// It counts no longer.
    given_up: AtomicBool,
}

#[derive(Debug)]
struct State {
    known: bool,
    /// Requests that are being answered.
    open: usize,
    /// Since when there is none.
    since: Instant,
}

/// An accepted request, for as long as it is answered.
#[derive(Debug)]
pub(crate) struct Serving(Arc<Place>);

impl Connections {
    pub(crate) fn new(port: &'static str, bounds: Bounds, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { port, bounds, metrics, counted: Mutex::default() })
    }

    /// A place for a connection of a stranger from there.
    pub(crate) fn enter(self: &Arc<Self>, from: SocketAddr, now: Instant) -> Result<Arc<Place>, Full> {
        let from = counted_as(from.ip());
        let counted = &mut *lock(&self.counted);
        let here = counted.of_address.get(&from);
        let crowd = here.filter(|here| here.len() >= self.bounds.of_address);
        if let Some(oldest) = crowd.and_then(BTreeSet::first).copied() {
            counted.give_up(oldest);
        } else if counted.strangers.len() >= self.bounds.strangers || counted.all >= self.bounds.all {
            let oldest = counted.strangers.keys().next().copied().ok_or(Full)?;
            counted.give_up(oldest);
        }
        if counted.all >= self.bounds.all {
            return Err(Full);
        }
        counted.next += 1;
        let number = counted.next;
        let state = Mutex::new(State { known: false, open: 0, since: now });
        let connections = Arc::clone(self);
        let exit = Arc::<Exit>::default();
        counted.strangers.insert(number, (from, Arc::clone(&exit)));
        counted.of_address.entry(from).or_default().insert(number);
        counted.all += 1;
        self.metrics.connections.inc();
        Ok(Arc::new(Place { connections, number, state, exit }))
    }

    /// Has the oldest stranger go, so that what its connection takes comes free; whether there was one.
    pub(crate) fn make_room(&self) -> bool {
        let counted = &mut *lock(&self.counted);
        let oldest = counted.strangers.keys().next().copied();
        oldest.inspect(|oldest| counted.give_up(*oldest)).is_some()
    }
}

impl Counted {
    /// It is no stranger any more, if it was one.
    fn forget(&mut self, number: u64) -> Option<Arc<Exit>> {
        let (address, exit) = self.strangers.remove(&number)?;
        if let Some(here) = self.of_address.get_mut(&address) {
            here.remove(&number);
            if here.is_empty() {
                self.of_address.remove(&address);
            }
        }
        Some(exit)
    }

    /// Has a stranger make room.
    fn give_up(&mut self, number: u64) {
        if let Some(exit) = self.forget(number) {
            self.all -= 1;
            exit.given_up.store(true, Ordering::Relaxed);
            exit.told.notify_one();
        }
    }
}

impl Place {
    /// Its handshake is done: it has its time anew, and is no stranger any more if it has shown a certificate that was verified.
    pub(crate) fn greet(&self, now: Instant, verified: bool) {
        if verified {
            lock(&self.connections.counted).forget(self.number);
        }
        let mut state = lock(&self.state);
        (state.known, state.since) = (verified, now);
    }

    /// A request of it was accepted.
    pub(crate) fn serve(self: &Arc<Self>) -> Serving {
        lock(&self.connections.counted).forget(self.number);
        let mut state = lock(&self.state);
        (state.known, state.open) = (true, state.open + 1);
        Serving(Arc::clone(self))
    }

    /// Completes when it has to make room.
    pub(crate) async fn crowded(&self) {
        self.exit.told.notified().await;
    }

    /// How long it may still go on before it is to be asked again, or, as it is counted, why it may not.
    pub(crate) fn left(&self, now: Instant) -> Result<Duration, &'static str> {
        let Bounds { strange, idle, .. } = self.connections.bounds;
        let state = lock(&self.state);
        let (time, reason) = if state.known { (idle, "idle") } else { (strange, "unauthenticated") };
        if state.open > 0 {
            return Ok(time);
        }
        let left = time.saturating_sub(now.saturating_duration_since(state.since));
        if left.is_zero() { Err(reason) } else { Ok(left) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counted = lock(&self.connections.counted);
        counted.forget(self.number);
        if !self.exit.given_up.load(Ordering::Relaxed) {
            counted.all -= 1;
        }
        drop(counted);
        self.connections.metrics.connections.dec();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.open -= 1;
        state.since = Instant::now();
    }
}

/// Whoever has one IPv6 address has all of its network.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

// Nothing in here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_secs(10);

    fn connections(all: usize, strangers: usize, of_address: usize) -> Arc<Connections> {
        let bounds = Bounds { all, strangers, of_address, strange: TIME, idle: TIME * 30 };
        Connections::new("xds", bounds, Arc::new(Metrics::new().unwrap()))
    }

    fn from(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().unwrap(), 1)
    }

    fn has_to_go(place: &Place) -> bool {
        place.exit.given_up.load(Ordering::Relaxed)
    }

    #[test]
    fn an_address_has_few_strangers_and_any_number_of_others() {
        let connections = connections(100, 100, 2);
        let now = Instant::now();
        let enter = |address: &str| connections.enter(from(address), now).unwrap();
        let (known, other) = (enter("10.0.0.1"), enter("10.0.0.2"));
        drop(known.serve());
        let first = enter("10.0.0.1");
        let second = enter("::ffff:10.0.0.1");
        assert!(!has_to_go(&first));
        let third = enter("10.0.0.1");
        // Its own oldest stranger, not who is known and not another address's.
        let gone = [&known, &other, &first, &second, &third].map(|place| has_to_go(place));
        assert_eq!(gone, [false, false, true, false, false]);
        // One network is one address.
        let v6 = ["fd00::1", "fd00::2", "fd00:0:0:1::1", "fd00::3"].map(enter);
        assert_eq!(v6.each_ref().map(|place| has_to_go(place)), [true, false, false, false]);
        drop((known, other, first, second, third, v6));
        let counted = lock(&connections.counted);
        assert!(counted.all == 0 && counted.strangers.is_empty() && counted.of_address.is_empty());
        assert_eq!(connections.metrics.connections.get(), 0);
    }

    #[test]
    fn strangers_make_room_and_who_is_known_does_not() {
        let connections = connections(3, 2, 100);
        let now = Instant::now();
        let enter = |address: &str| connections.enter(from(address), now);
        let (first, second) = (enter("10.0.0.1").unwrap(), enter("10.0.0.2").unwrap());
        // More strangers than there may be of all addresses together.
        let third = enter("10.0.0.3").unwrap();
        assert!(has_to_go(&first) && !has_to_go(&second));
        // It has asked at the last moment, and goes all the same.
        drop((first.serve(), first));
        let _served = [second.serve(), third.serve()];
        let fourth = enter("10.0.0.4").unwrap();
        let fifth = enter("10.0.0.5").unwrap();
        assert!(has_to_go(&fourth));
        let _served = fifth.serve();
        assert_eq!(enter("10.0.0.6").map(drop), Err(Full));
        drop(fourth);
        assert_eq!(enter("10.0.0.6").map(drop), Err(Full));
        drop((fifth, _served));
        assert_eq!(enter("10.0.0.6").map(drop), Ok(()));
    }

    #[test]
    fn who_has_shown_a_certificate_is_no_stranger() {
        let connections = connections(3, 2, 1);
        let now = Instant::now();
        let enter = || connections.enter(from("10.0.0.1"), now).unwrap();
        let shown = enter();
        shown.greet(now, true);
        assert_eq!(shown.left(now + TIME), Ok(TIME * 29));
        let without = enter();
        without.greet(now, false);
        assert_eq!(without.left(now + TIME), Err("unauthenticated"));
        let _next = enter();
        assert!(has_to_go(&without) && !has_to_go(&shown));
    }

    #[test]
    fn the_oldest_stranger_makes_room_when_asked() {
        let connections = connections(10, 10, 10);
        let now = Instant::now();
        let places = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
            .map(|address| connections.enter(from(address), now).unwrap());
        let _served = places[0].serve();
        let gone = || places.each_ref().map(|place| has_to_go(place));
        assert!(connections.make_room());
        assert_eq!(gone(), [false, true, false]);
        assert!(connections.make_room() && !connections.make_room());
        assert_eq!(gone(), [false, true, true]);
    }

    #[test]
    fn a_stranger_has_little_time_and_who_is_served_has_all() {
        let connections = connections(1, 1, 1);
        let start = Instant::now();
        let place = connections.enter(from("10.0.0.1"), start).unwrap();
        assert_eq!(place.left(start + TIME / 2), Ok(TIME / 2));
        assert_eq!(place.left(start + TIME), Err("unauthenticated"));
        place.greet(start + TIME / 2, false);
        assert_eq!(place.left(start + TIME), Ok(TIME / 2));
        let serving = place.serve();
        assert!(place.left(start + TIME * 1_000).is_ok());
        drop(serving);
        let end = Instant::now();
        assert!(place.left(end + TIME * 29).is_ok());
        assert_eq!(place.left(end + TIME * 30), Err("idle"));
    }
}
