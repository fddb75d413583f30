//! Keeps the process as small as what it holds, and lets it have as many descriptors as it may.
//!
//! The C library would rather keep what was freed: in an arena for each thread, and, once a large block was freed, in ever
//! larger ones. An agent that has heard the whole mesh has freed as much as it holds.
#![expect(unsafe_code, reason = "mallopt, malloc_trim and limits have no safe wrapper")]

use std::ops::Range;

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

/// Lets go of the pages of the program itself: most of what was needed to start is not needed again, and what is comes back from the page
/// cache when it is used.
pub(super) fn forget_start() -> std::io::Result<()> {
    let program = std::env::current_exe()?;
    let mappings = std::fs::read_to_string("/proc/self/smaps")?;
    for pages in unmodified(&mappings, &program.to_string_lossy()) {
        let (start, length) = (pages.start as *mut libc::c_void, pages.len());
        // SAFETY: pages of a mapping that was made before main, cannot be written, and holds nothing but what its file holds: whoever
        // reads them next gets the same from there.
        if unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Mappings of `program` that are as its file is: private, not writable, without a page of their own (proc_pid_smaps(5)).
fn unmodified(smaps: &str, program: &str) -> Vec<Range<usize>> {
    let (mut found, mut candidate) = (Vec::new(), None);
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [range, "r--p" | "r-xp", _offset, _device, _inode, path] => {
                candidate = if path == program { addresses(range) } else { None };
            }
            // Nor one that has been swapped out, which comes later.
            ["Anonymous:", size, "kB"] if size != "0" => candidate = None,
            ["Swap:", "0", "kB"] => found.extend(candidate.take()),
            // The head of another mapping: its fields have no colon in the first word.
            [range, ..] if !range.ends_with(':') => candidate = None,
            _ => {}
        }
    }
    found
}

fn addresses(range: &str) -> Option<Range<usize>> {
    let (start, end) = range.split_once('-')?;
    let address = |hex| usize::from_str_radix(hex, 16).ok();
    Some(address(start)?..address(end)?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_in_the_file_is_let_go() {
        let smaps = "\
5000-6000 r--p 00000000 fe:00 12 /usr/bin/mesh-agent
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
6000-8000 r-xp 00001000 fe:00 12                         /usr/bin/mesh-agent
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex mr mw me
8000-9000 r--p 00003000 fe:00 12 /usr/bin/mesh-agent
Anonymous:             4 kB
Swap:                  0 kB
8800-9000 r--p 00003000 fe:00 12 /usr/bin/mesh-agent
Anonymous:             0 kB
Swap:                  4 kB
9000-a000 rw-p 00004000 fe:00 12 /usr/bin/mesh-agent
Anonymous:             0 kB
Swap:                  0 kB
a000-b000 r-xp 00000000 fe:00 13 /usr/lib/libc.so.6
Anonymous:             0 kB
Swap:                  0 kB
b000-c000 r--p 00000000 00:00 0
Anonymous:             0 kB
Swap:                  0 kB
";
        assert_eq!(unmodified(smaps, "/usr/bin/mesh-agent"), [0x5000..0x6000, 0x6000..0x8000]);
    }

    #[test]
    fn the_program_goes_on_without_its_pages() {
        forget_start().unwrap();
        let program = std::env::current_exe().unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        assert!(!unmodified(&smaps, &program.to_string_lossy()).is_empty());
    }
}
