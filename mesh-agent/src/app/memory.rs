//! Keeps the process as small as what it holds, and lets it have as many descriptors as it may.
//!
//! The C library would rather keep what was freed: in an arena for each thread, and, once a large block was freed, in ever
//! larger ones. An agent that has heard the whole mesh has freed as much as it holds.
#![expect(unsafe_code, reason = "mallopt, malloc_trim and limits have no safe wrapper")]

/// Blocks from this size on go back to the kernel at once when they are freed.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 64 << 10;
/// Most that stays at the end of the heap.
#[cfg(target_env = "gnu")]
const SPARE: libc::c_int = 1 << 20;

/// Call it while there is one thread.
pub(super) fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, SPARE)]
    {
        // SAFETY: mallopt takes two numbers, and what it does not know it refuses; nothing depends on its taking effect.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives what is free back to the kernel. Takes some milliseconds, during which no other thread can allocate much.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim may be called at any time by any thread; it touches free memory only.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Raises the limit of descriptors to what whoever started the agent allows: a proxied connection takes two. The new limit.
pub(super) fn allow_descriptors() -> std::io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid pointer to a value that the call fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: a valid pointer to a value that the call reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}
