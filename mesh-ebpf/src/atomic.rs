//! Atomic addition. `core` offers `fetch_add` only to targets that also have compare-and-swap in their description, which
//! the BPF target lacks; the instruction exists since Linux 5.12. The ordering is the strongest, since LLVM 22 turns a relaxed
//! addition into the instruction that gives nothing back, even where its result is used.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

/// Adds to `*value` (wrapping, so that `u64::MAX` subtracts one) and gives what it was.
///
/// # Safety
///
/// `value` points to an aligned map value that is valid while the program runs.
#[inline(always)]
pub(crate) unsafe fn add(value: *mut u64, amount: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(value, amount) }
}
