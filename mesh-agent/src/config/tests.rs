use clap::CommandFactory;

use super::*;

const MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

fn config(flags: &[&str]) -> Result<Config, ConfigError> {
    let flags = ["mesh-agent", "run"].iter().chain(flags);
    let Command::Run(args) = Cli::try_parse_from(flags).unwrap().command else { panic!("not run") };
    args.validate_on("host-1", MOUNTS)
}

/// The flag that is to blame.
fn blamed(flags: &[&str]) -> &'static str {
    config(flags).unwrap_err().flag
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn nothing_given_means_the_documented_defaults() {
    let config = config(&[]).unwrap();
    assert_eq!((&*config.node.name, &*config.node.cluster_id), ("host-1", "Kubernetes"));
    assert!(config.xds.is_none());
    assert_eq!(config.datapath.cgroup_root, PathBuf::from("/sys/fs/cgroup/uni fied"));
    assert_eq!(config.datapath.pin_path, PathBuf::from("/sys/fs/bpf/mesh"));
    let sizes = config.datapath.sizes;
    assert_eq!(
        (sizes.services, sizes.backends, sizes.pages, sizes.workloads),
        (16_384, 131_072, 32_768, 8_192)
    );
    assert_eq!((sizes.affinity, sizes.udp_flows, sizes.counters), (65_536, 65_536, 16_384));
    assert_eq!(config.datapath.kernel_log, KernelLog::Off);
    assert_eq!(config.admin.metrics_address, "0.0.0.0:15020".parse().unwrap());
    assert_eq!(config.admin.socket, PathBuf::from("/run/mesh-agent/admin.sock"));
    assert_eq!(config.state_dir, PathBuf::from("/var/lib/mesh-agent"));
}

#[test]
fn flags_arrive() {
    let config = config(&[
        "--node-name=a",
        "--control-plane=https://[::1]:15012",
        "--control-plane-root=/etc/mesh/root.pem",
        "--token-file=/var/run/token",
        "--cgroup-root=/c",
        "--pin-path=/p",
        "--region=r",
        "--zone=z",
        "--max-services=1",
        "--kernel-log=debug",
        "--log-format=json",
        "--metrics-address=[::1]:1",
    ])
    .unwrap();
    assert_eq!(&*config.node.name, "a");
    assert_eq!((config.node.region.as_deref(), config.node.zone.as_deref()), (Some("r"), Some("z")));
    let xds = config.xds.unwrap();
    assert_eq!((xds.server.address.to_string(), xds.node), ("https://[::1]:15012/".to_owned(), config.node));
    assert_eq!(xds.server.name, rustls::pki_types::ServerName::try_from("::1").unwrap());
    assert_eq!(xds.server.root, PathBuf::from("/etc/mesh/root.pem"));
    assert_eq!(xds.server.token, Some(PathBuf::from("/var/run/token")));
    assert_eq!(xds.authority, xds.server);
    assert_eq!((config.datapath.sizes.services, config.datapath.kernel_log), (1, KernelLog::Debug));
    assert_eq!(config.log_format, LogFormat::Json);
}

#[test]
fn sizes_of_nothing_and_of_too_much_are_refused_by_flag() {
    for flag in [
        "--max-services",
        "--max-backends",
        "--max-pages",
        "--max-workloads",
        "--max-affinity",
        "--max-udp-flows",
        "--max-counters",
    ] {
        assert_eq!(blamed(&[flag, "0"]), flag);
        assert_eq!(blamed(&[flag, "16777217"]), flag);
        assert!(config(&[flag, "16777216"]).is_ok());
    }
}

const ROOT: &str = "--control-plane-root=/r";

