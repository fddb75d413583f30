//! When and how the snapshot is saved: soon after a change in a small mesh, rarely enough not to be felt in a large one.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use tracing::{error, info, warn};

use crate::snapshot::journal::Journal;
use crate::snapshot::{Held, Interner, disk};

/// Of the time, saving takes one part in so many and one.
const REST: u32 = 20;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// What became of a save.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) ok: bool,
    /// The last change that is in it.
    pub(super) sequence: u64,
    pub(super) took: Duration,
}

/// What was saved, with what has changed since, and the journal to go on with.
pub(super) fn load(folder: &Path, interner: &mut Interner) -> (Journal, Option<Held>) {
    let loaded = disk::load(folder, interner).and_then(|saved| {
        let Some(mut saved) = saved else { return Ok(None) };
        let found = Journal::resume(folder, &mut saved, interner)?;
        Ok(Some((found, saved)))
    });
    match loaded {
        Ok(Some((found, saved))) => {
            if found.lost > 0 {
                warn!(
                    bytes = found.lost,
                    "the end of the journal is not whole, or what it followed is missing"
                );
            }
            if found.changes > 0 {
                info!(changes = found.changes, "changes since the snapshot was saved are in the journal");
            }
            return (found.journal, Some(saved));
        }
        Ok(None) => {}
        Err(error) => error!(%error, "the saved snapshot cannot be used; waiting for the control plane"),
    }
    (Journal::begin(folder, SystemTime::now()), None)
}

/// Saves in the calling thread, which may block.
pub(super) fn save(folder: &Path, node: &str, held: Held) -> Saved {
    let began = Instant::now();
    let result = disk::save(folder, node, &held);
    if let Err(error) = &result {
        error!(%error, folder = %folder.display(), "the snapshot could not be saved");
    }
    Saved { ok: result.is_ok(), sequence: held.sequence(), took: began.elapsed() }
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
