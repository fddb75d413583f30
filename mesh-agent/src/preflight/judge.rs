//! From facts to verdicts. Pure.

use super::facts::{CAPABILITIES, Facts};
use super::{Check, Report};

/// Oldest kernel that is tested.
const OLDEST: (u32, u32) = (6, 1);

/// Judges every fact.
pub fn judge(facts: &Facts) -> Report {
    let mut checks = vec![kernel(facts), btf(facts), cgroup(facts), bpffs(facts)];
    checks.extend(CAPABILITIES.iter().map(|needed| {
        let has = facts.capabilities.map(|set| set & (1 << needed.bit) != 0);
        let detail = match has {
            Some(true) => "effective".to_owned(),
            Some(false) => format!(
                "missing, needed {}; run as root, or add it (systemd: AmbientCapabilities and CapabilityBoundingSet, \
                 Kubernetes: securityContext.capabilities.add)",
                needed.purpose
            ),
            None => "/proc/self/status does not say; is /proc mounted?".to_owned(),
        };
        check(needed.name, has == Some(true), detail)
    }));
    let privileged = checks.iter().all(|check| check.ok || !check.name.starts_with("CAP_"));
    checks.extend(facts.features.iter().map(|(name, found)| match found {
        Ok(true) => check(name, true, "supported".to_owned()),
        Ok(false) => check(
            name,
            false,
            "this kernel lacks it; use one of 6.1 or later with CONFIG_CGROUP_BPF=y".to_owned(),
        ),
        Err(error) if privileged => check(name, false, format!("could not be tried: {error}")),
        Err(error) => {
            check(name, false, format!("could not be tried without the capabilities above: {error}"))
        }
    }));
    Report { checks }
}

fn check(name: &str, ok: bool, detail: String) -> Check {
    Check { name: name.to_owned(), ok, detail }
}

fn kernel(facts: &Facts) -> Check {
    let (oldest, release) = (format!("{}.{}", OLDEST.0, OLDEST.1), &facts.release);
    match version(release) {
        Some(found) if found >= OLDEST => check("kernel", true, format!("Linux {release}")),
        Some(_) => check("kernel", false, format!("Linux {release} is too old; boot {oldest} or later")),
        None => check(
            "kernel",
            false,
            format!("the release {release:?} is not understood; {oldest} or later is needed"),
        ),
    }
}

/// Major and minor of a release such as `6.1.0-28-amd64` or `6.12-rc3`.
fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    Some((major.parse().ok()?, rest[..digits].parse().ok()?))
}

fn btf(facts: &Facts) -> Check {
    let detail = if facts.btf {
        "/sys/kernel/btf/vmlinux"
    } else {
        "/sys/kernel/btf/vmlinux is missing; use a kernel with CONFIG_DEBUG_INFO_BTF=y, or mount sysfs"
    };
    check("BTF", facts.btf, detail.to_owned())
}

fn cgroup(facts: &Facts) -> Check {
    let (path, kind) = &facts.cgroup_root;
    let shown = path.display();
    match kind.as_deref() {
        Some("cgroup2") => check("cgroup v2", true, format!("{shown}")),
        Some(other) => check(
            "cgroup v2",
            false,
            format!(
                "{shown} is on {other}; name a directory of a cgroup2 mount by --cgroup-root \
                 (boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none DIR)"
            ),
        ),
        None => check(
            "cgroup v2",
            false,
            format!("{shown} is no directory; name the cgroup2 mount by --cgroup-root"),
        ),
    }
}

fn bpffs(facts: &Facts) -> Check {
    let (path, kind) = &facts.pin_path;
    let shown = path.display();
    match kind.as_deref() {
        Some("bpf") => check("bpffs", true, format!("{shown}")),
        Some(other) => check(
            "bpffs",
            false,
            format!(
                "{shown} is on {other}; mount one (mount -t bpf bpf /sys/fs/bpf), or name a directory on it by --pin-path"
            ),
        ),
        None => check(
            "bpffs",
            false,
            format!("{shown} cannot be looked up; name a directory on a bpffs by --pin-path"),
        ),
    }
}
