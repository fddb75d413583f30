//! Counting, per CPU and without events.

use aya_ebpf::bindings::BPF_NOEXIST;
use mesh_common::abi::{CounterKey, Counters, Outcome, Reason, Socket};

use crate::maps::{COUNTERS, REASONS};

/// Counts one way through the programs.
#[inline(always)]
pub(crate) fn reason(reason: Reason) {
    if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own slot; the hooks run with migration disabled.
        unsafe { *count += 1 };
    }
}

/// Counts what became of the connection of `socket`.
#[inline(always)]
pub(crate) fn outcome(socket: &Socket, outcome: Outcome, add: impl Fn(&mut Counters)) {
    let key = CounterKey {
        source: socket.workload,
        service: socket.service,
        backend: socket.backend,
        outcome: outcome as u32,
        zero: 0,
    };
    self::key(&key, add);
}

/// Counts under a key.
#[inline(always)]
pub(crate) fn key(key: &CounterKey, add: impl Fn(&mut Counters)) {
    let counters = COUNTERS.get_ptr_mut(key).or_else(|| {
        // Another CPU may come first: then its element serves both, so the result says nothing that matters.
        let _already_there = COUNTERS.insert(key, &Counters::default(), u64::from(BPF_NOEXIST));
        COUNTERS.get_ptr_mut(key)
    });
    match counters {
        // SAFETY: this CPU's own copy of the value; the agent removes only keys whose backend has gone for good.
        Some(counters) => add(unsafe { &mut *counters }),
        None => reason(Reason::CountersFull),
    }
}
