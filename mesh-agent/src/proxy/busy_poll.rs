//! What a thread of the proxy does between two events that follow each other closely: it looks for the next one for a moment, since
//! to be put to sleep and woken again takes longer than most answers do.

use std::cell::{Cell, OnceCell, RefCell};
use std::future::poll_fn;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::task::yield_now;
use tokio::time::sleep;

/// What was read is short if it is less than this: more comes of bulk, whose next part is worth no hurry.
const SHORT: usize = 16 << 10;
/// Messages by the same two sockets after which they are taken for a conversation. A connection that is used once has fewer: what follows
/// its answer is its end, and whoever looks for that only keeps others from it.
const CONVERSATION: u32 = 8;
/// Pieces that one message of a conversation may come in. What goes on coming one way is none: nobody waits for its answer.
const PIECES: u32 = 4;
/// A thread that carries no more connections than these looks after any short message, unless they come one way: it has hardly anybody
/// else to serve, and connections that are used once are over before they are a conversation.
const FEW: usize = 4;
/// Messages that are further apart than so many times the longest look are not waited for.
const APART: u32 = 5;
/// Most waits in a row that are slept through because looking did not pay.
const MOST_SLEPT: u32 = 3;
/// How far away the next timer is at most, on a thread that has something to do.
const NEAR: Duration = Duration::from_millis(200);

thread_local! {
    static LOCAL: Local = const { Local {
        events: Cell::new(0),
        last: Cell::new([-1; 2]),
        in_turn: Cell::new(0),
        pieces: Cell::new(0),
        short: Cell::new(false),
        looking: RefCell::new(None),
        timing: RefCell::new(None),
        carried: OnceCell::new(),
    } };
}

struct Local {
    /// Counts what has come.
    events: Cell<u32>,
    /// The sockets that it came by, the last one first.
    last: Cell<[RawFd; 2]>,
    /// How often they have taken turns, and nothing has come by any other.
    in_turn: Cell<u32>,
    /// How often in a row it was the last one.
    pieces: Cell<u32>,
    /// A message whose answer is worth looking for was among it since this was asked last.
    short: Cell<bool>,
    /// Who waits for such a message.
    looking: RefCell<Option<Waker>>,
    /// Who waits for anything.
    timing: RefCell<Option<Waker>>,
    /// How many connections the thread carries; unknown on others than the proxy's.
    carried: OnceCell<Arc<AtomicUsize>>,
}

/// The calling thread carries so many connections, as others count them.
pub(super) fn carries(connections: Arc<AtomicUsize>) {
    // Said once, when the thread begins.
    LOCAL.with(|local| drop(local.carried.set(connections)));
}

/// So many bytes have come by `socket` on the calling thread.
pub(super) fn came(socket: &impl AsRawFd, bytes: usize) {
    LOCAL.with(|local| {
        local.events.set(local.events.get().wrapping_add(1));
        wake(&local.timing);
        let (socket, last) = (socket.as_raw_fd(), local.last.get());
        // Of one connection, that is, whose sockets take turns. With many of them there is always something to do, or nobody whose
        // answers would be waited for.
        let (pieces, in_turn) = match socket {
            _ if socket == last[0] => (local.pieces.get() + 1, local.in_turn.get()),
            _ if socket == last[1] => (1, local.in_turn.get().saturating_add(1)),
            _ => (1, 0),
        };
        let (pieces, in_turn) = if pieces > PIECES { (PIECES, 0) } else { (pieces, in_turn) };
        if socket != last[0] {
            local.last.set([socket, last[0]]);
        }
        local.pieces.set(pieces);
        local.in_turn.set(in_turn);
        let few = || local.carried.get().is_some_and(|carried| carried.load(Relaxed) <= FEW);
        if bytes < SHORT && (in_turn >= CONVERSATION || (pieces < PIECES && few())) {
            local.short.set(true);
            wake(&local.looking);
        }
    });
}

fn wake(who: &RefCell<Option<Waker>>) {
    if let Some(waker) = who.take() {
        waker.wake();
    }
}

/// What looking was good for, of all threads.
#[derive(Debug, Default)]
pub struct Looks {
    /// Looks that an event has ended.
    pub found: AtomicU64,
    /// Looks that nothing has ended but their time.
    pub in_vain: AtomicU64,
    /// Time of all of them, in nanoseconds.
    pub nanoseconds: AtomicU64,
}

/// Looks for the next event for up to `most` whenever a short message has come in a conversation that this thread, which is the one that
/// runs this, has to itself, or among few connections. That takes nothing from what else is to run here, and lets the applications of the
/// node have the processor in between: where messages are far apart it is not done, and where it is in vain, it is done less.
pub(super) async fn look(most: Duration, looks: Arc<Looks>) {
    if most.is_zero() {
        return;
    }
    let events = || LOCAL.with(|local| local.events.get());
    let (mut patience, mut last) = (Patience::default(), Instant::now());
    loop {
        short().await;
        let apart = std::mem::replace(&mut last, Instant::now()).elapsed();
        if apart > most * APART || !patience.looks() {
            continue;
        }
        let (before, began) = (events(), Instant::now());
        let (found, took) = loop {
            // Lets the event loop ask the kernel, and run what that brings.
            yield_now().await;
            // And whoever else wants this processor: mostly the application whose message is looked for.
            std::thread::yield_now();
            let took = began.elapsed();
            if events() != before {
                break (true, took);
            }
            if took >= most {
                break (false, took);
            }
        };
        patience.looked(found);
        (if found { &looks.found } else { &looks.in_vain }).fetch_add(1, Relaxed);
        looks.nanoseconds.fetch_add(took.as_nanos() as u64, Relaxed);
    }
}

