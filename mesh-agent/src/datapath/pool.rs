//! Numbers of array slots: which are free, and which rest before they are given again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long a number rests after its last use: a kernel program that was led there by an old pointer has long ended.
const REST: Duration = Duration::from_secs(1);

/// The free numbers of one map.
#[derive(Debug)]
pub struct Pool {
    limit: u32,
    next: u32,
    free: VecDeque<u32>,
    resting: VecDeque<(Instant, u32)>,
}

impl Pool {
    /// The numbers from `first` to below `limit`, without those `in_use`.
    pub fn new(first: u32, limit: u32, in_use: impl Iterator<Item = u32>) -> Self {
        let mut used: Vec<u32> = in_use.filter(|number| (first..limit).contains(number)).collect();
        used.sort_unstable();
        let next = used.last().map_or(first, |last| last + 1);
        let mut used = used.into_iter().peekable();
        let mut free = VecDeque::new();
        for number in first..next {
            if used.next_if_eq(&number).is_none() {
                free.push_back(number);
            }
            while used.next_if_eq(&number).is_some() {}
        }
        Self { limit, next, free, resting: VecDeque::new() }
    }

    /// The numbers that [`Pool::take`] would give, in that order: those never used, then those longest free.
    pub fn peek(&self) -> impl Iterator<Item = u32> + '_ {
        (self.next..self.limit).chain(self.free.iter().copied())
    }

    /// Takes the first `count` numbers of [`Pool::peek`].
    pub fn take(&mut self, count: usize) {
        for _ in 0..count {
            if self.next < self.limit {
                self.next += 1;
            } else {
                self.free.pop_front();
            }
        }
    }

    /// Whether a number of [`Pool::peek`] was never taken.
    pub fn unused(&self, number: u32) -> bool {
        number >= self.next
    }

    /// How many numbers can be taken now.
    pub fn available(&self) -> usize {
        (self.limit.saturating_sub(self.next)) as usize + self.free.len()
    }

    /// Gives a number back; it may be taken again after its rest.
    pub fn release(&mut self, number: u32, now: Instant) {
        self.resting.push_back((now + REST, number));
    }

    /// Ends the rest of those whose time has come.
    pub fn wake(&mut self, now: Instant) {
        while let Some((until, number)) = self.resting.front().copied()
            && until <= now
        {
            self.resting.pop_front();
            self.free.push_back(number);
        }
    }

    /// Whether some are resting, so that there may soon be more.
    pub fn rests(&self) -> bool {
        !self.resting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_new_numbers_first_then_those_longest_free() {
        let mut pool = Pool::new(1, 6, [1, 3].into_iter());
        assert_eq!(pool.peek().collect::<Vec<_>>(), [4, 5, 2]);
        pool.take(2);
        assert_eq!(pool.peek().collect::<Vec<_>>(), [2]);
        pool.take(1);
        assert_eq!(pool.peek().next(), None);
    }

    #[test]
    fn a_number_rests_before_it_is_given_again() {
        let now = Instant::now();
        let mut pool = Pool::new(0, 1, std::iter::empty());
        pool.take(1);
        pool.release(0, now);
        pool.wake(now + REST - Duration::from_millis(1));
        assert_eq!((pool.peek().next(), pool.rests()), (None, true));
        pool.wake(now + REST);
        assert_eq!((pool.peek().next(), pool.rests()), (Some(0), false));
    }
}
