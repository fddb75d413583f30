//! Waiting for something to become true.

use std::time::{Duration, Instant};

use anyhow::bail;

/// Tries `check` every few milliseconds until it returns a value; on time-out says `what` and the last reason.
pub fn until<T>(
    what: &str,
    at_most: Duration,
    mut check: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if begin.elapsed() > at_most => bail!("waited {at_most:?} until {what}: {error:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