/// Waits until a message of a conversation has come since the last time.
async fn short() {
    poll_fn(|cx| {
        LOCAL.with(|local| {
            if local.short.replace(false) {
                return Poll::Ready(());
            }
            local.looking.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
    })
    .await;
}

/// Keeps a timer near as long as something comes. tokio writes to an event descriptor, and so wakes its own loop once more, for every
/// timer that is nearer than all others: with this one, those of connections are not.
pub(super) async fn keep_timer_near() {
    loop {
        let mut asked = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut asked, true) {
                return Poll::Ready(());
            }
            LOCAL.with(|local| local.timing.replace(Some(cx.waker().clone())));
            Poll::Pending
        })
        .await;
        sleep(NEAR).await;
    }
}

/// Decides whether to look before sleeping, by what came of it before. It never gives up for long: whoever waits for an answer waits
/// for the proxy of the other node as well, and finds it in time only if that looks too.
#[derive(Debug, Default)]
struct Patience {
    /// Looks in vain, in a row.
    in_vain: u32,
    /// Waits that are still to be slept through.
    pause: u32,
}

impl Patience {
    /// Whether to look this time.
    fn looks(&mut self) -> bool {
        let looks = self.pause == 0;
        self.pause = self.pause.saturating_sub(1);
        looks
    }

    /// What came of it.
    fn looked(&mut self, found: bool) {
        self.in_vain = if found { 0 } else { self.in_vain.saturating_add(1) };
        self.pause = (self.in_vain / 2).min(MOST_SLEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `what` beside a looker, and says what that has counted: found, in vain.
    async fn beside(most: Duration, what: impl AsyncFnOnce(&Looks)) -> (u64, u64) {
        let looks = Arc::new(Looks::default());
        tokio::select! {
            () = what(&looks) => {}
            () = look(most, Arc::clone(&looks)) => unreachable!(),
        }
        (looks.found.load(Relaxed), looks.in_vain.load(Relaxed))
    }

    async fn a_while() {
        for _ in 0..100 {
            yield_now().await;
        }
    }

    /// Long enough for no test to see its end.
    const LONG: Duration = Duration::from_secs(3600);
    const SHORTEST: Duration = Duration::from_nanos(1);

    #[tokio::test]
    async fn it_looks_after_a_message_of_a_conversation_until_the_next_event() {
        let found = beside(LONG, async |_looks| {
            let begun = (0..CONVERSATION as i32 + 1).map(|turn| (turn % 2, 1));
            for (socket, bytes) in begun.chain([(1, 9), (0, SHORT - 1), (1, SHORT), (0, SHORT), (1, 1)]) {
                came(&socket, bytes);
                a_while().await;
            }
        });
        assert_eq!(found.await, (2, 0), "neither before it is one, nor after bulk");
        let crowd = beside(LONG, async |_looks| {
            for socket in [4, 5, 6].repeat(9) {
                came(&socket, 1);
                a_while().await;
            }
        });
        assert_eq!(crowd.await, (0, 0));
        let one_way = beside(LONG, async |looks| {
            for socket in [[1, 2].repeat(9), vec![2; 3]].concat() {
                came(&socket, 1);
                a_while().await;
            }
            let found = looks.found.load(Relaxed);
            for _ in 0..100 {
                came(&2, 1);
                a_while().await;
            }
            assert!(found > 5 && looks.found.load(Relaxed) == found + 1, "only what had begun has ended");
        });
        one_way.await;
    }

    #[tokio::test]
    async fn among_few_connections_it_looks_after_what_does_not_come_one_way() {
        let carried = Arc::new(AtomicUsize::new(FEW));
        carries(Arc::clone(&carried));
        let talk = async |_looks: &Looks| {
            for socket in [4, 5, 6, 7] {
                came(&socket, 1);
                a_while().await;
            }
        };
        assert_eq!(beside(LONG, talk).await, (3, 0), "the last is looked for still");
        let one_way = beside(LONG, async |_looks| {
            for _ in 0..100 {
                came(&2, 1);
                a_while().await;
            }
        });
        assert!(one_way.await.0 <= u64::from(PIECES));
        carried.store(FEW + 1, Relaxed);
        assert_eq!(beside(LONG, talk).await, (0, 0));
    }

    #[tokio::test]
    async fn it_does_not_look_for_longer_than_it_may_and_not_for_what_is_far_apart() {
        let talk = async |looks: &Looks| {
            for socket in 0..CONVERSATION as i32 + 2 {
                came(&(socket % 2), 1);
            }
            while looks.in_vain.load(Relaxed) == 0 {
                yield_now().await;
            }
        };
        assert_eq!(beside(Duration::from_millis(100), talk).await, (0, 1));
        let apart = beside(SHORTEST, async |_looks| {
            for socket in [1, 2].repeat(9) {
                came(&socket, 1);
                a_while().await;
            }
        });
        assert_eq!(apart.await, (0, 0));
    }

    #[test]
    fn looking_in_vain_becomes_rarer_but_not_rare() {
        let mut patience = Patience::default();
        let mut looked = |found| {
            let looks = (0..100).filter(|_| {
                let looks = patience.looks();
                if looks {
                    patience.looked(found);
                }
                looks
            });
            looks.count()
        };
        let (in_vain, found) = (looked(false), looked(true));
        assert!((25..35).contains(&in_vain), "{in_vain}");
        assert!(found > 95, "{found}");
    }
}
