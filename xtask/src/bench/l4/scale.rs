//! What size costs: kernel time per connect, starting, following changes, memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_harness::process::map_bytes_of;
use mesh_harness::report::Change;
use mesh_harness::sys::{EmptyProgram, Hook};
use mesh_harness::{Agent, AgentOptions, Endpoint, agent, peer, sys};

use super::super::Args;
use super::super::report::{Report, Target, quantile};
use super::world::{Lane, TARGET, World, services_in_kernel};

/// The agent's program that runs at `sockops`; all others run where a socket is made, bound or connected.
const SOCKOPS: &str = "connection";
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Turns the kernel's statistics of programs on until it is dropped.
struct Statistics(String);

impl Statistics {
    fn on() -> Result<Self> {
        let before = fs::read_to_string(STATISTICS).context(STATISTICS)?;
        fs::write(STATISTICS, "1").context(STATISTICS)?;
        Ok(Self(before))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        // Nothing is left to do if the setting cannot be put back.
        drop(fs::write(STATISTICS, self.0.trim()));
    }
}

/// Name, nanoseconds and runs of each of the agent's programs.
fn program_times(agent: &Agent) -> Result<Vec<(String, f64, u64)>> {
    let status = agent.status()?;
    let programs = status["programs"].as_array().context("no programs in /status")?;
    let time = |program: &serde_json::Value| -> Result<_> {
        let id = program["id"]
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .context("a program without an id")?;
        let (nanoseconds, runs) = sys::program_time(id).with_context(|| format!("program {id}"))?;
        Ok((program["name"].as_str().unwrap_or("?").to_owned(), nanoseconds as f64, runs))
    };
    programs.iter().map(time).collect()
}

/// Time in all kernel programs for one connection from connect to close, client and server on this node.
pub(super) fn kernel_time(args: &Args, lane: &Lane, report: &mut Report) -> Result<()> {
    let agent = lane.agent.as_ref().context("this lane has no agent")?;
    let _statistics = Statistics::on()?;
    // Reading the clock twice is part of every run that the statistics time. Programs that do nothing show how much.
    let cgroup = File::open(agent.node().cgroup())?;
    let empty = [
        EmptyProgram::attach(&cgroup, Hook::Connect4).context("an empty connect4 program")?,
        EmptyProgram::attach(&cgroup, Hook::SockOps).context("an empty sockops program")?,
    ];
    let times = || -> Result<_> { Ok([empty[0].time()?, empty[1].time()?]) };
    let (mut clock, mut less) = (Vec::new(), Vec::new());
    let (mut totals, mut parts) = (Vec::new(), BTreeMap::<String, (Vec<f64>, Vec<f64>)>::new());
    for _ in 0..args.rounds {
        let (before, empty_before) = (program_times(agent)?, times()?);
        let mut client = peer::connect(&lane.client, &lane.to[0]).count(20_000).concurrency(2).blocking();
        for to in &lane.to[1..] {
            client = client.to(to);
        }
        let seen = client.run()?;
        ensure!(seen.failed.is_empty(), "connections failed: {:?}", seen.failures);
        let after = program_times(agent)?;
        let of_empty = |(was, is): ((u64, u64), (u64, u64))| (is.0 - was.0) as f64 / (is.1 - was.1) as f64;
        let [connect4, sockops] = times()?;
        let (connect4, sockops) =
            (of_empty((empty_before[0], connect4)), of_empty((empty_before[1], sockops)));
        let (mut total, mut statistics) = (0.0, 0.0);
        for ((name, was, ran), (_, is, runs)) in before.iter().zip(after) {
            let nothing = if name == SOCKOPS { sockops } else { connect4 };
            statistics += nothing * (runs - ran) as f64 / seen.answered as f64;
            let each = (is - was) / seen.answered as f64;
            total += each;
            let part = parts.entry(name.clone()).or_default();
            part.0.push(each);
            part.1.push((runs - ran) as f64 / seen.answered as f64);
        }
        totals.push(total);
        clock.push(statistics);
        less.push(total - statistics);
    }
    let what = format!("kernel time per connect, all programs, {} services", args.services);
    report.add(what, &totals, "ns", Target::AtMost(1000.0));
    report.add("kernel time per connect, cost of the statistics themselves", &clock, "ns", Target::None);
    report.add("kernel time per connect, less that", &less, "ns", Target::AtMost(1000.0));
    for (name, (samples, runs)) in parts.iter().filter(|(_, (samples, _))| quantile(samples, 0.5) >= 1.0) {
        report.add(format!("kernel time per connect, {name}"), samples, "ns", Target::None);
        report.add(format!("kernel time per connect, {name}: runs"), runs, "", Target::None);
    }
    Ok(())
}

