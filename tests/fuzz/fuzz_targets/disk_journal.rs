//! What has changed since the snapshot was saved, which a crash may have cut short.
#![no_main]

use std::{fs, path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use mesh_agent::snapshot::{
    Held, Interner,
    journal::{self, Journal},
};

/// In memory where that is possible.
static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let shared = PathBuf::from("/dev/shm");
    let parent = if shared.is_dir() { shared } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("mesh-fuzz").tempdir_in(parent).expect("a directory").keep()
});

fuzz_target!(|bytes: &[u8]| {
    fs::write(journal::path(&DIR), bytes).expect("room for a journal");
    // What counts of it is taken in, never a panic, and never memory beyond what the file's size allows.
    drop(Journal::resume(&DIR, &mut Held::default(), &mut Interner::default()));
});
