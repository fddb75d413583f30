//! Endpoints that are not ready, on their way out, gone, or very many.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_harness::{Algorithm, Endpoint, Service, needs, peer};
use mesh_tests::{Mesh, addresses};

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).tcp(80, 8080)
}

#[test]
fn a_service_without_backends_refuses_at_once() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve(&web(), &[])?;
    let seen = peer::connect(&client, &address).count(20).run()?;
    assert_eq!(seen.failed.get("ECONNREFUSED"), Some(&20), "{seen:?}");
    assert!(seen.failing.max_us < 100_000.0, "a refusal must not wait: {seen:?}");
    let udp = Service::new("udp", [10, 96, 0, 2]).udp(53, 53);
    let address = mesh.serve(&udp, &[])?;
    for client in [peer::udp(&client, &address), peer::udp_connected(&client, &address)] {
        let seen = client.count(5).run()?;
        assert_eq!(seen.failed.get("ECONNREFUSED"), Some(&5), "{seen:?}");
    }
    Ok(())
}

#[test]
fn unready_endpoints_get_nothing_unless_the_service_publishes_them() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "ready"), (0, "unready")])?;
    let client = mesh.client(0, "client")?;
    let endpoints = [Endpoint::of(&servers[0].pod), Endpoint::of(&servers[1].pod).unready()];
    let service = web().endpoints(endpoints);
    let address = mesh.serve(&service, &addresses(&servers[..1]))?;
    let seen = peer::connect(&client, &address).count(50).run()?;
    assert_eq!(seen.of("ready"), 50, "{seen:?}");
    mesh.serve(&Service { publish_not_ready: true, ..service }, &addresses(&servers))?;
    let seen = peer::connect(&client, &address).count(50).run()?;
    assert!(seen.of("unready") > 5 && seen.answered == 50, "{seen:?}");
    Ok(())
}

#[test]
fn a_service_whose_endpoints_are_all_unready_refuses() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "unready")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve(&web().endpoints([Endpoint::of(&servers[0].pod).unready()]), &[])?;
    let seen = peer::connect(&client, &address).count(5).run()?;
    assert_eq!(seen.failed.get("ECONNREFUSED"), Some(&5), "{seen:?}");
    Ok(())
}

#[test]
fn terminating_endpoints_serve_only_when_nothing_better_is_left() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "staying"), (0, "leaving")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    let (mut holder, before) = peer::hold(&client, &address, 20)?;
    assert_eq!(before.alive, 20);
    let leaving = Endpoint::of(&servers[1].pod).draining();
    mesh.serve(
        &web().endpoints([Endpoint::of(&servers[0].pod), leaving.clone()]),
        &addresses(&servers[..1]),
    )?;
    let seen = peer::connect(&client, &address).count(50).run()?;
    assert_eq!(seen.of("staying"), 50, "{seen:?}");
    // Connections to the one that leaves go on.
    assert_eq!(holder.ask()?.by_name, before.by_name);
    mesh.serve(&web().endpoints([leaving]), &addresses(&servers[1..]))?;
    let seen = peer::connect(&client, &address).count(20).run()?;
    assert_eq!((seen.of("leaving"), seen.failed_total()), (20, 0), "{seen:?}");
    holder.close()
}

#[test]
fn a_service_of_a_thousand_backends_uses_them_all() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let client = mesh.client(0, "client")?;
    let servers = mesh.nodes[1].pod("thousand")?;
    servers.own_range("10.102.64.0/22")?;
    let _echo = peer::tcp_echo_on(&servers, "@local", &["0.0.0.0:8080".parse()?])?;
    let all: Vec<Ipv4Addr> = (1..=1000_u16)
        .map(|i| {
            let [high, low] = i.to_be_bytes();
            Ipv4Addr::new(10, 102, 64 + high, low)
        })
        .collect();
    let backends: Vec<_> = all.iter().map(|&ip| SocketAddr::from((ip, 8080))).collect();
    let service = web().balanced(Algorithm::RoundRobin).endpoints(all.iter().map(|&ip| Endpoint::at(ip)));
    let address = mesh.serve(&service, &backends)?;
    let seen = peer::connect(&client, &address).count(2000).run()?;
    assert_eq!((seen.failed_total(), seen.by_name.len()), (0, 1000), "{:?}", seen.failures);
    assert!(seen.by_name.values().all(|&n| n == 2), "round robin is even");

    // One leaves: only it stops being used.
    let service = service.endpoints(all[1..].iter().map(|&ip| Endpoint::at(ip)));
    mesh.serve(&service, &backends[1..])?;
    let seen = peer::connect(&client, &address).count(1998).run()?;
    assert_eq!((seen.failed_total(), seen.by_name.len(), seen.of("10.102.64.1")), (0, 999, 0));
    Ok(())
}

#[test]
fn a_removed_service_is_no_longer_intercepted() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    assert_eq!(peer::connect(&client, &address).run()?.answered, 1);
    mesh.cluster.manifests().remove("service-web")?;
    mesh.agents[0].wait_until_gone(&address)?;
    let seen = peer::connect(&client, &address).timeout(Duration::from_secs(2)).run()?;
    assert!(seen.answered == 0 && !seen.failed.contains_key("ECONNREFUSED"), "{seen:?}");
    Ok(())
}
