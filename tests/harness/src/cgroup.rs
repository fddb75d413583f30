//! Cgroups of nodes and pods, in the cgroup v2 tree wherever it is mounted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;

/// Mount points of file systems of type `kind`, in the order of `/proc/self/mountinfo`.
pub(crate) fn mounts_of(kind: &str, mountinfo: &str) -> Vec<PathBuf> {
    let mount_point = |line: &str| {
        let (fields, source) = line.split_once(" - ")?;
        let is_kind = source.split(' ').next() == Some(kind);
        is_kind.then(|| fields.split(' ').nth(4).map(PathBuf::from))?
    };
    mountinfo.lines().filter_map(mount_point).collect()
}

/// Where cgroup v2 is mounted.
pub fn cgroup2_mount() -> anyhow::Result<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    let first = mounts_of("cgroup2", &mountinfo).into_iter().next();
    first.context("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// A cgroup directory that kills its processes and disappears when dropped, its children included.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    keep: bool,
}

impl Cgroup {
    /// Creates `path` with its parents.
    pub fn create(path: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("creating cgroup {}", path.display()))?;
        Ok(Self { path, keep: false })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cgroup id, as the kernel programs see it: the inode number of the directory.
    pub fn id(&self) -> anyhow::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&self.path)?))
    }

    /// Leaves the directory and its processes alone when dropped.
    pub(crate) fn persist(&mut self) {
        self.keep = true;
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = remove_tree(&self.path)
        {
            crate::say(&format!("cgroup {} stays behind: {error:#}", self.path.display()));
        }
    }
}

/// Kills everything in `path` and below, and removes the directories.
pub(crate) fn remove_tree(path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    fs::write(path.join("cgroup.kill"), "1").context("cgroup.kill")?;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match remove_directories(path) {
            Ok(()) => return Ok(()),
            // The killed are still exiting.
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn remove_directories(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_directories(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Processor seconds that all processes of `cgroup` and below have used so far, those that have ended included.
pub fn cpu_seconds(cgroup: &Path) -> anyhow::Result<f64> {
    let path = cgroup.join("cpu.stat");
    let stat = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let microseconds = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let microseconds: u64 =
        microseconds.with_context(|| format!("no usage_usec in {stat}"))?.trim().parse()?;
    Ok(microseconds as f64 / 1e6)
}

/// The processes of `cgroup` itself.
pub fn processes(cgroup: &Path) -> anyhow::Result<Vec<u32>> {
    let path = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
}

/// Quality of service of a Kubernetes pod, which decides where its cgroup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qos {
    /// All limits equal their requests.
    Guaranteed,
    /// Some request or limit.
    Burstable,
    /// None.
    BestEffort,
}

/// Who made the pod cgroups: the two drivers of kubelet name them differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// `kubepods.slice/…/cri-containerd-ID.scope`
    Systemd,
    /// `kubepods/…/ID`
    Cgroupfs,
}

/// The path of a container's cgroup under its node's root, as kubelet and containerd name it.
pub fn container_path(driver: Driver, qos: Qos, pod_uid: &str, container: &str) -> PathBuf {
    let class = match qos {
        Qos::Guaranteed => "",
        Qos::Burstable => "burstable",
        Qos::BestEffort => "besteffort",
    };
    match (driver, class) {
        (Driver::Systemd, "") => {
            let pod = pod_uid.replace('-', "_");
            format!("kubepods.slice/kubepods-pod{pod}.slice/cri-containerd-{container}.scope")
        }
        (Driver::Systemd, class) => {
            let pod = pod_uid.replace('-', "_");
            let slice = format!("kubepods.slice/kubepods-{class}.slice/kubepods-{class}-pod{pod}.slice");
            format!("{slice}/cri-containerd-{container}.scope")
        }
        (Driver::Cgroupfs, "") => format!("kubepods/pod{pod_uid}/{container}"),
        (Driver::Cgroupfs, class) => format!("kubepods/{class}/pod{pod_uid}/{container}"),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_beside_version_one() {
        let mountinfo = "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            41 24 0:37 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(mounts_of("cgroup2", mountinfo), [PathBuf::from("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn kubernetes_paths_of_both_drivers() {
        let path = |driver, qos| container_path(driver, qos, "aa-bb", "c1").display().to_string();
        assert_eq!(
            path(Driver::Systemd, Qos::Burstable),
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podaa_bb.slice/cri-containerd-c1.scope"
        );
        assert_eq!(
            path(Driver::Systemd, Qos::Guaranteed),
            "kubepods.slice/kubepods-podaa_bb.slice/cri-containerd-c1.scope"
        );
        assert_eq!(path(Driver::Cgroupfs, Qos::BestEffort), "kubepods/besteffort/podaa-bb/c1");
        assert_eq!(path(Driver::Cgroupfs, Qos::Guaranteed), "kubepods/podaa-bb/c1");
    }
}
