//! What tests of several subsystems need.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

/// A directory of a test's own, removed at its end.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("mesh-agent-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A network namespace of a test's own, with its loopback up.
pub(crate) struct NetworkNamespace(pub(crate) String);

impl NetworkNamespace {
    /// None without the rights to make one.
    pub(crate) fn new() -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = Self(format!("mesh-agent-{}-{number}", std::process::id()));
        let made = Command::new("ip").args(["netns", "add", &namespace.0]).status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: network namespaces need root and iproute2");
            return None;
        }
        namespace.ip(&["link", "set", "lo", "up"]);
        Some(namespace)
    }

    /// `ip` in it.
    pub(crate) fn ip(&self, arguments: &[&str]) {
        assert!(Command::new("ip").args(["-n", &self.0]).args(arguments).status().unwrap().success());
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for NetworkNamespace {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "del", &self.0]).status());
    }
}
