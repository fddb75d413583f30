//! An agent that is killed: what it has acknowledged, the next one enforces, also where nobody can be asked.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_harness::manifest::authorization_policy;
use mesh_harness::process::Process;
use mesh_harness::{AgentOptions, ControlOptions, Pod, needs, peer, until};
use mesh_tests::{Mesh, Server, becomes};
use serde_json::{Value, json};

/// The snapshot is saved in this time after a change.
const SAVED: Duration = Duration::from_secs(2);

/// A server on node 1, whose agent is to be killed; a client beside it, and two on node 2.
struct Scene {
    server: Server,
    near: Pod,
    far: Pod,
    good: Pod,
    /// Between the agent of node 1 and the control plane; it gets its certificates past it.
    line: Option<Process>,
    mesh: Mesh,
}

impl Scene {
    fn start() -> anyhow::Result<Self> {
        let control = ControlOptions {
            arguments: ["--tls-name", "172.16.1.1"].map(str::to_owned).into(),
            ..ControlOptions::default()
        };
        let mut mesh = Mesh::start_under(&["z1", "z2"], &AgentOptions::default(), &control)?;
        let line = mesh.cluster.relay(15011, "127.0.0.1:15012", &[])?;
        let other = mesh.cluster.relay(15013, "127.0.0.1:15012", &[])?;
        for (node, port) in [(0, 15011), (1, 15013)] {
            mesh.agents[node].process().stop()?;
            mesh.agents[node] = mesh.nodes[node].agent_with(&options(&mesh, node, port))?;
        }
        let pod = |node: usize, name: &str| -> anyhow::Result<Pod> {
            let pod = mesh.account(node, name)?;
            mesh.agents[node].wait_for_proxies(&[name])?;
            Ok(pod)
        };
        let (target, near, far, good) = (pod(0, "server")?, pod(0, "near")?, pod(1, "far")?, pod(1, "good")?);
        let server = Server { process: peer::tcp_echo(&target, "server", 8080)?, pod: target };
        for pod in [&far, &good] {
            mesh.wait_until_carried(1, pod, &server.pod.address(8080))?;
        }
        // The other node hears no more: it is the server's that refuses, by the certificate in the tunnel.
        drop(other);
        let scene = Self { server, near, far, good, line: Some(line), mesh };
        scene.let_in_again()?;
        Ok(scene)
    }

    fn let_in_again(&self) -> anyhow::Result<()> {
        [&self.near, &self.far, &self.good]
            .into_iter()
            .try_for_each(|pod| becomes(pod, &self.server, "server"))
    }

    /// Makes a change that forbids, kills the agent as soon as the control plane knows that it has been taken, and looks who comes in
    /// with the next agent, which cannot ask.
    fn killed_after(
        &mut self,
        what: &str,
        change: impl FnOnce(&Mesh) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let blocked = self.no_snapshot()?;
        let before = self.acknowledged()?;
        change(&self.mesh)?;
        until(&format!("{what} is acknowledged"), Duration::from_secs(10), || {
            let now = self.acknowledged()?;
            ensure!(now > before, "{now} acknowledgements, and there were {before} before");
            Ok(())
        })?;
        self.mesh.agents[0].process().kill()?;
        self.line = None;
        fs::remove_dir(blocked)?;
        let mut options = options(&self.mesh, 0, 15011);
        options.wait = false;
        self.mesh.agents[0] = self.mesh.nodes[0].agent_with(&options)?;
        let far = peer::connect(&self.far, &self.server.pod.address(8080)).count(0).start()?;
        let near = peer::connect(&self.near, &self.server.pod.address(8080)).count(0).start()?;
        // Not since the agent lets in nobody.
        self.mesh.agents[0].wait_until_ready()?;
        becomes(&self.good, &self.server, "server")?;
        std::thread::sleep(Duration::from_secs(1));
        for (from, running) in [("far", far), ("near", near)] {
            let seen = running.finish()?;
            ensure!(seen.answered == 0 && seen.failed_total() > 0, "{what}: {from} comes in: {seen:?}");
        }
        let status = self.mesh.agents[0].status()?;
        ensure!(status["control_plane"]["connected"] == false, "{what}: {status}");
        self.line = Some(self.mesh.cluster.relay(15011, "127.0.0.1:15012", &[])?);
        until("the agent hears again", Duration::from_secs(20), || self.acknowledged().map(drop))
    }

    /// What was before is in the snapshot. From here on it cannot be saved, so it is as if the agent were killed before the next save.
    fn no_snapshot(&self) -> anyhow::Result<PathBuf> {
        std::thread::sleep(SAVED);
        let in_the_way = self.mesh.nodes[0].state_dir().join(".snapshot.new");
        until("nothing is in the way", Duration::from_secs(5), || Ok(fs::create_dir(&in_the_way)?))?;
        Ok(in_the_way)
    }

    /// How much has been acknowledged, by no other agent, where that is all that was sent.
    fn acknowledged(&self) -> anyhow::Result<f64> {
        let status = self.mesh.control.meshctl_json(&["status"])?;
        let agents = status["agents"].as_array().context("no agents")?;
        ensure!(agents.len() == 1 && agents[0]["synced"] == true, "{status}");
        let metrics = self.mesh.control.metrics()?;
        let row =
            metrics.lines().find_map(|row| row.strip_prefix("mesh_control_xds_acknowledgements_total "));
        Ok(row.context("it is not counted")?.parse()?)
    }
}

fn options(mesh: &Mesh, node: usize, port: u16) -> AgentOptions {
    AgentOptions {
        control_plane: Some(mesh.nodes[node].fabric(port)),
        ..AgentOptions::with(&["--ca-address", &mesh.nodes[0].fabric(15012)])
    }
}

/// Denies all but `good` to workloads labelled so, or to all.
fn deny(app: Option<&str>) -> Value {
    let principals = ["near", "far"].map(|name| format!("cluster.local/ns/default/sa/{name}"));
    let rule = json!({"from": [{"source": {"principals": principals}}]});
    authorization_policy("default", "deny", app, "DENY", &[rule])
}

#[test]
fn what_was_acknowledged_is_enforced_after_a_kill_without_the_control_plane() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    let policy = |mesh: &Mesh, app| mesh.cluster.manifests().put("policy", &[deny(app)]);
    scene.killed_after("a policy for all", |mesh| policy(mesh, None))?;
    scene.mesh.cluster.manifests().remove("policy")?;
    scene.let_in_again()?;
    scene.killed_after("a policy for some", |mesh| policy(mesh, Some("server")))?;

    // The policy is there before, and a workload comes to be one whom it is for.
    policy(&scene.mesh, Some("guarded"))?;
    scene.let_in_again()?;
    let mut labelled = scene.server.pod.manifest();
    labelled["metadata"]["labels"]["app"] = json!("guarded");
    scene.killed_after("a label", |mesh| mesh.cluster.manifests().put("pod-server", &[labelled]))?;

    // What is permitted again is so for good, too.
    scene.mesh.cluster.manifests().remove("policy")?;
    scene.let_in_again()
}
