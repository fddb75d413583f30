//! What an agent shows when it joins, and the files that say whom to believe.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_control::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, rest)) = bytes.split_first() else { return };
    let Ok(text) = str::from_utf8(rest) else { return };
    match which {
        b'C' => fuzzing::claims(rest),
        b'J' => fuzzing::join_tokens(text),
        _ => {
            // Keys and a token are separated by a NUL.
            let (keys, token) = text.split_once('\0').unwrap_or((KEYS, text));
            fuzzing::token(keys, token);
        }
    }
});

/// A key whose private half nobody has kept.
const KEYS: &str = include_str!("../seeds/keys.json");
