//! TCP and UDP, IPv4, IPv6 and IPv4 through IPv6 sockets; ports; what the application sees of its peer.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_harness::process::Process;
use mesh_harness::report::Attempts;
use mesh_harness::{Pod, Service, needs, peer};
use mesh_tests::Mesh;

const V6: [u16; 8] = [0xfd00, 0x96, 0, 0, 0, 0, 0, 1];

struct Dns {
    mesh: Mesh,
    client: Pod,
    service: Service,
    servers: Vec<(Process, Process, Pod)>,
}

/// A service of two pods, with TCP 80 → 8080, TCP 81 → 8081, UDP 53 → 5353, on an IPv4 and an IPv6 address.
fn dns() -> anyhow::Result<Dns> {
    let mesh = Mesh::start(&["z1", "z1"])?;
    let mut servers = Vec::new();
    for (node, name) in [(0, "a"), (1, "b")] {
        let pod = mesh.nodes[node].pod(name)?;
        mesh.cluster.manifests().put_pods([&*pod])?;
        servers.push((peer::tcp_echo(&pod, name, 8080)?, peer::udp_echo(&pod, name, 5353)?, pod));
    }
    let client = mesh.client(0, "client")?;
    let service = Service::new("dns", [10, 96, 0, 53]).also_at(V6).tcp(80, 8080).tcp(81, 8081).udp(53, 5353);
    let service = service.pods(servers.iter().map(|(_, _, pod)| &**pod));
    mesh.cluster.manifests().put_service(&service)?;
    let of = |v6: usize, port| {
        servers.iter().map(|(_, _, pod)| SocketAddr::new(pod.addresses()[v6], port)).collect::<Vec<_>>()
    };
    for v6 in [0, 1] {
        let at = |port| SocketAddr::new(service.addresses[v6], port);
        mesh.agents[0].wait_for_backends(&at(80), &of(v6, 8080))?;
        mesh.agents[0].wait_for_backends(&at(81), &of(v6, 8081))?;
        mesh.agents[0].wait_for_udp_backends(&at(53), &of(v6, 5353))?;
    }
    Ok(Dns { mesh, client, service, servers })
}

/// Both answered, nothing failed, and the client believes that it talks to `dialled`.
#[track_caller]
fn both_answer_as(seen: &Attempts, dialled: &str) {
    assert_eq!((seen.failed_total(), seen.answered), (0, seen.attempts), "{seen:?}");
    assert!(seen.of("a") > 0 && seen.of("b") > 0, "{seen:?}");
    assert_eq!(seen.peers.keys().collect::<Vec<_>>(), [dialled], "{seen:?}");
}

#[test]
fn tcp_over_both_families_and_through_mapped_sockets() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    let (v4, v6) = (dns.service.at(80), SocketAddr::new(dns.service.addresses[1], 80));
    for to in [v4, v6] {
        both_answer_as(&peer::connect(&dns.client, &to).count(50).run()?, &to.to_string());
    }
    let mapped = peer::connect(&dns.client, &v4).count(50).mapped().run()?;
    both_answer_as(&mapped, "[::ffff:10.96.0.53]:80");
    Ok(())
}

#[test]
fn udp_with_unconnected_sockets() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    let (v4, v6) = (dns.service.at(53), SocketAddr::new(dns.service.addresses[1], 53));
    for to in [v4, v6] {
        both_answer_as(&peer::udp(&dns.client, &to).count(50).run()?, &to.to_string());
    }
    both_answer_as(&peer::udp(&dns.client, &v4).count(50).mapped().run()?, "[::ffff:10.96.0.53]:53");
    Ok(())
}

#[test]
fn udp_with_connected_sockets() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    let (v4, v6) = (dns.service.at(53), SocketAddr::new(dns.service.addresses[1], 53));
    for to in [v4, v6] {
        both_answer_as(&peer::udp_connected(&dns.client, &to).count(50).run()?, &to.to_string());
    }
    both_answer_as(
        &peer::udp_connected(&dns.client, &v4).count(50).mapped().run()?,
        "[::ffff:10.96.0.53]:53",
    );
    Ok(())
}

