//! Counting, per CPU and without events.
//!
//! The additions are atomic all the same: a program in a system call may be interrupted by one in a softirq of the same CPU.

use aya_ebpf::bindings::BPF_NOEXIST;
use mesh_common::abi::{CounterKey, Counters, Outcome, Reason, Socket};

use crate::{
    atomic,
    maps::{COUNTERS, REASONS},
};

/// Counts one way through the programs.
#[inline(always)]
pub(crate) fn reason(reason: Reason) {
    if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: an aligned map value. What it was does not matter.
        unsafe { atomic::add(count, 1) };
    }
}

/// An attempt that ended so.
pub(crate) const ATTEMPT: Counters = Counters {
    attempts: 1,
    closed: 0,
    bytes_sent: 0,
    bytes_received: 0,
    retransmits: 0,
    connect_nanoseconds: 0,
};

/// Counts what became of the connection of `socket`.
#[inline(always)]
pub(crate) fn outcome(socket: &Socket, outcome: Outcome, more: &Counters) {
    let key = CounterKey {
        source: socket.workload,
        service: socket.service,
        backend: socket.backend,
        outcome: outcome as u32,
        zero: 0,
    };
    self::key(&key, more);
}

/// Counts under a key.
#[inline(always)]
pub(crate) fn key(key: &CounterKey, more: &Counters) {
    let counters = COUNTERS.get_ptr_mut(key).or_else(|| {
        // Another CPU may come first: then its element serves both, so the result says nothing that matters.
        let _already_there = COUNTERS.insert(key, &Counters::default(), u64::from(BPF_NOEXIST));
        COUNTERS.get_ptr_mut(key)
    });
    match counters {
        // SAFETY: an aligned map value; the agent removes only keys whose backend has gone for good.
        Some(counters) => unsafe {
            add(&raw mut (*counters).attempts, more.attempts);
            add(&raw mut (*counters).closed, more.closed);
            add(&raw mut (*counters).bytes_sent, more.bytes_sent);
            add(&raw mut (*counters).bytes_received, more.bytes_received);
            add(&raw mut (*counters).retransmits, more.retransmits);
            add(&raw mut (*counters).connect_nanoseconds, more.connect_nanoseconds);
        },
        None => reason(Reason::CountersFull),
    }
}

/// Nothing is added for a zero, which mostly the compiler sees.
///
/// # Safety
///
/// As [`atomic::add`].
#[inline(always)]
unsafe fn add(value: *mut u64, more: u64) {
    if more != 0 {
        // SAFETY: the caller's promise.
        unsafe { atomic::add(value, more) };
    }
}
