//! The harness itself, without a mesh: what the other tests stand on.

use std::time::{Duration, Instant};

use mesh_harness::manifest::Service;
use mesh_harness::{Cluster, cgroup, needs, peer, site};

#[test]
fn pods_of_two_nodes_reach_each_other_over_tcp_and_udp_in_both_families() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let (one, two) = (cluster.node("z1")?, cluster.node("z2")?);
    let (near, far, client) = (one.pod("near")?, two.pod("far")?, one.pod("client")?);
    for (pod, name) in [(&near, "near"), (&far, "far")] {
        let _tcp = peer::tcp_echo(pod, name, 8080)?;
        let _udp = peer::udp_echo(pod, name, 5353)?;
        for to in [pod.address(8080), pod.address6(8080)] {
            let seen = peer::connect(&client, &to).count(20).concurrency(2).run()?;
            assert_eq!((seen.of(name), seen.failed_total()), (20, 0), "{seen:?}");
            let own = client.addresses().map(|ip| ip.to_string());
            assert!(seen.seen_as.keys().all(|ip| own.iter().any(|own| ip.contains(own))), "{seen:?}");
            assert_eq!(seen.peers.keys().collect::<Vec<_>>(), [&to.to_string()]);
        }
        for to in [pod.address(5353), pod.address6(5353)] {
            for client in [peer::udp(&client, &to), peer::udp_connected(&client, &to)] {
                let seen = client.count(20).run()?;
                assert_eq!((seen.of(name), seen.failed_total()), (20, 0), "{seen:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn ipv4_through_ipv6_sockets() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let (_tcp, _udp) = (peer::tcp_echo(&server, "server", 80)?, peer::udp_echo(&server, "server", 53)?);
    let dialled = |port| format!("[::ffff:{}]:{port}", server.addresses()[0]);
    let tcp = peer::connect(&client, &server.address(80)).mapped().count(5).run()?;
    assert_eq!((tcp.of("server"), tcp.peers.get(&dialled(80))), (5, Some(&5)), "{tcp:?}");
    let udp = peer::udp(&client, &server.address(53)).mapped().count(5).run()?;
    assert_eq!((udp.of("server"), udp.peers.get(&dialled(53))), (5, Some(&5)), "{udp:?}");
    Ok(())
}

#[test]
fn failures_are_reported_with_their_errno_and_fast() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let closed = peer::connect(&client, &server.address(81)).count(3).run()?;
    assert_eq!(closed.failed.get("ECONNREFUSED"), Some(&3), "{closed:?}");
    // Service addresses lead nowhere without a mesh, and the network says so.
    let nowhere = peer::connect(&client, &"10.96.0.1:80".parse()?).count(2).run()?;
    assert_eq!(nowhere.failed_total(), 2, "{nowhere:?}");
    assert!(nowhere.failing.max_us < 1e6, "{nowhere:?}");
    Ok(())
}

#[test]
fn streams_are_compared_byte_by_byte() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let _echo = peer::tcp_echo(&server, "server", 80)?;
    let transfer = peer::transfer(&client, &server.address(80), 3_000_001, 7)?;
    assert!(transfer.exact && transfer.received == 3_000_001, "{transfer:?}");
    let request = peer::request(&client, &server.address(80), 64, Duration::from_millis(50))?;
    assert!(request.exact && request.round_trip.count > 10, "{request:?}");
    let throughput = peer::throughput(&client, &server.address(80), 65536, Duration::from_millis(50))?;
    assert!(throughput.exact && throughput.received > 65536, "{throughput:?}");
    let before = cgroup::cpu_seconds(server.cgroup().path())?;
    let to = server.address(80);
    let several = peer::throughput_of(&client, &to, 4, 65536, Duration::from_millis(50))?;
    assert!(several.exact && several.received > 4 * 65536, "{several:?}");
    assert!(cgroup::cpu_seconds(server.cgroup().path())? > before, "receiving costs nothing?");
    let (mut holder, held) = peer::hold(&client, &server.address(80), 5)?;
    assert_eq!((held.alive, holder.ask()?.alive), (5, 5));
    holder.close()
}

#[test]
fn a_watch_tells_when_another_server_answers() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let first = peer::tcp_echo(&server, "first", 80)?;
    let mut watch = peer::watch(&client, &server.address(80))?;
    assert_eq!(watch.change()?.name, "first");
    let began = mesh_harness::sys::monotonic_nanoseconds();
    drop(first);
    let gone = watch.change()?;
    assert!(gone.name == "ECONNREFUSED" || gone.name == "ECONNRESET", "{gone:?}");
    assert!(gone.at_ns > began && gone.at_ns - began < 1_000_000_000, "{gone:?}");
    let _second = peer::tcp_echo(&server, "second", 80)?;
    // Between the two, the error may have another name.
    let next = watch.change()?;
    assert!(next.name == "second" || watch.change()?.name == "second", "{next:?}");
    Ok(())
}

