//! How connections spread over the backends of a service.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_harness::manifest::weighted_service;
use mesh_harness::{Algorithm, Service, needs, peer};
use mesh_tests::{Mesh, addresses, assert_within};

const THREE: [(usize, &str); 3] = [(0, "a"), (0, "b"), (1, "c")];

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).tcp(80, 8080)
}

#[test]
fn weighted_random_is_the_default_and_spreads_evenly() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z1"])?;
    let servers = mesh.servers(&THREE)?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    let seen = peer::connect(&client, &address).count(3000).concurrency(4).run()?;
    assert_eq!((seen.answered, seen.failed_total()), (3000, 0), "{seen:?}");
    for name in ["a", "b", "c"] {
        // Standard deviation of a share: 0.0086.
        assert_within(name, seen.share(name), 0.28..=0.39);
    }
    let kernel = mesh.agents[0].service(&address, "TCP")?.unwrap();
    assert_eq!(kernel["algorithm"], "weighted-random", "{kernel}");
    Ok(())
}

#[test]
fn weights_of_a_service_entry_are_honoured() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "light"), (0, "heavy")])?;
    let client = mesh.client(0, "client")?;
    let weights: Vec<_> =
        servers.iter().zip([1, 3]).map(|(server, w)| (server.pod.addresses()[0], w)).collect();
    let address = "10.96.0.2:80".parse()?;
    let entry = weighted_service("entry", [10, 96, 0, 2].into(), 80, 8080, &weights);
    mesh.cluster.manifests().put("entry", &[entry])?;
    mesh.agents[0].wait_for_backends(&address, &addresses(&servers))?;
    let seen = peer::connect(&client, &address).count(2000).concurrency(4).run()?;
    assert_eq!(seen.answered, 2000, "{seen:?}");
    assert_within("heavy", seen.share("heavy"), 0.70..=0.80);
    Ok(())
}

#[test]
fn round_robin_takes_turns() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z1"])?;
    let servers = mesh.servers(&THREE)?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web().balanced(Algorithm::RoundRobin), &servers)?;
    let seen = peer::connect(&client, &address).count(300).run()?;
    for name in ["a", "b", "c"] {
        assert_within(name, seen.of(name) as f64, 99.0..=101.0);
    }
    Ok(())
}

#[test]
fn least_connections_prefers_the_idle() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "busy"), (0, "idle")])?;
    let client = mesh.client(0, "client")?;
    let service = web().balanced(Algorithm::LeastConnections);
    let address = mesh.serve_all(&service, &servers[..1])?;
    let (holder, held) = peer::hold(&client, &address, 60)?;
    assert_eq!(held.by_name.get("busy"), Some(&60), "{held:?}");
    mesh.serve_all(&service, &servers)?;
    let (second, held) = peer::hold(&client, &address, 40)?;
    // Two choices at random: only when both fall on the busy one does it get the connection (1 in 4).
    let idle = held.by_name.get("idle").copied().unwrap_or(0);
    assert_within("connections of the idle one", idle as f64, 20.0..=40.0);
    let kernel = mesh.agents[0].service(&address, "TCP")?.unwrap();
    let open = |name: usize| {
        let ip = servers[name].pod.addresses()[0].to_string();
        let backends = kernel["backends"].as_array().unwrap();
        backends.iter().find(|backend| backend["address"] == ip.as_str()).unwrap()["open_connections"].clone()
    };
    assert_eq!((open(0), open(1)), ((100 - idle).into(), idle.into()), "{kernel}");
    second.close()?;
    holder.close()?;
    mesh_harness::until("no connection is counted open", Duration::from_secs(5), || {
        let kernel = mesh.agents[0].service(&address, "TCP")?.unwrap();
        let backends = kernel["backends"].as_array().unwrap();
        anyhow::ensure!(backends.iter().all(|backend| backend["open_connections"] == 0), "{kernel}");
        Ok(())
    })
}

#[test]
fn maglev_keeps_clients_in_place_when_a_backend_leaves() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b"), (0, "c"), (0, "d")])?;
    let names: Vec<String> = (0..12).map(|i| format!("client{i}")).collect();
    let clients = names.iter().map(|name| mesh.client(0, name)).collect::<Result<Vec<_>, _>>()?;
    let service = web().balanced(Algorithm::Maglev);
    let address = mesh.serve_all(&service, &servers)?;
    let ask_all = || -> anyhow::Result<Vec<String>> {
        clients
            .iter()
            .map(|client| {
                let seen = peer::connect(client, &address).count(5).run()?;
                assert_eq!((seen.by_name.len(), seen.answered), (1, 5), "a client has one backend: {seen:?}");
                Ok(seen.by_name.keys().next().unwrap().clone())
            })
            .collect()
    };
    let before = ask_all()?;
    assert!(before.iter().collect::<BTreeSet<_>>().len() >= 2, "all in one place: {before:?}");
    mesh.serve_all(&service, &servers[..3])?;
    let after = ask_all()?;
    let moved = before.iter().zip(&after).filter(|(was, is)| *was != "d" && was != is).count();
    assert!(moved <= 1, "{moved} clients of backends that stayed were moved: {before:?} {after:?}");
    assert!(!after.contains(&"d".to_owned()), "{after:?}");
    Ok(())
}

#[test]
fn client_affinity_holds_until_its_timeout_or_until_the_backend_goes() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b"), (0, "c"), (0, "d"), (0, "e"), (0, "f")])?;
    let client = mesh.client(0, "client")?;
    let service = Service { affinity_seconds: Some(1), ..web() };
    let address = mesh.serve_all(&service, &servers)?;
    let mut chosen = BTreeSet::new();
    for _ in 0..8 {
        let seen = peer::connect(&client, &address).count(20).run()?;
        assert_eq!((seen.answered, seen.by_name.len()), (20, 1), "{seen:?}");
        chosen.extend(seen.by_name.into_keys());
        std::thread::sleep(Duration::from_millis(1200));
    }
    // All eight alike by chance: once in 280,000.
    assert!(chosen.len() > 1, "the affinity never ended: {chosen:?}");

    let service = Service { affinity_seconds: Some(600), ..web() };
    mesh.serve_all(&service, &servers)?;
    let first = peer::connect(&client, &address).count(5).run()?.by_name.into_keys().next().unwrap();
    let rest: Vec<_> = servers.iter().filter(|server| server.pod.name != first).collect();
    let fewer = service.pods(rest.iter().map(|server| &*server.pod));
    let left: Vec<_> = rest.iter().map(|server| server.pod.address(8080)).collect();
    mesh.serve(&fewer, &left)?;
    let seen = peer::connect(&client, &address).count(20).run()?;
    assert_eq!((seen.failed_total(), seen.of(&first), seen.by_name.len()), (0, 0, 1), "{seen:?}");
    Ok(())
}
