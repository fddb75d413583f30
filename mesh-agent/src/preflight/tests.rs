use std::path::Path;

use super::facts::{effective, filesystem};
use super::*;

/// Two cgroup layouts of one machine: a v2 tree inside a v1 one, and a bpffs.
const MOUNTS: &str = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:21 / /sys rw,nosuid - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
42 23 0:39 / /sys/fs/bpf rw - bpf bpf rw,mode=700
43 22 0:40 / /mnt/a\\040b rw - cgroup2 none rw
";

fn good() -> Facts {
    Facts {
        release: "6.1.0-28-amd64".to_owned(),
        btf: true,
        cgroup_root: ("/sys/fs/cgroup".into(), Some("cgroup2".to_owned())),
        pin_path: ("/sys/fs/bpf/mesh".into(), Some("bpf".to_owned())),
        capabilities: Some(1 << 39 | 1 << 12 | 1 << 38 | 1 << 19 | 1 << 21),
        features: vec![("map hash", Ok(true))],
    }
}

/// The only check that fails.
fn only_failure(facts: &Facts) -> Check {
    let report = judge(facts);
    let failed: Vec<_> = report.failed().collect();
    assert_eq!(failed.len(), 1, "{report}");
    assert_eq!(report.exit_code(), 1);
    failed[0].clone()
}

#[test]
fn a_good_machine_passes() {
    let report = judge(&good());
    assert!(report.ok(), "{report}");
    assert_eq!(report.exit_code(), 0);
    assert!(report.to_string().ends_with("This machine can run the agent.\n"));
}

#[test]
fn kernels_are_compared_by_number() {
    for release in ["6.1.0", "6.12-rc3", "6.18.44-fc-v657", "10.0.0", "6.1"] {
        assert!(judge(&Facts { release: release.to_owned(), ..good() }).ok(), "{release}");
    }
    for release in ["6.0.19", "5.15.0-100-generic", "4.19.0", "", "six", "6", "6.x"] {
        let failure = only_failure(&Facts { release: release.to_owned(), ..good() });
        assert_eq!(failure.name, "kernel", "{release}");
        assert!(failure.detail.contains("6.1"), "{}", failure.detail);
    }
}

#[test]
fn each_missing_capability_is_named_with_its_purpose() {
    for capability in CAPABILITIES {
        let rest = good().capabilities.unwrap() & !(1 << capability.bit);
        let failure = only_failure(&Facts { capabilities: Some(rest), ..good() });
        assert_eq!(failure.name, capability.name);
        assert!(failure.detail.contains(capability.purpose), "{}", failure.detail);
    }
}

#[test]
fn missing_pieces_say_what_to_do() {
    let other = |kind: Option<&str>| ("/elsewhere".into(), kind.map(str::to_owned));
    for (facts, advice) in [
        (Facts { btf: false, ..good() }, "CONFIG_DEBUG_INFO_BTF"),
        (Facts { cgroup_root: other(Some("tmpfs")), ..good() }, "--cgroup-root"),
        (Facts { cgroup_root: other(None), ..good() }, "--cgroup-root"),
        (Facts { pin_path: other(Some("ext4")), ..good() }, "mount -t bpf"),
        (Facts { pin_path: other(None), ..good() }, "--pin-path"),
        (Facts { features: vec![("map hash", Ok(false))], ..good() }, "this kernel lacks it"),
        (Facts { features: vec![("map hash", Err("EPERM".to_owned()))], ..good() }, "EPERM"),
    ] {
        let failure = only_failure(&facts);
        assert!(failure.detail.contains(advice), "{}", failure.detail);
    }
}

#[test]
fn a_probe_without_capabilities_points_at_them() {
    let facts =
        Facts { capabilities: Some(0), features: vec![("map hash", Err("EPERM".to_owned()))], ..good() };
    let report = judge(&facts);
    let probe = report.failed().find(|check| check.name == "map hash").unwrap();
    assert!(probe.detail.contains("capabilities above"), "{}", probe.detail);
}

#[test]
fn the_deepest_mount_decides() {
    for (path, kind) in [
        ("/sys/fs/cgroup", "tmpfs"),
        ("/sys/fs/cgroup/unified", "cgroup2"),
        ("/sys/fs/cgroup/unified/node-a", "cgroup2"),
        ("/sys/fs/cgroup/unifiedly", "tmpfs"),
        ("/sys/fs/bpf/mesh", "bpf"),
        ("/mnt/a b/c", "cgroup2"),
        ("/etc", "ext4"),
    ] {
        assert_eq!(filesystem(MOUNTS, Path::new(path)).as_deref(), Some(kind), "{path}");
    }
    assert_eq!(filesystem("", Path::new("/")), None);
    assert_eq!(filesystem("rubbish\n1 2 3 - x", Path::new("/")), None);
}

#[test]
fn a_mount_over_another_one_wins() {
    let over = format!("{MOUNTS}50 42 0:50 / /sys/fs/bpf rw - tmpfs tmpfs rw\n");
    assert_eq!(filesystem(&over, Path::new("/sys/fs/bpf")).as_deref(), Some("tmpfs"));
}

#[test]
fn effective_capabilities_are_read() {
    assert_eq!(effective("CapPrm:\t1\nCapEff:\t000001fffeffffff\n"), Some(0x1ff_feff_ffff));
    assert_eq!(effective("CapEff:\tmany\n"), None);
    assert_eq!(effective(""), None);
}

#[test]
fn this_machine_can_be_looked_at() {
    // What it finds depends on the machine; that each fact is found does not.
    let config = crate::config::DatapathConfig {
        cgroup_root: "/".into(),
        pin_path: "/nonexistent/mesh".into(),
        sizes: crate::config::MapSizes {
            services: 1,
            backends: 1,
            pages: 1,
            workloads: 1,
            affinity: 1,
            udp_flows: 1,
            counters: 1,
            peers: 1,
            passages: 1,
            verdicts: 1,
        },
        kernel_log: crate::config::KernelLog::Off,
    };
    let facts = Facts::gather(&config);
    assert!(!facts.release.is_empty());
    assert!(facts.capabilities.is_some());
    assert!(facts.cgroup_root.1.is_some() && facts.pin_path.1.is_some());
    assert!(facts.features.len() > 10);
}
