//! What the path of a cgroup says about it.
//!
//! The kubelet's drivers name a pod's cgroup after its UID (for a static pod: a hash of its manifest):
//!
//! * systemd: `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID with _ for ->.slice`, without the
//!   middle part for guaranteed pods, and one `<runtime>-<id>.scope` below for each container;
//! * cgroupfs: `kubepods/burstable/pod<UID>`, and one directory `<id>` below for each container.
//!
//! Both may lie deeper: under `--cgroup-root` of the kubelet (kind: `kubelet.slice/kubelet-kubepods.slice/…`, `kubelet/kubepods/…`)
//! or inside a node that is itself a container (`docker/<id>/kubepods/…`). Where such a node runs in a pod, its agent's
//! `--cgroup-root` has to name the node's own subtree.

use std::path::{Component, Path};

/// What a cgroup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupKind {
    /// A pod's cgroup, or something below it.
    Pod {
        /// The pod's UID, as its metadata has it.
        uid: String,
        /// The container's id, for a cgroup below the pod's.
        container: Option<String>,
    },
    /// A systemd service's own cgroup; the unit's name without `.service`.
    SystemdService(String),
    /// Anything else.
    Other,
}

/// Reads a path relative to the root of the tree.
pub fn parse(path: &Path) -> CgroupKind {
    let Some(parts) = parts(path) else { return CgroupKind::Other };
    // The first one from the root: what lies below a pod's cgroup is that pod's, whatever it calls itself.
    let pod =
        parts.iter().enumerate().find_map(|(at, part)| pod_uid(&parts[..at], part).map(|uid| (at, uid)));
    if let Some((at, uid)) = pod {
        return match parts.get(at + 1) {
            None => CgroupKind::Pod { uid, container: None },
            Some(child) => CgroupKind::Pod { uid, container: Some(container(child).to_owned()) },
        };
    }
    match parts.last().and_then(|last| last.strip_suffix(".service")) {
        Some(name) if !name.is_empty() => CgroupKind::SystemdService(name.to_owned()),
        _ => CgroupKind::Other,
    }
}

fn parts(path: &Path) -> Option<Vec<&str>> {
    path.components()
        .filter(|part| !matches!(part, Component::CurDir | Component::RootDir))
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            Component::Prefix(_) | Component::RootDir | Component::CurDir | Component::ParentDir => None,
        })
        .collect()
}

/// The UID, if `part` under `parents` is the cgroup of a pod.
fn pod_uid(parents: &[&str], part: &str) -> Option<String> {
    match part.strip_suffix(".slice") {
        Some(slice) => systemd_pod(parents.last()?, slice),
        None => cgroupfs_pod(parents, part),
    }
}

/// A slice is named after all of its parents: `a-b-c.slice` is in `a-b.slice`. So what its parent adds to the name is the pod.
fn systemd_pod(parent: &str, slice: &str) -> Option<String> {
    let parent = parent.strip_suffix(".slice")?;
    let qos = ["-besteffort", "-burstable"].iter().find_map(|qos| parent.strip_suffix(qos)).unwrap_or(parent);
    if qos != "kubepods" && !qos.ends_with("-kubepods") {
        return None;
    }
    let uid = slice.strip_prefix(parent)?.strip_prefix("-pod")?;
    // Slices cannot hold "-" in their own part of the name, so the kubelet writes "_".
    uid_of(&uid.replace('_', "-"))
}

fn cgroupfs_pod(parents: &[&str], part: &str) -> Option<String> {
    let above = match parents {
        [above @ .., "besteffort" | "burstable"] => above,
        all => all,
    };
    (above.last() == Some(&"kubepods")).then(|| part.strip_prefix("pod").and_then(uid_of)).flatten()
}

/// A UUID, or the 32 hexadecimal digits of a static pod's manifest hash.
fn uid_of(text: &str) -> Option<String> {
    let hex = |s: &str| s.bytes().all(|b| b.is_ascii_hexdigit());
    let uuid = || {
        let groups: Vec<&str> = text.split('-').collect();
        groups.iter().map(|g| g.len()).eq([8, 4, 4, 4, 12]) && groups.iter().all(|g| hex(g))
    };
    ((text.len() == 32 && hex(text)) || uuid()).then(|| text.to_owned())
}

/// The id in `<runtime>-<id>.scope`, or the whole name.
fn container(part: &str) -> &str {
    match part.strip_suffix(".scope") {
        Some(scope) => scope.rsplit_once('-').map_or(scope, |(_runtime, id)| id),
        None => part,
    }
}

#[cfg(test)]
mod tests;
