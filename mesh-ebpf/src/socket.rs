//! Socket storage, and the workload that a socket belongs to.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::{bpf_get_current_ancestor_cgroup_id, generated::bpf_sk_storage_get},
    programs::SockAddrContext,
};
use mesh_common::abi::{Reason, Socket, WorkloadIdentity};

use crate::{
    count,
    maps::{SOCKETS, WORKLOADS},
};

/// Levels of the cgroup tree that are searched for a workload. Nested containers reach about ten.
const MAX_LEVEL: i32 = 16;

/// The record of `sk`, if there is one.
#[inline(always)]
pub(crate) fn get(sk: *mut c_void) -> Option<&'static mut Socket> {
    storage(sk, 0)
}

/// The record of the socket of a `sock_addr` hook, if there is one.
#[inline(always)]
pub(crate) fn of(ctx: &SockAddrContext) -> Option<&'static mut Socket> {
    get(socket_of(ctx))
}

/// The record of the socket of a `sock_addr` hook, made now if need be.
#[inline(always)]
pub(crate) fn of_or_new(ctx: &SockAddrContext) -> Option<&'static mut Socket> {
    let Some(socket) = storage(socket_of(ctx), BPF_SK_STORAGE_GET_F_CREATE.into()) else {
        count::reason(Reason::NoSocketStorage);
        return None;
    };
    if socket.workload == 0 {
        match current_workload() {
            Some(workload) => socket.workload = workload.0,
            None => count::reason(Reason::NotWorkload),
        }
    }
    Some(socket)
}

/// The workload of the socket of a `sock_addr` hook: as recorded, else that of the current process; 0: none.
#[inline(always)]
pub(crate) fn workload(ctx: &SockAddrContext) -> u64 {
    match of(ctx) {
        Some(socket) => socket.workload,
        None => current_workload().map_or(0, |workload| workload.0),
    }
}

/// Notes the workload of a socket that is being created. Returns whether it could.
#[inline(always)]
pub(crate) fn create(sk: *mut c_void, workload: WorkloadIdentity) -> bool {
    let Some(socket) = storage(sk, BPF_SK_STORAGE_GET_F_CREATE.into()) else { return false };
    socket.workload = workload.0;
    true
}

/// The workload of the current process: that of the innermost cgroup which is one.
#[inline(always)]
pub(crate) fn current_workload() -> Option<WorkloadIdentity> {
    let mut found = None;
    for level in 1..MAX_LEVEL {
        // SAFETY: takes a number, gives a number; 0 is below the process's own cgroup.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            break;
        }
        // SAFETY: eight bytes that are read at once; if the element has just been given to another cgroup, the process
        // was leaving the mesh anyway.
        if let Some(workload) = unsafe { WORKLOADS.get(&cgroup) } {
            found = Some(*workload);
        }
    }
    found
}

#[inline(always)]
fn socket_of(ctx: &SockAddrContext) -> *mut c_void {
    // SAFETY: the kernel gives a valid context, whose socket it checks wherever it is used.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk.cast() }
}

#[inline(always)]
fn storage(sk: *mut c_void, flags: u64) -> Option<&'static mut Socket> {
    // SAFETY: the map holds `Socket`; the helper returns null or a value that lives as long as the program runs. Other
    // processors may write the same record only when an application uses one socket from several threads at once.
    unsafe {
        bpf_sk_storage_get(SOCKETS.as_ptr(), sk, core::ptr::null_mut(), flags).cast::<Socket>().as_mut()
    }
}
