//! The snapshot on disk, which a crash may have cut short.
#![no_main]

use std::{fs, path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use mesh_agent::snapshot::{Interner, disk};

/// In memory where that is possible.
static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let shared = PathBuf::from("/dev/shm");
    let parent = if shared.is_dir() { shared } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("mesh-fuzz").tempdir_in(parent).expect("a directory").keep()
});

fuzz_target!(|bytes: &[u8]| {
    fs::write(disk::path(&DIR), bytes).expect("room for a snapshot");
    // Refused or taken, never a panic, and never memory beyond what the file's size allows.
    drop(disk::load(&DIR, &mut Interner::default()));
});
