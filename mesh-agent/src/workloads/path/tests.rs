use super::*;

const UID: &str = "0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f60";
const UID_: &str = "0f3f5a5c_9c1e_4d7a_8f2e_1b2c3d4e5f60";
const ID: &str = "3f4e1ba1c4d2a5c7e9f0112233445566778899aabbccddeeff00112233445566";

fn pod(path: &str) -> Option<(String, Option<String>)> {
    match parse(Path::new(path)) {
        CgroupKind::Pod { uid, container } => Some((uid, container)),
        CgroupKind::SystemdService(_) | CgroupKind::Other => None,
    }
}

#[test]
fn pods_of_all_drivers_classes_and_roots() {
    for path in [
        format!("kubepods.slice/kubepods-pod{UID_}.slice"),
        format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"),
        format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice"),
        format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/"),
        // kind: kubelet --cgroup-root=/kubelet
        format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UID_}.slice"),
        format!(
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{UID_}.slice"
        ),
        // kind and minikube seen from the machine that runs the node
        format!(
            "system.slice/docker-{ID}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{UID_}.slice"
        ),
        format!("docker/{ID}/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"),
        format!("kubepods/pod{UID}"),
        format!("kubepods/burstable/pod{UID}"),
        format!("kubepods/besteffort/pod{UID}"),
        format!("kubelet/kubepods/besteffort/pod{UID}"),
        format!("docker/{ID}/kubelet/kubepods/burstable/pod{UID}"),
        // k3s and microk8s with the cgroupfs driver
        format!("system.slice/k3s.service/kubepods/besteffort/pod{UID}"),
    ] {
        assert_eq!(pod(&path), Some((UID.to_owned(), None)), "{path}");
    }
}

#[test]
fn containers_of_all_runtimes() {
    let slice = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice");
    for name in ["cri-containerd-", "crio-", "docker-", "containerd-", "libpod-"] {
        let path = format!("{slice}/{name}{ID}.scope");
        assert_eq!(pod(&path), Some((UID.to_owned(), Some(ID.to_owned()))), "{path}");
    }
    for path in [format!("kubepods/pod{UID}/{ID}"), format!("kubepods/besteffort/pod{UID}/{ID}/init")] {
        assert_eq!(pod(&path), Some((UID.to_owned(), Some(ID.to_owned()))), "{path}");
    }
    let conmon = format!("{slice}/crio-conmon-{ID}.scope");
    assert_eq!(pod(&conmon), Some((UID.to_owned(), Some(ID.to_owned()))));
}

#[test]
fn static_pods_are_named_by_a_hash() {
    let hash = "5b2f6d1c0a9e8d7c6b5a493827160f1e";
    let slice = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{hash}.slice");
    assert_eq!(pod(&slice), Some((hash.to_owned(), None)));
    assert_eq!(pod(&format!("kubepods/burstable/pod{hash}")), Some((hash.to_owned(), None)));
}

#[test]
fn what_only_looks_like_a_pod_is_none() {
    for path in [
        "",
        "/",
        "..",
        "kubepods.slice",
        "kubepods.slice/kubepods-burstable.slice",
        "kubepods/burstable",
        "kubepods/pod",
        "kubepods/podfoo",
        "kubepods/burstable/pod..",
        "kubepods.slice/kubepods-pod.slice",
        "kubepods.slice/kubepods-podfoo.slice",
        // A UUID that is one digit short, and one with a wrong digit.
        "kubepods/pod0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f6",
        "kubepods/pod0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f6g",
        // Not where the kubelet puts pods.
        "pod0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f60",
        "user.slice/pod0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f60",
        "notkubepods.slice/notkubepods-pod0f3f5a5c_9c1e_4d7a_8f2e_1b2c3d4e5f60.slice",
        // A slice whose name does not continue its parent's.
        "kubepods.slice/kubepods-besteffort.slice/kubepods-burstable-pod0f3f5a5c_9c1e_4d7a_8f2e_1b2c3d4e5f60.slice",
        "kubepods/../kubepods/pod0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f60",
    ] {
        assert_eq!(pod(path), None, "{path}");
    }
}

#[test]
fn a_pod_inside_a_pod_is_the_outer_one() {
    let other = "aaaaaaaa-9c1e-4d7a-8f2e-1b2c3d4e5f60";
    let path = format!("kubepods/burstable/pod{UID}/{ID}/kubepods/pod{other}");
    assert_eq!(pod(&path), Some((UID.to_owned(), Some(ID.to_owned()))));
}

#[test]
fn services_of_systemd() {
    for (path, name) in [
        ("system.slice/nginx.service", "nginx"),
        ("system.slice/system-getty.slice/getty@tty1.service", "getty@tty1"),
        ("user.slice/user-1000.slice/user@1000.service/app.slice/dbus.service", "dbus"),
    ] {
        assert_eq!(parse(Path::new(path)), CgroupKind::SystemdService(name.to_owned()), "{path}");
    }
    for path in
        ["init.scope", "system.slice", "system.slice/.service", "user.slice/user-1000.slice/session-1.scope"]
    {
        assert_eq!(parse(Path::new(path)), CgroupKind::Other, "{path}");
    }
}

#[test]
fn names_that_are_not_utf8_are_nothing() {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::OsStr::from_bytes(b"kubepods/\xff.service");
    assert_eq!(parse(Path::new(path)), CgroupKind::Other);
}