#[test]
fn one_udp_socket_may_talk_to_the_service_and_to_others() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    let service = dns.service.at(53);
    // Another port than the backends': a socket that asks a service and its backend directly gets answers that look alike.
    let _other = peer::udp_echo(&dns.servers[1].2, "other", 5354)?;
    let direct = dns.servers[1].2.address(5354);
    let seen = peer::udp(&dns.client, &service).to(&direct).count(40).one_socket().run()?;
    assert_eq!((seen.answered, seen.failed_total()), (40, 0), "{seen:?}");
    // Each answer came from the address that was asked.
    assert_eq!(seen.peers.get(&service.to_string()), Some(&20), "{seen:?}");
    assert_eq!(seen.peers.get(&direct.to_string()), Some(&20), "{seen:?}");
    Ok(())
}

#[test]
fn ports_of_a_service_lead_to_their_own_targets() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    let nobody = peer::connect(&dns.client, &dns.service.at(81)).count(5).run()?;
    // On another node that shows only when the proxy there has tried: after connect(), as a reset.
    let known = nobody.failed.keys().all(|error| ["ECONNREFUSED", "ECONNRESET"].contains(&error.as_str()));
    assert!(nobody.failed_total() == 5 && known, "nobody listens on 8081 yet: {nobody:?}");
    let (_process, _, pod) = &dns.servers[0];
    let _second = peer::tcp_echo(pod, "a-second", 8081)?;
    let seen = peer::connect(&dns.client, &dns.service.at(81)).count(30).run()?;
    assert!(seen.of("a-second") > 0 && seen.by_name.len() == 1, "{seen:?}");
    // A port that the service does not have is no service: it passes, to an address that leads nowhere.
    let other = peer::connect(&dns.client, &dns.service.at(8080)).count(3).run()?;
    assert_eq!(other.failed_total(), 3, "{other:?}");
    assert!(!other.failed.contains_key("ECONNREFUSED"), "{other:?}");
    // TCP and UDP of one number are different services.
    let tcp = peer::connect(&dns.client, &dns.service.at(53)).count(3).run()?;
    assert_eq!(tcp.failed_total(), 3, "{tcp:?}");
    Ok(())
}

#[test]
fn unknown_destinations_pass_untouched() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    for to in [dns.servers[1].2.address(8080), dns.servers[1].2.address6(8080)] {
        let seen = peer::connect(&dns.client, &to).count(10).run()?;
        assert_eq!((seen.of("b"), seen.peers.get(&to.to_string())), (10, Some(&10)), "{seen:?}");
    }
    Ok(())
}

#[test]
fn every_byte_arrives_over_long_and_over_many_connections() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    for (v6, bytes, seed) in [(0, 20_000_003, 1), (1, 5_000_011, 2), (0, 1, 3), (1, 65_536, 4)] {
        let to = SocketAddr::new(dns.service.addresses[v6], 80);
        let transfer = peer::transfer(&dns.client, &to, bytes, seed)?;
        assert!(transfer.exact && transfer.received == bytes, "{transfer:?}");
        assert_eq!(transfer.peer, to.to_string());
    }
    let request = peer::request(&dns.client, &dns.service.at(80), 1000, Duration::from_millis(200))?;
    assert!(request.exact && request.round_trip.count > 0, "{request:?}");
    Ok(())
}

#[test]
fn processes_of_the_node_and_of_no_workload_are_balanced_too() -> anyhow::Result<()> {
    needs!(Mesh);
    let dns = dns()?;
    let host = dns.mesh.nodes[0].host_workload("sshd", "system.slice/sshd.service")?;
    let to = dns.service.at(80);
    both_answer_as(&peer::connect(&host, &to).count(50).run()?, &to.to_string());
    Ok(())
}
