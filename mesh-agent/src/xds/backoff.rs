//! When to try again. Pure: attempt and random number are arguments.

use std::time::Duration;

/// Shortest wait.
pub const SHORTEST: Duration = Duration::from_millis(50);
/// Longest wait.
pub const LONGEST: Duration = Duration::from_secs(15);
/// A stream that lived this long was a good one, and the next failure counts as the first.
pub const SETTLED: Duration = Duration::from_secs(10);

/// The wait before attempt number `attempt` (0 is the first after a failure): twice as long each time, between half and
/// all of it by `random`, so that the agents of a mesh do not come back as one.
pub fn delay(attempt: u32, random: u64) -> Duration {
    let whole = (SHORTEST * 2).saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX)).min(LONGEST);
    let half = whole / 2;
    // 32 random bits scale the upper half.
    let nanos = half.as_nanos() * u128::from(random >> 32) / u128::from(u32::MAX);
    half + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

/// How many failures count when a stream ends that lived so long, after `failures` others.
pub fn counted(failures: u32, lived: Duration) -> u32 {
    if lived >= SETTLED { 0 } else { failures }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_between_the_limits() {
        for attempt in (0..40).chain([u32::MAX]) {
            for random in [0, 1 << 63, u64::MAX] {
                let wait = delay(attempt, random);
                assert!((SHORTEST..=LONGEST).contains(&wait), "{attempt} {random}: {wait:?}");
            }
        }
    }

    #[test]
    fn waits_grow_and_spread() {
        assert_eq!(delay(0, 0), Duration::from_millis(50));
        assert_eq!(delay(0, u64::MAX), Duration::from_millis(100));
        assert_eq!(delay(3, u64::MAX), Duration::from_millis(800));
        assert_eq!(delay(30, 0), Duration::from_millis(7500));
        assert_eq!(delay(30, u64::MAX), LONGEST);
    }

    #[test]
    fn only_a_stream_that_lived_starts_over() {
        assert_eq!(counted(4, SETTLED), 0);
        assert_eq!(counted(4, SETTLED - Duration::from_millis(1)), 4);
    }
}
