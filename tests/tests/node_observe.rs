//! What can be seen: counters, metrics, status, `meshctl`; and what is said when a map is full.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_harness::{AgentOptions, Endpoint, Service, needs, peer, until};
use mesh_tests::Mesh;
use serde_json::Value;

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).tcp(80, 8080)
}

const WEB: &str = "default/web.default.svc.cluster.local";
const CLIENT: &str = "Kubernetes//Pod/default/client";

fn rows(stats: &Value) -> Vec<Value> {
    stats["connections"].as_array().cloned().unwrap_or_default()
}

#[test]
fn connections_are_counted_by_source_service_backend_and_outcome() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    let seen = peer::connect(&client, &address).count(100).run()?;
    let transfer = peer::transfer(&client, &address, 1_000_000, 1)?;
    assert!(transfer.exact);
    let stats = until("all are closed", Duration::from_secs(5), || {
        let stats = mesh.agents[0].stats()?;
        let closed: u64 =
            rows(&stats).iter().filter(|r| r["source"] == CLIENT).filter_map(|r| r["closed"].as_u64()).sum();
        anyhow::ensure!(closed == 101, "{stats}");
        Ok(stats)
    })?;
    for server in &servers {
        let backend = server.pod.address(8080).to_string();
        let name = &server.pod.name;
        let row =
            rows(&stats).into_iter().find(|r| r["source"] == CLIENT && r["backend"] == backend.as_str());
        let row = row.unwrap_or_else(|| panic!("no counter of {backend} in {stats}"));
        assert_eq!((&row["service"], &row["outcome"]), (&WEB.into(), &"connected".into()), "{row}");
        let expected = seen.of(name) + u64::from(transfer.name == *name);
        assert_eq!(row["connections"], expected, "{row}");
        assert_eq!(row["connect_seconds_count"], expected, "{row}");
        let seconds = row["connect_seconds_sum"].as_f64().unwrap();
        assert!(seconds > 0.0 && seconds < expected as f64, "{row}");
        // `who\n` is four bytes, once a connection; the transfer adds `echo\n` and its million.
        let moved = if transfer.name == *name { 1_000_005 } else { 0 };
        assert_eq!(row["bytes_sent"], seen.of(name) * 4 + moved, "{row}");
        assert!(row["bytes_received"].as_u64().unwrap() > seen.of(name) * 4 + moved, "{row}");
    }
    Ok(())
}

#[test]
fn refusals_and_misses_have_a_counted_reason() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve(&web(), &[])?;
    let reason = |name: &str| -> anyhow::Result<u64> {
        let stats = mesh.agents[0].stats()?;
        let all = stats["reasons"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().find(|row| row["reason"] == name).and_then(|row| row["count"].as_u64()).unwrap_or(0))
    };
    let (refused, passed) = (reason("no_backends")?, reason("not_service")?);
    peer::connect(&client, &address).count(11).run()?;
    peer::connect(&client, &servers[0].pod.address(8080)).count(13).run()?;
    assert_eq!(reason("no_backends")? - refused, 11);
    assert!(reason("not_service")? - passed >= 13);
    let stats = mesh.agents[0].stats()?;
    let row = rows(&stats).into_iter().find(|r| r["source"] == CLIENT && r["outcome"] == "refused");
    let row = row.unwrap_or_else(|| panic!("{stats}"));
    assert_eq!((&row["service"], &row["connections"]), (&WEB.into(), &11.into()), "{row}");
    Ok(())
}

