//! When and how the snapshot is saved: soon after a change in a small mesh, rarely enough not to be felt in a large one.

use std::path::Path;
use std::time::{Duration, Instant};

use tracing::error;

use crate::snapshot::{Held, disk};

/// Of the time, saving takes one part in so many and one.
const REST: u32 = 20;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// What became of a save.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) ok: bool,
    pub(super) took: Duration,
}

/// Saves in the calling thread, which may block.
pub(super) fn save(folder: &Path, node: &str, held: Held) -> Saved {
    let began = Instant::now();
    let result = disk::save(folder, node, &held);
    if let Err(error) = &result {
        error!(%error, folder = %folder.display(), "the snapshot could not be saved");
    }
    Saved { ok: result.is_ok(), took: began.elapsed() }
}

/// When the next save may begin. Pure.
#[derive(Debug)]
pub(super) struct Pace {
    /// `None` while one is under way.
    next: Option<Instant>,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { next: Some(now) }
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next.is_some_and(|next| next <= now)
    }

    pub(super) fn is_running(&self) -> bool {
        self.next.is_none()
    }

    pub(super) fn started(&mut self) {
        self.next = None;
    }

    pub(super) fn finished(&mut self, took: Duration, now: Instant) {
        self.next = Some(now + took.saturating_mul(REST).clamp(SHORTEST, LONGEST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_save_at_a_time() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert!(pace.is_due(now) && !pace.is_running());
        pace.started();
        assert!(!pace.is_due(now + 2 * LONGEST) && pace.is_running());
    }

    #[test]
    fn the_longer_a_save_the_longer_the_rest() {
        let now = Instant::now();
        for (took, rest) in [(1, 1_000), (50, 1_000), (500, 10_000), (2_000, 40_000), (60_000, 60_000)] {
            let mut pace = Pace::new(now);
            pace.started();
            pace.finished(Duration::from_millis(took), now);
            let rest = Duration::from_millis(rest);
            assert!(!pace.is_due(now + rest - Duration::from_millis(1)), "{took}");
            assert!(pace.is_due(now + rest), "{took}");
        }
    }
}
