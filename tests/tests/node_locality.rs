//! Which backends a node uses when they are near and far.

use std::collections::BTreeSet;

use mesh_harness::report::Attempts;
use mesh_harness::{Service, needs, peer};
use mesh_tests::{Mesh, Server, addresses};

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).tcp(80, 8080)
}

fn names(seen: &Attempts) -> BTreeSet<&str> {
    assert_eq!(seen.failed_total(), 0, "{seen:?}");
    seen.by_name.keys().map(String::as_str).collect()
}

/// A client on node 1 (zone z1), and a server on each of: node 1, node 2 (zone z1), node 3 (zone z2).
fn mesh() -> anyhow::Result<(Mesh, Vec<Server>)> {
    let mesh = Mesh::start(&["z1", "z1", "z2"])?;
    let servers = mesh.servers(&[(0, "here"), (1, "zone"), (2, "far")])?;
    Ok((mesh, servers))
}

/// Announces `service` with these servers, and returns who answers the client of node 1 when its kernel has `expected`.
fn who(mesh: &Mesh, service: &Service, servers: &[Server], expected: &[Server]) -> anyhow::Result<Attempts> {
    let client = mesh.nodes[0].pod("client")?;
    let service = service.clone().pods(servers.iter().map(|server| &*server.pod));
    mesh.cluster.manifests().put_service(&service)?;
    mesh.agents[0].wait_for_backends(&service.at(80), &addresses(expected))?;
    peer::connect(&client, &service.at(80)).count(60).run()
}

#[test]
fn internal_traffic_policy_local_stays_on_the_node_or_refuses() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, servers) = mesh()?;
    let service = Service { local_only: true, ..web() };
    assert_eq!(names(&who(&mesh, &service, &servers, &servers[..1])?), ["here"].into());
    let refused = who(&mesh, &service, &servers[1..], &[])?;
    assert_eq!(refused.failed.get("ECONNREFUSED"), Some(&60), "{refused:?}");
    Ok(())
}

#[test]
fn prefer_close_stays_in_the_zone_and_fails_over() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, servers) = mesh()?;
    let service = Service { distribution: Some("PreferClose".into()), ..web() };
    assert_eq!(names(&who(&mesh, &service, &servers, &servers[..2])?), ["here", "zone"].into());
    assert_eq!(names(&who(&mesh, &service, &servers[2..], &servers[2..])?), ["far"].into());
    Ok(())
}

#[test]
fn prefer_same_node_widens_step_by_step() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, servers) = mesh()?;
    let service = Service { distribution: Some("PreferSameNode".into()), ..web() };
    assert_eq!(names(&who(&mesh, &service, &servers, &servers[..1])?), ["here"].into());
    assert_eq!(names(&who(&mesh, &service, &servers[1..], &servers[1..2])?), ["zone"].into());
    assert_eq!(names(&who(&mesh, &service, &servers[2..], &servers[2..])?), ["far"].into());
    Ok(())
}

#[test]
fn each_node_sees_the_service_from_where_it_is() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, servers) = mesh()?;
    let service = Service { distribution: Some("PreferSameZone".into()), ..web() };
    let service = service.pods(servers.iter().map(|server| &*server.pod));
    mesh.cluster.manifests().put_service(&service)?;
    for (node, near) in [(0, &servers[..2]), (1, &servers[..2]), (2, &servers[2..])] {
        mesh.agents[node].wait_for_backends(&service.at(80), &addresses(near))?;
        let client = mesh.nodes[node].pod("client")?;
        let expected = near.iter().map(|server| server.pod.name.as_str()).collect();
        assert_eq!(names(&peer::connect(&client, &service.at(80)).count(60).run()?), expected);
    }
    Ok(())
}