/// From replacing a manifest, with another endpoint ready, to the first connect that reaches it.
pub(super) fn changes(world: &World, lane: &Lane, report: &mut Report) -> Result<()> {
    const CHANGES: usize = 300;
    let service = world.changing();
    let endpoints = service.endpoints.clone();
    let only = |ready: usize| {
        let of = |(i, endpoint): (usize, &Endpoint)| {
            if i == ready { endpoint.clone() } else { endpoint.clone().unready() }
        };
        service.clone().endpoints(endpoints.iter().enumerate().map(of))
    };
    world.cluster.manifests().put_service(&only(0))?;
    let to = service.at(80);
    let agent = lane.agent.as_ref().context("this lane has no agent")?;
    agent.wait_for_backends(&to, &[std::net::SocketAddr::new(endpoints[0].address, TARGET)])?;
    let mut watch = peer::watch(&lane.client, &to)?;
    let first: Change = watch.change()?;
    ensure!(first.name == endpoints[0].address.to_string(), "{} answers", first.name);
    let (mut milliseconds, cpu) = (Vec::new(), agent.usage()?.cpu_s);
    for change in 1..=CHANGES {
        let ready = change % endpoints.len();
        let next = only(ready);
        let began = sys::monotonic_nanoseconds();
        world.cluster.manifests().put_service(&next)?;
        let seen = watch.change()?;
        ensure!(seen.name == endpoints[ready].address.to_string(), "{} answers", seen.name);
        milliseconds.push(seen.at_ns.saturating_sub(began) as f64 / 1e6);
        std::thread::sleep(Duration::from_millis(20));
    }
    let spread = quantile(&milliseconds, 0.75) - quantile(&milliseconds, 0.25);
    let p99 = quantile(&milliseconds, 0.99);
    report.add("endpoint changed in the manifest → effective, median", &milliseconds, "ms", Target::None);
    report.add_value(
        "endpoint changed in the manifest → effective, p99",
        p99,
        spread,
        "ms",
        Target::AtMost(100.0),
    );
    let each = (agent.usage()?.cpu_s - cpu) * 1e3 / CHANGES as f64;
    report.add_value("endpoint changed: agent CPU each", each, 0.0, "ms", Target::None);
    world.cluster.manifests().put_service(&service)
}

/// What the agent occupies with all services.
pub(super) fn memory(lane: &Lane, report: &mut Report) -> Result<()> {
    let agent = lane.agent.as_ref().context("this lane has no agent")?;
    let megabytes = agent.usage()?.rss_bytes as f64 / 1e6;
    report.add("agent memory (RSS) at that size", &[megabytes], "MB", Target::AtMost(40.0));
    let maps = map_bytes_of(agent.pid())? as f64 / 1e6;
    report.add("kernel maps at the default sizes", &[maps], "MB", Target::None);
    Ok(())
}

/// From the start of an agent on a new node to every service in the kernel.
pub(super) fn starts(args: &Args, world: &World, report: &mut Report) -> Result<()> {
    let node = world.cluster.node("z1")?;
    let (mut seconds, mut cpu, mut peak) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds.min(5) {
        let began = Instant::now();
        let mut agent = node.agent_with(&AgentOptions { wait: false, ..AgentOptions::default() })?;
        while services_in_kernel(&agent).unwrap_or(0) < u64::from(world.services) {
            ensure!(
                began.elapsed() < Duration::from_secs(60),
                "the services do not arrive: {:?}",
                agent.status()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        seconds.push(began.elapsed().as_secs_f64());
        cpu.push(agent.usage()?.cpu_s);
        peak.push(sys_peak(agent.pid())?);
        agent.process().stop()?;
        drop(agent);
        // Nothing of this start may help the next.
        let output = agent::uninstall(&node)?;
        ensure!(output.status.success(), "uninstall: {}", String::from_utf8_lossy(&output.stderr));
        drop(fs::remove_dir_all(node.state_dir()));
    }
    let what = format!("agent start → {} services of 10 endpoints in the kernel", args.services);
    report.add(what, &seconds, "s", Target::AtMost(2.0));
    report.add("agent start: CPU", &cpu, "s", Target::None);
    report.add("agent start: peak memory", &peak, "MB", Target::None);
    Ok(())
}

/// The most that a process has ever occupied.
fn sys_peak(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024.0 / 1e6)
}
