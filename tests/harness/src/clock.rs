//! A wall clock that the test moves, for one agent alone: libfaketime stands between it and the C library. Monotonic time is left as it is, as when
//! somebody sets a machine's clock.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Below Debian's directory of the architecture (package `libfaketime`), or where others have it.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";

/// See the module.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// One that is right, in a directory of the test.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let clock = Self { library: library()?, file: dir.join("clock") };
        clock.moved_by(0)?;
        Ok(clock)
    }

    /// What puts a process under it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.display().to_string();
        let variables = [
            ("LD_PRELOAD", text(&self.library)),
            ("FAKETIME_TIMESTAMP_FILE", text(&self.file)),
            // Read at each look at the clock.
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("NO_FAKE_STAT", "1".to_owned()),
        ];
        variables.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// Is so many seconds ahead of the right time from now on, or behind.
    pub fn moved_by(&self, seconds: i64) -> anyhow::Result<()> {
        let next = self.file.with_extension("next");
        std::fs::write(&next, format!("{seconds:+}\n"))?;
        Ok(std::fs::rename(next, &self.file)?)
    }
}

/// The library, if it is installed.
pub(crate) fn library() -> anyhow::Result<PathBuf> {
    let debian = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let candidates = [&debian, "/usr/lib64", "/usr/lib"].map(|dir| Path::new(dir).join(LIBRARY));
    candidates.into_iter().find(|path| path.exists()).context("Debian's libfaketime is not installed")
}
