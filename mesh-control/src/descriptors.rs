//! Lets the process have as many descriptors as it may: each connection takes one.
#![expect(unsafe_code, reason = "limits have no safe wrapper")]

use std::io;

/// Raises the limit of descriptors to what whoever started the process allows. The new limit.
///
/// # Errors
/// The system's, when the limit stays as it was.
pub fn allow_descriptors() -> io::Result<u64> {
    let mut limit = limit()?;
    // A sandbox may forbid the call, even one that changes nothing.
    if limit.rlim_cur != limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        set(limit)?;
    }
    Ok(limit.rlim_cur)
}

fn limit() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid pointer to a value that the call fills.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => Ok(limit),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: a valid pointer to a value that the call reads.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_may_be_is_allowed() {
        let libc::rlimit { rlim_max, .. } = limit().unwrap();
        // By one only: other tests run at the same time.
        set(libc::rlimit { rlim_cur: rlim_max - 1, rlim_max }).unwrap();
        assert_eq!(allow_descriptors().unwrap(), rlim_max);
        assert_eq!(limit().unwrap().rlim_cur, rlim_max);
    }
}
