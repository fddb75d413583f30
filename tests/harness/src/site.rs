//! What every cluster occupies outside its namespaces: a directory, a cgroup, pins; and how it is given back.
//!
//! The name `mesh-test-PID-N` is on all of them. The directory holds a locked file: who can take the lock of a
//! cluster knows that its owner is dead, and may clear it away.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};

use crate::cgroup::{self, Cgroup, cgroup2_mount};
use crate::netns::Netns;
use crate::sys;

const PREFIX: &str = "mesh-test-";
/// In the directory of a cluster that shall stay.
const KEPT: &str = "kept";
/// What nodes join with; it opens nothing but this cluster's control plane.
const TOKEN: &str = "a-token-of-the-test-cluster";
const BPFFS: &str = "/sys/fs/bpf";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// The resources of one cluster, given back when the last owner is gone.
#[derive(Debug)]
pub struct Site {
    id: String,
    dir: PathBuf,
    cgroup: Cgroup,
    fabric: Netns,
    kept: bool,
    _lock: File,
}

impl Site {
    /// Takes a new name with everything that belongs to it, after clearing away what the dead left.
    pub(crate) fn take(kept: bool) -> anyhow::Result<Self> {
        ensure!(sys::is_root(), "a cluster needs root, for namespaces, cgroups and kernel programs");
        mount_bpffs()?;
        clear_leftovers_of_the_dead()?;
        let id = format!("{PREFIX}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&id);
        fs::create_dir_all(dir.join("manifests"))?;
        // Renamed once it is locked: a file of the name `lock` that can be locked is a dead owner's.
        let lock = File::create(dir.join("lock.new"))?;
        ensure!(sys::try_lock(&lock), "{} is locked by someone else", dir.display());
        fs::rename(dir.join("lock.new"), dir.join("lock"))?;
        let mut cgroup = Cgroup::create(cgroup2_mount()?.join(&id))?;
        if kept {
            File::create(dir.join(KEPT))?;
            cgroup.persist();
        }
        fs::write(dir.join("token"), format!("{TOKEN}\n"))?;
        fs::write(dir.join("join-tokens"), format!("# Every node of this cluster\n* {TOKEN}\n"))?;
        let fabric = Netns::create()?;
        if kept {
            fabric.persist(&format!("{id}-fabric"))?;
        }
        Ok(Self { fabric, id, dir, cgroup, kept, _lock: lock })
    }

    /// `mesh-test-PID-N`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Directory for logs, sockets, state.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the control plane's certificates chain to, once it has started.
    pub fn roots(&self) -> PathBuf {
        self.dir.join("control/ca/root-cert.pem")
    }

    /// The cgroup above all of the cluster's.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The namespace between the nodes, where the control plane runs.
    pub fn fabric(&self) -> &Netns {
        &self.fabric
    }

    /// Everything outlives this process, until [`remove`] or a reboot.
    pub fn kept(&self) -> bool {
        self.kept
    }

    /// The directory of pins of a node's agent.
    pub fn pins(&self, node: &str) -> PathBuf {
        Path::new(BPFFS).join(format!("{}-{node}", self.id))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = remove(&self.id) {
            crate::say(&format!("{} is not fully removed: {error:#}", self.id));
        }
    }
}

/// Removes what cluster `id` occupies: processes, pins, cgroups, named namespaces, directory.
pub fn remove(id: &str) -> anyhow::Result<()> {
    cgroup::remove_tree(&cgroup2_mount()?.join(id))?;
    for pins in entries(Path::new(BPFFS), id)? {
        fs::remove_dir_all(&pins).with_context(|| pins.display().to_string())?;
    }
    for name in entries(Path::new("/run/netns"), id)? {
        sys::unmount(&name).with_context(|| name.display().to_string())?;
        fs::remove_file(&name)?;
    }
    match fs::remove_dir_all(std::env::temp_dir().join(id)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What is left of cluster `id`; empty when it is fully gone.
pub fn leftovers(id: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for dir in [Path::new(BPFFS), Path::new("/run/netns"), &cgroup2_mount()?, &std::env::temp_dir()] {
        found.extend(entries(dir, id)?.into_iter().map(|path| path.display().to_string()));
    }
    for process in fs::read_dir("/proc")?.flatten() {
        // Not a process, or one that has just ended.
        let Ok(cgroups) = fs::read_to_string(process.path().join("cgroup")) else { continue };
        if cgroups.lines().any(|line| line.split('/').any(|part| part == id)) {
            found.push(format!("process {}", process.file_name().display()));
        }
    }
    Ok(found)
}

/// The clusters that were asked to stay.
pub fn kept() -> anyhow::Result<Vec<String>> {
    let dirs = entries(&std::env::temp_dir(), PREFIX.trim_end_matches('-'))?;
    let kept = dirs.into_iter().filter(|dir| dir.join(KEPT).exists());
    Ok(kept.filter_map(|dir| Some(dir.file_name()?.to_str()?.to_owned())).collect())
}

/// Paths in `dir` named `id` or `id-…`.
fn entries(dir: &Path, id: &str) -> anyhow::Result<Vec<PathBuf>> {
    let Ok(listing) = fs::read_dir(dir) else { return Ok(Vec::new()) };
    let mine =
        |name: &str| name.strip_prefix(id).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
    let paths = listing.flatten().filter(|entry| entry.file_name().to_str().is_some_and(mine));
    Ok(paths.map(|entry| entry.path()).collect())
}

fn mount_bpffs() -> anyhow::Result<()> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    if cgroup::mounts_of("bpf", &mountinfo).iter().any(|path| path == Path::new(BPFFS)) {
        return Ok(());
    }
    let mounted = sys::mount("bpf", Path::new(BPFFS));
    mounted.with_context(|| format!("{BPFFS} is not mounted, and mounting bpffs there fails"))
}

fn clear_leftovers_of_the_dead() -> anyhow::Result<()> {
    // One at a time: two would remove the same. A directory can be locked like a file.
    let one_at_a_time = File::open(std::env::temp_dir())?;
    sys::lock(&one_at_a_time)?;
    let prefix = PREFIX.trim_end_matches('-');
    let mut ids = std::collections::BTreeSet::new();
    for dir in [Path::new(BPFFS), &cgroup2_mount()?, &std::env::temp_dir()] {
        for path in entries(dir, prefix)? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            // Pins carry the node's name behind the cluster's: mesh-test-PID-N-NODE.
            let id: Vec<&str> = name.split('-').take(4).collect();
            if id.len() == 4 {
                ids.insert(id.join("-"));
            }
        }
    }
    for id in ids.iter().filter(|id| owner_is_dead(id)) {
        crate::say(&format!("clearing away {id}, whose process is gone"));
        remove(id)?;
    }
    Ok(())
}

fn owner_is_dead(id: &str) -> bool {
    let dir = std::env::temp_dir().join(id);
    if dir.join(KEPT).exists() {
        return false;
    }
    let pid = id.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).unwrap_or_default();
    if Path::new("/proc").join(pid).exists() {
        // Alive, or a stranger with its number: only the lock can tell.
        return File::open(dir.join("lock")).is_ok_and(|lock| sys::try_lock(&lock));
    }
    true
}
