//! A control plane that is away, slow, talks nonsense, or is given bad manifests.

use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_harness::{AgentOptions, Service, needs, peer, until};
use mesh_tests::{Mesh, addresses};

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).tcp(80, 8080)
}

#[test]
fn an_agent_that_starts_without_its_control_plane_serves_its_last_snapshot() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    mesh.agents[0].process().stop()?;
    mesh.control.process().kill()?;
    // Without pins either: all that is left is the disk.
    std::fs::remove_dir_all(mesh.nodes[0].pins())?;
    let gone = peer::connect(&client, &address).run()?;
    assert_eq!(gone.answered, 0, "{gone:?}");

    mesh.agents[0] = mesh.nodes[0].agent()?;
    let status = mesh.agents[0].status()?;
    assert_eq!(status["snapshot"]["source"], "disk", "{status}");
    assert_eq!(status["control_plane"]["connected"], false, "{status}");
    let seen = peer::connect(&client, &address).count(60).run()?;
    assert_eq!((seen.answered, seen.by_name.len()), (60, 2), "{seen:?}");

    // When it comes back, the agent finds it by itself, and follows.
    mesh.control = mesh.cluster.control()?;
    mesh.serve_all(&web(), &servers[..1])?;
    until("the agent is connected", Duration::from_secs(10), || {
        let status = mesh.agents[0].status()?;
        anyhow::ensure!(status["control_plane"]["connected"] == true, "{status}");
        anyhow::ensure!(status["snapshot"]["source"] == "control-plane", "{status}");
        Ok(())
    })
}

#[test]
fn a_fresh_agent_without_a_control_plane_is_not_ready_and_intercepts_nothing() -> anyhow::Result<()> {
    needs!(Mesh);
    let cluster = mesh_harness::Cluster::start()?;
    let node = cluster.node("z1")?;
    let agent = node.agent_with(&AgentOptions { wait: false, ..AgentOptions::default() })?;
    until("it answers", Duration::from_secs(10), || agent.status())?;
    let (server, client) = (node.pod("server")?, node.pod("client")?);
    let _echo = peer::tcp_echo(&server, "server", 8080)?;
    assert_eq!(peer::connect(&client, &server.address(8080)).count(5).run()?.of("server"), 5);
    assert_eq!(agent.status()?["ready"], false);
    let (ready, _) = agent.metrics_port("/healthz/ready")?;
    let (live, _) = agent.metrics_port("/healthz/live")?;
    assert_eq!((ready, live), (503, 200));
    Ok(())
}

#[test]
fn a_control_plane_behind_a_slow_line_is_waited_for() -> anyhow::Result<()> {
    needs!(Mesh);
    let cluster = mesh_harness::Cluster::start()?;
    let node = cluster.node("z1")?;
    let _control = cluster.control()?;
    let fabric = cluster.relay(15011, "127.0.0.1:15012", &["--delay-ms", "150"])?;
    let options = AgentOptions { control_plane: Some(node.fabric(15011)), ..AgentOptions::default() };
    let began = Instant::now();
    let agent = node.agent_with(&options)?;
    assert!(began.elapsed() > Duration::from_millis(300), "the line is slow: {:?}", began.elapsed());
    cluster.manifests().put_service(&web())?;
    agent.wait_for_backends(&web().at(80), &[])?;
    drop(fabric);
    Ok(())
}

#[test]
fn nonsense_from_the_control_plane_leaves_what_is_there() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    for how in ["--garbage", "--corrupt", "--hang"] {
        mesh.agents[0].process().stop()?;
        let relay = mesh.cluster.relay(15013, "127.0.0.1:15012", &[how])?;
        let options =
            AgentOptions { control_plane: Some(mesh.nodes[0].fabric(15013)), ..AgentOptions::default() };
        mesh.agents[0] = mesh.nodes[0].agent_with(&options)?;
        std::thread::sleep(Duration::from_millis(700));
        assert!(
            mesh.agents[0].process().ended()?.is_none(),
            "{how}: {}",
            mesh.agents[0].process().log_tail()
        );
        let have = mesh.agents[0].backends(&address, "TCP")?;
        assert_eq!(have, Some([servers[0].pod.address(8080).to_string()].into()), "{how}");
        let seen = peer::connect(&client, &address).count(20).run()?;
        assert_eq!(seen.of("a"), 20, "{how}: {seen:?}");
        drop(relay);
    }
    Ok(())
}

#[test]
fn a_bad_manifest_is_named_and_its_last_good_content_stays() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers[..1])?;
    let mut wrong = web().pods([&*servers[1].pod]).manifests();
    wrong[0]["spec"]["ports"][0]["port"] = 70000.into();
    mesh.cluster.manifests().put("service-web", &wrong)?;
    mesh.cluster.manifests().put_text("broken", "kind: [unclosed")?;
    let text = until("both are reported", Duration::from_secs(5), || {
        let status = mesh.control.meshctl_json(&["status"])?;
        let text = status.to_string();
        let both = text.contains("service-web.yaml") && text.contains("broken.yaml");
        anyhow::ensure!(both, "{text}");
        Ok(text)
    })?;
    assert!(text.contains("spec.ports[0].port"), "the field is named: {text}");
    let seen = peer::connect(&client, &address).count(20).run()?;
    assert_eq!(seen.of("a"), 20, "{seen:?}");

    // Other files still work, and so does this one once it is right.
    let other = Service::new("other", [10, 96, 0, 2]).tcp(80, 8080);
    mesh.serve_all(&other, &servers)?;
    mesh.serve_all(&web(), &servers[1..])?;
    let seen = peer::connect(&client, &address).count(20).run()?;
    assert_eq!(seen.of("b"), 20, "{seen:?}");
    mesh.cluster.manifests().remove("broken")?;
    until("nothing is reported any more", Duration::from_secs(5), || {
        let text = mesh.control.meshctl_json(&["status"])?.to_string();
        anyhow::ensure!(!text.contains("broken.yaml") && !text.contains("service-web.yaml"), "{text}");
        Ok(())
    })
}

#[test]
fn a_control_plane_that_restarts_changes_nothing() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    let generation = |mesh: &Mesh| -> anyhow::Result<_> {
        Ok(mesh.agents[0].service(&address, "TCP")?.unwrap()["generation"].clone())
    };
    let before = generation(&mesh)?;
    let running = peer::connect(&client, &address).concurrency(2).count(0).start()?;
    mesh.control.process().kill()?;
    mesh.control = mesh.cluster.control()?;
    // A change proves that the agent is back in touch.
    let served = mesh.serve(&Service::new("other", [10, 96, 0, 2]).tcp(80, 80), &[]);
    served.with_context(|| mesh.agents[0].process().log_tail())?;
    assert_eq!(generation(&mesh)?, before, "an unchanged service is not written again");
    let seen = running.finish()?;
    assert_eq!(seen.failed_total(), 0, "{seen:?}");
    assert_eq!(mesh.agents[0].backends(&address, "TCP")?.unwrap().len(), addresses(&servers).len());
    Ok(())
}
