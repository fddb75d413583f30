//! The threads that carry connections, each an event loop of its own: what belongs to a connection stays on one processor, and
//! nobody is woken to take over another's work.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::busy_poll::{self, Looks};
use super::relay;

/// A connection goes to another thread than that of its listener when this has so many more than that.
const UNEVEN: usize = 2;

thread_local! {
    static OWN: Cell<usize> = const { Cell::new(0) };
}

/// The number of the calling thread among the proxy's; 0 for any other thread.
pub(super) fn own() -> usize {
    OWN.get()
}

/// The threads. They end with the last of these and of their connections.
#[derive(Debug, Clone)]
pub struct Threads(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    threads: Vec<Thread>,
    next_home: AtomicUsize,
    looks: Arc<Looks>,
}

#[derive(Debug)]
struct Thread {
    handle: Handle,
    /// Connections that it carries now.
    connections: Arc<AtomicUsize>,
    /// Dropped, the thread ends.
    _stop: Option<oneshot::Sender<()>>,
}

impl Threads {
    /// Starts so many. Each looks for the next event for up to `busy_poll` before it sleeps.
    pub fn start(count: usize, busy_poll: Duration) -> io::Result<Self> {
        let looks = Arc::<Looks>::default();
        let start = |number| start(number, busy_poll, &looks);
        let threads = (0..count.max(1)).map(start).collect::<io::Result<_>>()?;
        Ok(Self(Arc::new(Inner { threads, next_home: AtomicUsize::new(0), looks })))
    }

    /// None of their own: the runtime that this is called in carries everything.
    #[cfg(test)]
    pub fn here() -> Self {
        let thread = Thread { handle: Handle::current(), connections: Arc::default(), _stop: None };
        Self(Arc::new(Inner { threads: vec![thread], next_home: AtomicUsize::new(0), looks: Arc::default() }))
    }

    /// What looking for the next event was good for.
    pub fn looks(&self) -> Arc<Looks> {
        Arc::clone(&self.0.looks)
    }

    /// Where the listeners of another pod are to be: on each thread in turn.
    pub fn home(&self) -> &Handle {
        let next = self.0.next_home.fetch_add(1, Relaxed) % self.0.threads.len();
        &self.0.threads[next].handle
    }

    /// Waits until each thread has done something. False: one has ended.
    pub async fn answer(&self) -> bool {
        for thread in &self.0.threads {
            if thread.handle.spawn(async {}).await.is_err() {
                return false;
            }
        }
        true
    }

    /// A place for a connection that this thread has accepted: here, unless another one has much less to do.
    pub(super) fn place(&self) -> Place {
        let threads = &self.0.threads;
        let load = |at: usize| threads[at].connections.load(Relaxed);
        let here = own().min(threads.len() - 1);
        let least = (0..threads.len()).min_by_key(|at| load(*at)).unwrap_or(here);
        let at = if load(here) >= load(least) + UNEVEN { least } else { here };
        threads[at].connections.fetch_add(1, Relaxed);
        Place { threads: self.clone(), at }
    }
}

fn start(number: usize, busy_poll: Duration, looks: &Arc<Looks>) -> io::Result<Thread> {
    let (stop, stopped) = oneshot::channel();
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let connections = Arc::<AtomicUsize>::default();
    let carried = Arc::clone(&connections);
    handle.spawn(busy_poll::look(busy_poll, Arc::clone(looks)));
    handle.spawn(busy_poll::keep_timer_near());
    std::thread::Builder::new().name(format!("proxy-{number}")).spawn(move || {
        OWN.set(number);
        busy_poll::carries(carried);
        // Nothing is ever sent: it ends when the other end is dropped.
        drop(runtime.block_on(stopped));
    })?;
    Ok(Thread { handle, connections, _stop: Some(stop) })
}

/// A connection's part in a thread, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    threads: Threads,
    at: usize,
}

impl Place {
    /// The thread's runtime; none: that of the calling thread.
    pub(super) fn elsewhere(&self) -> Option<&Handle> {
        let threads = &self.threads.0.threads;
        (self.at != own().min(threads.len() - 1)).then(|| &threads[self.at].handle)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.threads.0.threads[self.at].connections.fetch_sub(1, Relaxed);
    }
}

/// A connection on its way to the thread that carries it.
#[derive(Debug)]
pub(super) enum Accepted {
    /// It is there.
    Here(TcpStream),
    /// It belongs to no event loop.
    Moved(std::net::TcpStream),
}

impl Accepted {
    /// Takes it out of the calling thread's event loop. On its way it is reset if it is dropped.
    pub(super) fn moving(tcp: TcpStream) -> io::Result<Self> {
        relay::reset_on_drop(&tcp);
        tcp.into_std().map(Self::Moved)
    }

    /// Makes it the calling thread's.
    pub(super) fn here(self) -> io::Result<TcpStream> {
        match self {
            Self::Here(tcp) => Ok(tcp),
            Self::Moved(tcp) => {
                let tcp = TcpStream::from_std(tcp)?;
                relay::end_on_drop(&tcp);
                Ok(tcp)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_stay_with_their_listener_until_another_thread_has_much_less() {
        let threads = Threads::start(2, Duration::ZERO).unwrap();
        let home = threads.home().clone();
        let placed = home
            .spawn(async move {
                let places: Vec<Place> = (0..8).map(|_| threads.place()).collect();
                let here = places.iter().filter(|place| place.elsewhere().is_none()).count();
                // One after the other: all of them here.
                drop(places);
                (here, (0..8).all(|_| threads.place().elsewhere().is_none()))
            })
            .await
            .unwrap();
        assert_eq!(placed, (5, true));
    }

    #[tokio::test]
    async fn listeners_go_to_each_thread_in_turn() {
        let threads = Threads::start(2, Duration::ZERO).unwrap();
        let mut numbers = Vec::new();
        for _ in 0..4 {
            numbers.push(threads.home().clone().spawn(async { own() }).await.unwrap());
        }
        assert_eq!(numbers, [0, 1, 0, 1]);
        assert!(threads.answer().await);
    }
}
