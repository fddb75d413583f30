//! Refusing a system call, so that the application hears it at once.

use aya_ebpf::{helpers::bpf_set_retval, programs::SockAddrContext};
use aya_log_ebpf::debug;
use mesh_common::abi::{CounterKey, Outcome, Reason};

use crate::{count, socket};

const ECONNREFUSED: i32 = 111;

/// Counts a refusal under the caller's workload. The socket's own record stays: a UDP socket that is connected elsewhere
/// still is.
#[inline(always)]
pub(crate) fn counted(ctx: &SockAddrContext, service: u32, reason: Reason) -> Reason {
    if let Some(socket) = socket::of_or_new(ctx) {
        let key = CounterKey {
            source: socket.workload,
            service,
            outcome: Outcome::Refused as u32,
            ..CounterKey::default()
        };
        count::key(&key, &count::ATTEMPT);
    }
    reason
}

/// The verdict that refuses.
#[inline(always)]
pub(crate) fn verdict(ctx: &SockAddrContext, reason: Reason) -> i32 {
    count::reason(reason);
    debug!(ctx, "refused, reason {}", reason as u32);
    // SAFETY: sets what the system call returns; the hook runs for a system call. Since Linux 5.18.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    0
}
