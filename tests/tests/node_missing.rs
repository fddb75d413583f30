//! Policies that are not there: an agent that knows workloads, but not, or not wholly, who may connect to them.

use std::time::Duration;

use anyhow::ensure;
use mesh_harness::manifest::authorization_policy;
use mesh_harness::{Agent, AgentOptions, ControlOptions, Pod, needs, peer, until};
use mesh_tests::saved::Saved;
use mesh_tests::{Mesh, becomes};
use serde_json::json;

/// It refuses nobody whom there is.
const POLICY: &str = "default/deny-nobody";

/// Connects five times, which all are answered by `outcome` or fail so, and are all counted under `reason`.
fn five(agent: &Agent, pod: &Pod, to: &Pod, outcome: &str, reason: &str) -> anyhow::Result<()> {
    let before = agent.reason(reason)?;
    let seen = peer::connect(pod, &to.address(8080)).count(5).run()?;
    let so = seen.of(outcome) + seen.failed.get(outcome).unwrap_or(&0);
    ensure!(so == 5, "{} to {}: {outcome} was expected: {seen:?}", pod.name, to.name);
    let counted = agent.reason(reason)? - before;
    ensure!(
        counted == 5,
        "{} to {}: {counted} of 5 counted as {reason}: {}",
        pod.name,
        to.name,
        agent.stats()?
    );
    Ok(())
}

/// Waits until the last denials are by that policy.
fn told(agent: &Agent, policy: &str) -> anyhow::Result<()> {
    until(&format!("{policy} is told of"), Duration::from_secs(5), || {
        let denials = agent.denials()?;
        let last = denials["last"].as_array().map_or(&[][..], Vec::as_slice);
        let by = |side: &str| last.iter().find(|denial| denial["side"] == side).map(|one| &one["policy"]);
        let all = ["client", "server"].map(by);
        ensure!(all.iter().all(|by| by.is_some_and(|by| by == policy)), "{denials}");
        Ok(())
    })
}

#[test]
fn what_policies_are_missing_and_cannot_be_asked_for_refuses() -> anyhow::Result<()> {
    needs!(Mesh);
    // Certificates come from the control plane itself, the rest over a line that is not there.
    let control = ControlOptions {
        arguments: ["--tls-name", "172.16.1.1"].map(str::to_owned).into(),
        ..ControlOptions::default()
    };
    let mut mesh = Mesh::start_under(&["z1", "z2"], &AgentOptions::default(), &control)?;
    let cut_off = AgentOptions {
        control_plane: Some(mesh.nodes[0].fabric(15011)),
        wait: false,
        ..AgentOptions::with(&["--ca-address", &mesh.nodes[0].fabric(15012)])
    };
    let servers = mesh.servers(&[(0, "near"), (0, "free"), (1, "far")])?;
    let client = mesh.client(0, "client")?;
    let stranger = mesh.nodes[1].pod("stranger")?;
    let probe = mesh.nodes[0].host_workload("kubelet", "system.slice/kubelet.service")?;
    mesh.agents[0].wait_for_proxies(&["near", "free", "client"])?;
    mesh.agents[1].wait_for_proxies(&["far"])?;
    let rule = json!({"from": [{"source": {"principals": ["cluster.local/ns/default/sa/nobody"]}}]});
    let policy = authorization_policy("default", "deny-nobody", Some("near"), "DENY", &[rule]);
    mesh.cluster.manifests().put("policy", &[policy])?;
    until("the policy has come", Duration::from_secs(10), || {
        let before = mesh.agents[0].reason("inbound_admitted")?;
        let seen = peer::connect(&client, &servers[0].pod.address(8080)).run()?;
        ensure!(mesh.agents[0].reason("inbound_admitted")? > before, "{seen:?}");
        Ok(())
    })?;

    type Change = fn(Saved) -> anyhow::Result<()>;
    const REFUSING: &str = "mesh_agent_policy_refusing_workloads";
    // None has come; one that a workload names has not; one cannot be understood. By what is refused, and what counts that.
    let cases: [(Change, &str, [&str; 2]); 3] = [
        (|saved| saved.without_policies(false), "not-arrived", [REFUSING, "policies-not-arrived"]),
        (|saved| saved.without_policies(true), POLICY, [REFUSING, "policy-missing"]),
        (Saved::with_a_strange_action, POLICY, ["mesh_agent_policies", "not-understood"]),
    ];
    for (change, by, [metric, label]) in cases {
        mesh.agents[0].process().stop()?;
        // All that it has of the mesh is the disk.
        std::fs::remove_dir_all(mesh.nodes[0].pins())?;
        change(Saved::open(&mesh.nodes[0].state_dir())?)?;
        mesh.agents[0] = mesh.nodes[0].agent_with(&cut_off)?;
        mesh.agents[0].wait_for_proxies(&["near", "free", "client"])?;
        let agent = &mesh.agents[0];
        let [near, free, far] = [0, 1, 2].map(|i| &servers[i].pod);
        becomes(&stranger, &servers[0], "ECONNREFUSED")?;
        five(agent, &client, near, "ECONNREFUSED", "denied")?;
        five(agent, &stranger, near, "ECONNREFUSED", "inbound_denied")?;
        five(agent, &probe, near, "near", "inbound_admitted")?;
        told(agent, by)?;
        ensure!(agent.metric(metric, label)? > 0.0, "{label} is not counted: {}", agent.metrics()?);
        // Whom it is not for is as always, unless it could be for anybody.
        if by == POLICY {
            five(agent, &client, far, "far", "proxied")?;
            becomes(&client, &servers[1], "free")?;
            becomes(&stranger, &servers[1], "free")?;
        } else {
            five(agent, &client, far, "ECONNREFUSED", "denied")?;
            five(agent, &client, free, "ECONNREFUSED", "denied")?;
            five(agent, &stranger, free, "ECONNREFUSED", "inbound_denied")?;
        }
        // The control plane knows it.
        let _line = mesh.cluster.relay(15011, "127.0.0.1:15012", &[])?;
        for server in &servers {
            becomes(&client, server, &server.pod.name)?;
        }
        becomes(&stranger, &servers[0], "near")?;
        mesh.wait_until_carried(0, &client, &servers[2].pod.address(8080))?;
        ensure!(mesh.agents[0].metric(metric, label)? == 0.0, "{label} is still counted");
    }
    Ok(())
}