#[test]
fn a_relay_can_be_slow_or_wrong() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let _echo = peer::tcp_echo(&server, "server", 80)?;
    let (to, fabric) = (server.address(80).to_string(), |port| format!("172.16.1.1:{port}").parse());
    let _slow = cluster.relay(1001, &to, &["--delay-ms", "30"])?;
    let seen = peer::connect(&client, &fabric(1001)?).count(3).run()?;
    assert!(seen.of("server") == 3 && seen.whole.p50_us > 60_000.0, "{seen:?}");
    let _wrong = cluster.relay(1002, &to, &["--corrupt"])?;
    let transfer = peer::transfer(&client, &fabric(1002)?, 10_000, 1)?;
    assert!(!transfer.exact && transfer.received == 10_000, "{transfer:?}");
    let _dead = cluster.relay(1003, &to, &["--hang"])?;
    let seen = peer::connect(&client, &fabric(1003)?).timeout(Duration::from_millis(100)).run()?;
    assert_eq!(seen.answered, 0, "{seen:?}");
    Ok(())
}

#[test]
fn a_pod_can_answer_for_a_range_of_addresses() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let (server, client) = (node.pod("server")?, cluster.node("z2")?.pod("client")?);
    server.own_range("10.101.64.0/22")?;
    let _echo = peer::tcp_echo(&server, "@local", 80)?;
    let client = peer::connect(&client, &"10.101.64.1:80".parse()?).to(&"10.101.67.9:80".parse()?);
    let seen = client.count(4).run()?;
    assert_eq!((seen.of("10.101.64.1"), seen.of("10.101.67.9")), (2, 2), "{seen:?}");
    Ok(())
}

#[test]
fn processes_are_in_the_cgroup_of_their_pod() -> anyhow::Result<()> {
    needs!(Root);
    let cluster = Cluster::start()?;
    let node = cluster.node("z1")?;
    let pod = node.pod("app")?;
    let echo = peer::tcp_echo(&pod, "app", 80)?;
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", echo.pid()))?;
    let unified = cgroups.lines().find(|line| line.starts_with("0::")).unwrap_or_default();
    let path = pod.cgroup_path("app").display().to_string();
    assert!(unified.ends_with(&format!("{}/node-1/{path}", cluster.id())), "{unified}");
    assert!(path.starts_with("kubepods.slice/kubepods-burstable.slice/"), "{path}");
    Ok(())
}

#[test]
fn two_clusters_with_the_same_addresses_do_not_meet() -> anyhow::Result<()> {
    needs!(Root);
    let (one, two) = (Cluster::start()?, Cluster::start()?);
    let mut pods = Vec::new();
    for (cluster, name) in [(&one, "of-one"), (&two, "of-two")] {
        let node = cluster.node("z1")?;
        pods.push((node.pod("server")?, node.pod("client")?, name));
    }
    let echoes = pods.iter().map(|(server, _, name)| peer::tcp_echo(server, name, 80));
    let _echoes = echoes.collect::<Result<Vec<_>, _>>()?;
    for (server, client, name) in &pods {
        let seen = peer::connect(client, &server.address(80)).count(3).run()?;
        assert_eq!(seen.of(name), 3, "{seen:?}");
    }
    Ok(())
}

#[test]
fn nothing_is_left_after_a_test_and_after_a_panic() -> anyhow::Result<()> {
    needs!(Root);
    let build = || -> anyhow::Result<_> {
        let cluster = Cluster::start()?;
        let node = cluster.node("z1")?;
        let pod = node.pod("app")?;
        let echo = peer::tcp_echo(&pod, "app", 80)?;
        std::fs::create_dir_all(node.pins())?;
        Ok((echo, pod, cluster))
    };
    let all = build()?;
    let id = all.2.id().to_owned();
    assert!(
        site::leftovers(&id)?.len() >= 4,
        "directory, cgroup, pins, process: {:?}",
        site::leftovers(&id)?
    );
    drop(all);
    assert_eq!(site::leftovers(&id)?, [""; 0]);

    let panicked = std::thread::spawn(move || {
        let all = build().unwrap();
        std::panic::panic_any(all.2.id().to_owned());
    });
    let id = *panicked.join().unwrap_err().downcast::<String>().unwrap();
    assert_eq!(site::leftovers(&id)?, [""; 0]);
    Ok(())
}

#[test]
fn what_the_dead_left_is_cleared_away_at_the_next_start() -> anyhow::Result<()> {
    needs!(Root);
    // No process has this number: the kernel's limit is 4194304.
    let id = "mesh-test-4194305-0";
    let cgroup = mesh_harness::cgroup::cgroup2_mount()?.join(id);
    std::fs::create_dir_all(cgroup.join("node-1/kubepods.slice"))?;
    std::fs::create_dir_all(std::env::temp_dir().join(id))?;
    let _cluster = Cluster::start()?;
    assert_eq!(site::leftovers(id)?, [""; 0]);
    Ok(())
}

#[test]
fn a_cluster_with_ten_pods_starts_within_two_seconds() -> anyhow::Result<()> {
    needs!(Root);
    let begin = Instant::now();
    let cluster = Cluster::start()?;
    let nodes = [cluster.node("z1")?, cluster.node("z2")?];
    let pods = (0..10).map(|i| nodes[i % 2].pod(&format!("p{i}"))).collect::<Result<Vec<_>, _>>()?;
    cluster
        .manifests()
        .put_service(&Service::new("all", [10, 96, 0, 1]).tcp(80, 8080).pods(pods.iter().map(|p| &**p)))?;
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    Ok(())
}
