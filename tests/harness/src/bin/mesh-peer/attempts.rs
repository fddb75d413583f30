//! The loop that all clients share: who tries is a [`Try`], what came of it is counted here.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_harness::report::{Attempts, Failure, Latency, error_name};
use mesh_harness::sys::own_cpu_seconds;

use crate::Loop;

/// Failures that are reported one by one.
const KEPT_FAILURES: usize = 20;

/// One answered attempt.
pub(crate) struct Answer {
    /// `NAME SEEN-AS`, as the server wrote it.
    pub(crate) line: String,
    /// The other end, as the client's socket reports it.
    pub(crate) peer: SocketAddr,
    /// How long connecting took.
    pub(crate) connect: Duration,
}

/// Where an attempt failed.
pub(crate) struct Failed(pub(crate) &'static str, pub(crate) io::Error);

/// Something that can be attempted.
pub(crate) trait Try {
    /// Makes one attempt at `to`.
    fn attempt(&mut self, to: SocketAddr) -> Result<Answer, Failed>;
}

/// What one thread saw.
#[derive(Default)]
struct Seen {
    sum: Attempts,
    connect: Vec<Duration>,
    whole: Vec<Duration>,
    failing: Vec<Duration>,
}

/// Runs the loop on as many threads as asked, and adds up.
pub(crate) fn run<T: Try>(run: &Loop, client: impl Fn() -> T + Sync) -> Attempts {
    let (stop, taken, begin) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let stop: &'static AtomicBool = Box::leak(Box::new(stop));
    if run.until_eof {
        std::thread::spawn(|| {
            // An unreadable stdin is as good as an ended one.
            drop(io::copy(&mut io::stdin(), &mut io::sink()));
            stop.store(true, Ordering::Relaxed);
        });
    }
    let goes_on = || {
        let counted = run.count == 0 || taken.fetch_add(1, Ordering::Relaxed) < run.count;
        let timely = run.duration_ms == 0 || begin.elapsed() < Duration::from_millis(run.duration_ms);
        counted && timely && !stop.load(Ordering::Relaxed)
    };
    let threads: Vec<Seen> = std::thread::scope(|scope| {
        let spawn = |_| scope.spawn(|| one_thread(run, &client, goes_on, begin));
        let threads: Vec<_> = (0..run.concurrency.max(1)).map(spawn).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    total(threads, begin.elapsed())
}

fn one_thread<T: Try>(
    run: &Loop,
    client: impl Fn() -> T,
    goes_on: impl Fn() -> bool,
    begin: Instant,
) -> Seen {
    let (mut seen, mut client) = (Seen::default(), client());
    for to in run.to.iter().cycle() {
        if !goes_on() {
            break;
        }
        let started = Instant::now();
        seen.sum.attempts += 1;
        match client.attempt(*to) {
            Ok(answer) => seen.answered(&answer, started.elapsed()),
            Err(failed) => seen.failed(&failed, started.elapsed(), begin.elapsed()),
        }
        if run.interval_us > 0 {
            std::thread::sleep(Duration::from_micros(run.interval_us));
        }
    }
    seen
}

impl Seen {
    fn answered(&mut self, answer: &Answer, whole: Duration) {
        let mut words = answer.line.split_ascii_whitespace();
        let mut next = || words.next().unwrap_or("?");
        self.sum.answered += 1;
        count(&mut self.sum.by_name, next());
        let seen_as = next();
        count(&mut self.sum.seen_as, seen_as.rsplit_once(':').map_or(seen_as, |(ip, _port)| ip));
        count(&mut self.sum.peers, &answer.peer.to_string());
        self.connect.push(answer.connect);
        self.whole.push(whole);
    }

    fn failed(&mut self, Failed(stage, error): &Failed, after: Duration, at: Duration) {
        let error = error_name(error);
        count(&mut self.sum.failed, &error);
        self.failing.push(after);
        if self.sum.failures.len() < KEPT_FAILURES {
            let at_ms = at.as_millis() as u64;
            self.sum.failures.push(Failure { at_ms, stage: (*stage).into(), error });
        }
    }
}

fn count(counts: &mut std::collections::BTreeMap<String, u64>, key: &str) {
    match counts.get_mut(key) {
        Some(n) => *n += 1,
        None => drop(counts.insert(key.into(), 1)),
    }
}

fn total(threads: Vec<Seen>, elapsed: Duration) -> Attempts {
    let mut all = Seen::default();
    for seen in threads {
        all.sum.attempts += seen.sum.attempts;
        all.sum.answered += seen.sum.answered;
        all.sum.failures.extend(seen.sum.failures);
        all.connect.extend(seen.connect);
        all.whole.extend(seen.whole);
        all.failing.extend(seen.failing);
        let maps = [
            (&mut all.sum.by_name, seen.sum.by_name),
            (&mut all.sum.peers, seen.sum.peers),
            (&mut all.sum.seen_as, seen.sum.seen_as),
            (&mut all.sum.failed, seen.sum.failed),
        ];
        for (into, from) in maps {
            for (key, n) in from {
                *into.entry(key).or_default() += n;
            }
        }
    }
    all.sum.connect = Latency::of(&mut all.connect);
    all.sum.whole = Latency::of(&mut all.whole);
    all.sum.failing = Latency::of(&mut all.failing);
    all.sum.elapsed_s = elapsed.as_secs_f64();
    all.sum.cpu_s = own_cpu_seconds();
    all.sum
}
