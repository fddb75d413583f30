//! What connections that do nothing cost, and pods that do nothing.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_harness::{Cluster, peer, until};

use super::super::Args;
use super::super::report::{Report, Target};
use super::Kind;
use super::lane::{IDLE_PORT, Lane};

/// Bytes of each idle connection, at either side.
pub(super) fn idle_connections(args: &Args, lane: &Lane, report: &mut Report) -> Result<()> {
    let before = lane.memory()?;
    // In turn: this is about connections that are there, not about their coming all at once.
    let (holder, held) = peer::hold_in_turn(&lane.client, &lane.to(IDLE_PORT), args.idle)?;
    ensure!(held.alive == args.idle as u64, "of {} connections, these failed: {:?}", args.idle, held.dead);
    // What was needed to open them is given back.
    std::thread::sleep(Duration::from_secs(2));
    let after = lane.memory()?;
    let limit = if lane.kind.is_mesh() { Target::AtMost(3.0) } else { Target::None };
    for (side, (before, after)) in ["client", "server"].iter().zip(before.iter().zip(after)) {
        let each = after.saturating_sub(*before) as f64 / args.idle as f64 / 1024.0;
        report.add(format!("idle connection, {}, {side}'s side", lane.kind.name()), &[each], "KiB", limit);
    }
    holder.close()
}

/// An agent whose pods do nothing.
pub(super) fn idle_agent(args: &Args, report: &mut Report) -> Result<()> {
    let cluster = Cluster::start()?;
    let _control = cluster.control()?;
    let node = cluster.node("z1")?;
    let pods = (0..args.pods).map(|i| node.pod(&format!("idle-{i}"))).collect::<Result<Vec<_>>>()?;
    cluster.manifests().put_pods(pods.iter().map(|pod| &**pod))?;
    // A pod's network is found by its processes.
    let _running =
        pods.iter().map(|pod| peer::tcp_echo(pod, &pod.name, IDLE_PORT)).collect::<Result<Vec<_>>>()?;
    let agent = node.agent()?;
    let names: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
    agent.wait_for_workloads(&names)?;
    until("every pod is listened in", Duration::from_secs(20), || {
        for pod in &pods {
            let tunnels = pod.address(15008);
            pod.netns().run(|| Ok(std::net::TcpStream::connect(tunnels)?))?;
        }
        Ok(())
    })?;
    std::thread::sleep(Duration::from_secs(2));
    let megabytes = agent.usage()?.rss_bytes as f64 / 1e6;
    let what = format!("agent memory (RSS), {} pods, idle, {}", args.pods, Kind::Stream.name());
    report.add(what, &[megabytes], "MB", Target::AtMost(15.0));
    Ok(())
}