#[test]
fn metrics_carry_istios_names_and_the_agents_own() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    peer::connect(&client, &address).count(25).run()?;
    let find = |name: &str| -> anyhow::Result<f64> {
        let metrics = mesh.agents[0].metrics()?;
        let of_client =
            |line: &&str| line.starts_with(name) && line.contains("client") && line.contains("web");
        let lines: Vec<_> = metrics.lines().filter(of_client).collect();
        anyhow::ensure!(!lines.is_empty(), "no {name} of the client in {metrics}");
        Ok(lines.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    };
    until("all connections are in the metrics", Duration::from_secs(5), || {
        let (opened, closed) =
            (find("istio_tcp_connections_opened_total")?, find("istio_tcp_connections_closed_total")?);
        anyhow::ensure!(opened == 25.0 && closed == 25.0, "{opened} opened, {closed} closed");
        Ok(())
    })?;
    // Istio counts from the server: what it received are the four bytes of each request.
    assert_eq!(find("istio_tcp_received_bytes_total")?, 100.0);
    assert!(find("istio_tcp_sent_bytes_total")? > 100.0);
    let metrics = mesh.agents[0].metrics()?;
    assert!(metrics.lines().any(|line| line.starts_with("mesh_agent_")), "{metrics}");
    for path in ["/healthz/live", "/healthz/ready"] {
        assert_eq!(mesh.agents[0].metrics_port(path)?.0, 200, "{path}");
    }
    assert_eq!(mesh.agents[0].metrics_port("/nothing")?.0, 404);
    let control = mesh.control.metrics()?;
    assert!(control.lines().any(|line| line.starts_with("mesh_control_")), "{control}");
    Ok(())
}

#[test]
fn status_names_programs_maps_and_the_control_plane() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let status = mesh.agents[0].status()?;
    assert_eq!((&status["node"], &status["ready"]), (&"node-1".into(), &true.into()), "{status}");
    assert_eq!(status["control_plane"]["connected"], true, "{status}");
    let programs = status["programs"].as_array().unwrap();
    assert_eq!(programs.len(), 10, "one for each hook: {status}");
    assert!(programs.iter().all(|program| program["id"].as_u64().is_some_and(|id| id > 0)), "{status}");
    let maps = status["maps"].as_array().unwrap();
    assert!(maps.iter().all(|map| map["capacity"].as_u64() >= map["entries"].as_u64()), "{status}");
    assert_eq!(
        (&status["write_failures"], status["refused"].as_array().map(Vec::len)),
        (&0.into(), Some(0)),
        "{status}"
    );
    Ok(())
}

#[test]
fn meshctl_shows_the_same_as_table_json_and_yaml() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    peer::connect(&client, &address).count(5).run()?;
    let backend = servers[0].pod.addresses()[0].to_string();
    let commands: [(&[&str], &str); 7] = [
        (&["get", "services"], "10.96.0.1"),
        (&["get", "endpoints"], &backend),
        (&["get", "workloads"], "client"),
        (&["status"], "node-1"),
        (&["node", "services"], &backend),
        (&["node", "workloads"], "client"),
        (&["node", "stats"], "web"),
    ];
    for (command, needle) in commands {
        for format in ["table", "json", "yaml"] {
            let output = mesh.agents[0].meshctl(&[command, &["-o", format]].concat())?;
            let (text, error) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{command:?} -o {format}: {error}");
            assert!(text.contains(needle), "{command:?} -o {format} has no {needle}:\n{text}");
            assert_eq!(
                format == "json",
                serde_json::from_str::<Value>(&text).is_ok(),
                "{command:?} -o {format}:\n{text}"
            );
        }
    }
    let none = mesh.agents[0].meshctl(&["get", "services", "-n", "elsewhere", "-o", "json"])?;
    assert!(
        none.status.success() && !String::from_utf8_lossy(&none.stdout).contains("10.96.0.1"),
        "{none:?}"
    );
    Ok(())
}

#[test]
fn meshctl_fails_with_one_clear_sentence() -> anyhow::Result<()> {
    needs!(Mesh);
    let cluster = mesh_harness::Cluster::start()?;
    let node = cluster.node("z1")?;
    let agent = node.agent_with(&AgentOptions { wait: false, ..AgentOptions::default() })?;
    // There is no control plane.
    let output = agent.meshctl(&["status"])?;
    assert!(!output.status.success(), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.trim().lines().count() == 1 && error.contains("15016"), "{error}");
    Ok(())
}

