//! What this machine is and what this process may do.

use std::fs;
use std::path::{Path, PathBuf};

use super::features;
use crate::config::DatapathConfig;

/// A capability that the agent needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// Its bit in `CapEff`.
    pub bit: u32,
    /// What for.
    pub purpose: &'static str,
}

/// All that the agent needs. Found on Linux 6.18 by leaving them out one by one: without CAP_BPF the first map is refused,
/// without CAP_NET_ADMIN the first program, without CAP_PERFMON the verifier's pointer rules refuse `connection`, without CAP_SYS_PTRACE
/// no pod's network namespace is found, without CAP_SYS_ADMIN none is entered. With these everything works, also for a user
/// other than root who owns the bpffs. Not among them: CAP_SYS_RESOURCE (map memory is charged to the cgroup since 5.11),
/// CAP_DAC_READ_SEARCH (anybody may read the cgroup tree).
pub const CAPABILITIES: [Capability; 5] = [
    Capability { name: "CAP_BPF", bit: 39, purpose: "to load programs and create maps" },
    Capability {
        name: "CAP_NET_ADMIN",
        bit: 12,
        purpose: "to load and attach programs that change where sockets connect",
    },
    Capability {
        name: "CAP_PERFMON",
        bit: 38,
        purpose: "for the verifier to accept the pointer arithmetic of compiled programs",
    },
    Capability { name: "CAP_SYS_PTRACE", bit: 19, purpose: "to find the network namespaces of pods" },
    Capability { name: "CAP_SYS_ADMIN", bit: 21, purpose: "to enter the network namespaces of pods" },
];

/// What the checks are about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// `/proc/sys/kernel/osrelease`.
    pub release: String,
    /// Whether the kernel says its types.
    pub btf: bool,
    /// Root of the cgroups, and the file system that it is on, if it is a directory.
    pub cgroup_root: (PathBuf, Option<String>),
    /// Directory for the pins, and the file system that it, or the deepest parent that exists, is on.
    pub pin_path: (PathBuf, Option<String>),
    /// `CapEff` of `/proc/self/status`.
    pub capabilities: Option<u64>,
    /// What the kernel answered to tiny programs and maps: the name, and whether it can; or why it cannot be known.
    pub features: Vec<(&'static str, Result<bool, String>)>,
}

impl Facts {
    /// Looks at this machine.
    pub fn gather(config: &DatapathConfig) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mountinfo = read("/proc/self/mountinfo");
        let root = &config.cgroup_root;
        let cgroup = fs::canonicalize(root).ok().filter(|path| path.is_dir());
        let pins = config.pin_path.ancestors().find_map(|path| fs::canonicalize(path).ok());
        Self {
            release: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            cgroup_root: (root.clone(), cgroup.and_then(|path| filesystem(&mountinfo, &path))),
            pin_path: (config.pin_path.clone(), pins.and_then(|path| filesystem(&mountinfo, &path))),
            capabilities: effective(&read("/proc/self/status")),
            features: features::probe(),
        }
    }
}

/// Type of the file system that an absolute path without links is on, by a `/proc/PID/mountinfo`.
pub(super) fn filesystem(mountinfo: &str, path: &Path) -> Option<String> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = crate::config::unescape(mount.split(' ').nth(4)?);
        path.starts_with(&point).then(|| (Path::new(&point).components().count(), kind.split(' ').next()))
    });
    // Of equally deep ones the last: it was mounted over the others.
    mounts.max_by_key(|(depth, _)| *depth).and_then(|(_, kind)| kind.map(str::to_owned))
}

/// The effective capabilities in a `/proc/PID/status`.
pub(super) fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}
