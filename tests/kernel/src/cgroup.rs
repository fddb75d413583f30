//! A cgroup for one test; the whole process moves into it, since a cgroup (unlike a namespace) holds processes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A cgroup that this process is in. Dropping it goes back and removes it.
pub struct Cgroup {
    path: PathBuf,
    nested: Option<PathBuf>,
    before: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup named after the test and moves this process there.
    pub fn enter(test: &str) -> Result<Self> {
        let root = root()?;
        let before = own(&root)?;
        let name: String = test.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let path = root.join(format!("mesh-kernel-tests-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let cgroup = Self { path, nested: None, before };
        move_to(&cgroup.path)?;
        Ok(cgroup)
    }

    /// The cgroup.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a cgroup inside, and moves this process there.
    pub fn enter_nested(&mut self) -> Result<PathBuf> {
        let nested = self.path.join("nested");
        std::fs::create_dir(&nested).with_context(|| format!("cannot create {}", nested.display()))?;
        move_to(&nested)?;
        self.nested = Some(nested.clone());
        Ok(nested)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let left = move_to(&self.before);
        let removed = self.nested.iter().chain([&self.path]).try_for_each(|path| remove(path));
        if let Err(error) = left.and(removed) {
            println!("{error:#}");
        }
    }
}

fn move_to(cgroup: &Path) -> Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot enter {}", cgroup.display()))
}

/// The kernel lets go of a cgroup's last process a moment after it has left.
fn remove(cgroup: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(1);
    loop {
        match std::fs::remove_dir(cgroup) {
            Err(error) if Instant::now() > end => {
                return Err(error).with_context(|| format!("cannot remove {}", cgroup.display()));
            }
            Err(_busy) => std::thread::sleep(Duration::from_millis(5)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Where cgroup v2 is mounted.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts =
        std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    // … mount point is the fifth field; the type follows a lone hyphen.
    let mut cgroup2 = mounts.lines().filter(|line| line.contains(" - cgroup2 "));
    let point = cgroup2.find_map(|line| line.split(' ').nth(4));
    point.map(PathBuf::from).context("cgroup v2 is not mounted")
}

/// The cgroup that this process is in.
fn own(root: &Path) -> Result<PathBuf> {
    let all = std::fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let path =
        all.lines().find_map(|line| line.strip_prefix("0::/")).context("this process has no cgroup v2")?;
    Ok(root.join(path))
}
