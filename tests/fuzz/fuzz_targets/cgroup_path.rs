//! Paths of cgroups, which anybody with a cgroup of his own may name.
#![no_main]

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::Path};

use libfuzzer_sys::fuzz_target;
use mesh_agent::workloads::{CgroupKind, path};

fuzz_target!(|bytes: &[u8]| {
    match path::parse(Path::new(OsStr::from_bytes(bytes))) {
        // A pod's uid is one part of a path, never a way out of it.
        CgroupKind::Pod { uid, .. } => assert!(!uid.is_empty() && !uid.contains('/')),
        _other => {}
    }
});
