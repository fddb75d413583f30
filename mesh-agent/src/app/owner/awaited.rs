//! Policies that do not come.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a policy that is named may take to come: it mostly comes right after.
const OVERDUE: Duration = Duration::from_secs(5);

/// Policies that workloads name and that have not come. Pure.
#[derive(Debug, Default)]
pub(super) struct Awaited {
    /// In order.
    names: Vec<Arc<str>>,
    /// Since when it is these.
    since: Option<Instant>,
    told: bool,
}

impl Awaited {
    /// Takes in which are awaited now; which these are, once, when they have been the same for too long.
    pub(super) fn overdue(&mut self, mut names: Vec<Arc<str>>, now: Instant) -> Option<&[Arc<str>]> {
        names.sort_unstable();
        if self.names != names {
            *self = Self { names, since: Some(now), told: false };
        }
        let late = self.since.is_some_and(|since| now.saturating_duration_since(since) >= OVERDUE);
        if self.told || self.names.is_empty() || !late {
            return None;
        }
        self.told = true;
        Some(&self.names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<Arc<str>> {
        list.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn those_that_stay_away_are_told_of_once() {
        let (mut awaited, began) = (Awaited::default(), Instant::now());
        let late = began + OVERDUE;
        assert_eq!(awaited.overdue(names(&["b", "a"]), began), None);
        assert_eq!(awaited.overdue(names(&["a", "b"]), late - Duration::from_millis(1)), None);
        assert_eq!(awaited.overdue(names(&["b", "a"]), late), Some(&*names(&["a", "b"])));
        assert_eq!(awaited.overdue(names(&["a", "b"]), late + OVERDUE), None);
    }

    #[test]
    fn others_have_their_own_time() {
        let (mut awaited, began) = (Awaited::default(), Instant::now());
        awaited.overdue(names(&["a"]), began);
        let late = began + OVERDUE;
        assert_eq!(awaited.overdue(names(&["a", "b"]), late), None);
        assert_eq!(awaited.overdue(names(&["a", "b"]), late + OVERDUE), Some(&*names(&["a", "b"])));
        assert_eq!(awaited.overdue(Vec::new(), late + OVERDUE), None);
        assert_eq!(awaited.overdue(Vec::new(), late + 9 * OVERDUE), None, "there is nothing to tell");
    }
}
