//! Certificates of workloads: from the control plane's authority to the agent of the node that each is on, and to no other.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::{Agent, AgentOptions, needs, until};
use mesh_tests::Mesh;

/// State by identity.
fn states(agent: &Agent) -> anyhow::Result<BTreeMap<String, String>> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let certificates = agent.certificates()?;
    Ok(certificates.iter().map(|one| (text(&one["identity"]), text(&one["state"]))).collect())
}

fn of_account(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

#[test]
fn each_node_has_the_certificates_of_its_own_workloads() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let mut plans = Vec::new();
    for (node, account) in [(0, "front"), (1, "back"), (1, "both"), (0, "both")] {
        let mut plan = mesh.nodes[node].plan(&format!("{account}-{node}"));
        plan.service_account = account.to_owned();
        plans.push(plan);
    }
    mesh.cluster.manifests().put_pods(&plans)?;
    for (agent, node, theirs) in [(0, "node-1", ["front", "both"]), (1, "node-2", ["back", "both"])] {
        let mut wanted: BTreeMap<_, _> =
            theirs.into_iter().map(|account| (of_account(account), "ready".to_owned())).collect();
        wanted.insert(format!("spiffe://cluster.local/mesh.dev/node/{node}"), "ready".to_owned());
        until("exactly its own are there", Duration::from_secs(10), || {
            let have = states(&mesh.agents[agent])?;
            ensure!(have == wanted, "{have:?} instead of {wanted:?}");
            Ok(())
        })?;
    }
    // Gone with the last workload that has it.
    mesh.cluster.manifests().remove("pod-front-0")?;
    until("it is forgotten", Duration::from_secs(10), || {
        let have = states(&mesh.agents[0])?;
        ensure!(
            !have.contains_key(&of_account("front")) && have.contains_key(&of_account("both")),
            "{have:?}"
        );
        Ok(())
    })?;
    let table = mesh.agents[0].meshctl(&["node", "certificates"])?;
    ensure!(String::from_utf8_lossy(&table.stdout).contains(&of_account("both")), "{table:?}");
    Ok(())
}

#[test]
fn an_agent_with_a_wrong_token_is_told_and_gets_nothing() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let node = mesh.cluster.node("z2")?;
    let token = mesh.cluster.dir().join("wrong-token");
    std::fs::write(&token, "not-a-token-of-this-cluster")?;
    let options = AgentOptions { wait: false, token_file: Some(token), ..AgentOptions::default() };
    let agent = node.agent_with(&options)?;
    until("it says why", Duration::from_secs(10), || {
        let status = agent.status()?;
        ensure!(status["control_plane"]["connected"] == false && status["ready"] == false, "{status}");
        let error = status["control_plane"]["last_error"].as_str().unwrap_or_default();
        ensure!(error.contains("token"), "{status}");
        Ok(())
    })?;
    assert_eq!(agent.services()?.len(), 0);
    let metrics = mesh.control.metrics()?;
    let counted = metrics.lines().any(|line| line.starts_with("mesh_control_xds_streams_refused_total{"));
    assert!(counted, "{metrics}");
    Ok(())
}