#[test]
fn meshctl_status_knows_the_lag_of_every_agent() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut mesh = Mesh::start(&["z1", "z2"])?;
    let status = until("both are synced", Duration::from_secs(5), || {
        let status = mesh.control.meshctl_json(&["status"])?;
        let agents = status["agents"].as_array().cloned().unwrap_or_default();
        anyhow::ensure!(agents.len() == 2 && agents.iter().all(|agent| agent["synced"] == true), "{status}");
        Ok(status)
    })?;
    let names: Vec<_> =
        status["agents"].as_array().unwrap().iter().map(|agent| agent["node"].clone()).collect();
    assert!(names.contains(&"node-1".into()) && names.contains(&"node-2".into()), "{status}");
    mesh.agents[1].process().stop()?;
    until("one is left", Duration::from_secs(5), || {
        let status = mesh.control.meshctl_json(&["status"])?;
        anyhow::ensure!(status["agents"].as_array().map(Vec::len) == Some(1), "{status}");
        Ok(())
    })
}

#[test]
fn a_full_map_is_reported_and_corrupts_nothing() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start_with(&["z1"], &AgentOptions::with(&["--max-backends", "16"]))?;
    let servers = mesh.servers(&[(0, "a"), (0, "b")])?;
    let client = mesh.client(0, "client")?;
    let address = mesh.serve_all(&web(), &servers)?;
    let many = (1..=100_u8).map(|i| Endpoint::at(Ipv4Addr::new(10, 250, 0, i)));
    let big = Service::new("big", [10, 96, 0, 2]).tcp(80, 8080).endpoints(many);
    mesh.cluster.manifests().put_service(&big)?;
    let status = until("the refusal is reported", Duration::from_secs(10), || {
        let status = mesh.agents[0].status()?;
        anyhow::ensure!(status["refused"].as_array().is_some_and(|refused| !refused.is_empty()), "{status}");
        Ok(status)
    })?;
    assert!(status["refused"][0]["service"].as_str().unwrap().contains("big"), "{status}");
    let metrics = mesh.agents[0].metrics()?;
    assert!(
        metrics.lines().any(|line| line.starts_with("mesh_agent_") && line.contains("refused")),
        "{metrics}"
    );
    // What was there is untouched, still changes, and small services still fit.
    let seen = peer::connect(&client, &address).count(60).run()?;
    assert_eq!((seen.failed_total(), seen.by_name.len()), (0, 2), "{seen:?}");
    mesh.serve_all(&web(), &servers[..1])?;
    mesh.serve_all(&Service::new("small", [10, 96, 0, 3]).tcp(80, 8080), &servers)?;
    // Half a service is never in the kernel.
    let backends = mesh.agents[0].backends(&SocketAddr::from(([10, 96, 0, 2], 80)), "TCP")?;
    assert!(backends.is_none_or(|backends| backends.is_empty()), "half a service");
    // Once it fits, it is written.
    let fits = big.endpoints((1..=5_u8).map(|i| Endpoint::at(Ipv4Addr::new(10, 250, 0, i))));
    let five: Vec<_> = (1..=5_u8).map(|i| SocketAddr::from(([10, 250, 0, i], 8080))).collect();
    mesh.serve(&fits, &five)?;
    let status = mesh.agents[0].status()?;
    assert_eq!(status["refused"].as_array().map(Vec::len), Some(0), "{status}");
    Ok(())
}

#[test]
fn check_says_what_is_there_and_what_is_missing() -> anyhow::Result<()> {
    needs!(Mesh);
    let cluster = mesh_harness::Cluster::start()?;
    let node = cluster.node("z1")?;
    let mut command = std::process::Command::new(mesh_harness::binaries::find("mesh-agent")?);
    let output = command.arg("check").arg("--cgroup-root").arg(node.cgroup()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for word in ["kernel", "BTF", "cgroup"] {
        assert!(text.to_lowercase().contains(&word.to_lowercase()), "{word}: {text}");
    }
    let mut command = std::process::Command::new(mesh_harness::binaries::find("mesh-agent")?);
    let output = command.args(["check", "--cgroup-root", "/proc/self"]).output()?;
    assert!(!output.status.success(), "{output:?}");
    Ok(())
}
