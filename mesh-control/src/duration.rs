//! Times on the command line: `90s`, `15m`, `24h`, `30d`. Pure.

use std::time::Duration;

/// Reads a whole number and its unit.
///
/// # Errors
/// When it is anything else, or nothing.
pub fn parse(text: &str) -> Result<Duration, String> {
    const UNITS: [(char, u64); 4] = [('s', 1), ('m', 60), ('h', 3_600), ('d', 86_400)];
    let found = UNITS.into_iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)));
    let time = found.and_then(|(number, seconds)| number.parse::<u64>().ok()?.checked_mul(seconds));
    // Beyond a century times of certificates can no longer be reckoned with.
    match time {
        Some(seconds) if (1..=3_153_600_000).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        Some(_) | None => Err("is no time: a number and s, m, h or d, as in 24h".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(parse("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("24h"), parse("1d"));
        for text in [
            "",
            "24",
            "h",
            "-1h",
            "0s",
            "1.5h",
            "1h30m",
            "99999999999999999999d",
            "18446744073709551615d",
            "1ms",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