#[test]
fn what_cannot_be_a_control_plane_is_refused() {
    for url in [
        "127.0.0.1:15012",
        "http://c:15010",
        "https://",
        "https://a b",
        "unix:///x",
        "",
        "/x",
        "https://:80",
        "https://a/b",
        "https://a?b",
        "https://u@a:1",
    ] {
        assert_eq!(blamed(&["--control-plane", url, ROOT]), "--control-plane", "{url}");
        let flags = ["--control-plane=https://c", ROOT, "--ca-address", url];
        assert_eq!(blamed(&flags), "--ca-address", "{url}");
    }
    let error = config(&["--control-plane", "plane:15010", ROOT]).unwrap_err().to_string();
    assert!(error.starts_with("--control-plane: \"plane:15010\""), "{error}");
    let error = config(&["--control-plane", "http://plane:15010", ROOT]).unwrap_err().to_string();
    assert!(error.contains("without TLS") && error.contains("https"), "{error}");
}

#[test]
fn a_control_plane_needs_a_root_to_be_known_by() {
    assert_eq!(blamed(&["--control-plane=https://c:15012"]), "--control-plane-root");
    let flags = ["--control-plane=https://c:15012", ROOT];
    let with = |flag: &str| config(&[&flags[..], &[flag]].concat());
    let xds = with("--control-plane-name=istiod.istio-system.svc").unwrap().xds.unwrap();
    let name = rustls::pki_types::ServerName::try_from("istiod.istio-system.svc").unwrap();
    assert_eq!((&xds.server.name, &xds.authority.name), (&name, &name));
    assert_eq!(with("--control-plane-name=a b").unwrap_err().flag, "--control-plane-name");
    assert_eq!(with("--token-file=relative").unwrap_err().flag, "--token-file");
    let xds = with("--ca-address=https://ca:8443").unwrap().xds.unwrap();
    assert_eq!(xds.authority.name, rustls::pki_types::ServerName::try_from("ca").unwrap());
    assert_eq!((xds.authority.address.port_u16(), xds.authority.root), (Some(8443), xds.server.root));
    assert_eq!(blamed(&["--ca-address=https://ca:8443"]), "--ca-address");
}

#[test]
fn a_node_says_who_it_is_in_istios_form() {
    let id = |flags: &[&str]| config(flags).unwrap().node.id;
    assert_eq!(id(&[]), "ztunnel~127.0.0.1~host-1.mesh-system~mesh-system.svc.cluster.local");
    let flags = ["--namespace=istio-system", "--node-name=a", "--node-ip=fd00::1"];
    assert_eq!(id(&flags), "ztunnel~fd00::1~a.istio-system~istio-system.svc.cluster.local");
    let own = "router~10.0.0.1~gw.n~n.svc.example";
    assert_eq!(id(&["--node-id", own]), own);
    for odd in [
        "",
        "a",
        "x~10.0.0.1~a.n~n.svc",
        "ztunnel~10.0.0~a.n~n.svc",
        "ztunnel~10.0.0.1~~n",
        "ztunnel~10.0.0.1~a b~n",
    ] {
        assert_eq!(blamed(&["--node-id", odd]), "--node-id", "{odd}");
    }
    assert_eq!(blamed(&["--namespace=a b"]), "--namespace");
}

#[test]
fn names_that_would_break_the_wire_are_refused() {
    for name in ["", "a b", "a~b", "a/b", "a\nb", "ä", &"x".repeat(254)] {
        assert_eq!(blamed(&["--node-name", name]), "--node-name", "{name}");
        assert_eq!(blamed(&["--zone", name]), "--zone", "{name}");
    }
}

#[test]
fn paths_have_to_be_absolute_and_to_fit() {
    for flag in ["--cgroup-root", "--pin-path", "--state-dir", "--admin-socket"] {
        assert_eq!(blamed(&[flag, "a/b"]), flag);
    }
    let long = format!("/{}", "s".repeat(106));
    assert_eq!(blamed(&["--admin-socket", &long]), "--admin-socket");
    assert!(config(&["--admin-socket", &long[..106]]).is_ok());
}

#[test]
fn without_a_cgroup2_the_root_has_to_be_named() {
    let Command::Run(args) = Cli::try_parse_from(["mesh-agent", "run"]).unwrap().command else { panic!() };
    let error = args.validate_on("h", "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n").unwrap_err();
    assert_eq!(error.flag, "--cgroup-root");
    assert_eq!(cgroup2_mount(""), None);
    assert_eq!(cgroup2_mount("garbage - cgroup2\n - \n-"), None);
}
