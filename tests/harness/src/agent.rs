//! An agent on a node, and what it says about itself.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::process::{Process, Surroundings};
use crate::{Node, binaries, control, http, wait};

/// How long an agent may take to become ready or to follow a change before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// How an agent is started.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Another control plane than the cluster's.
    pub control_plane: Option<String>,
    /// Another token than the cluster's.
    pub token_file: Option<PathBuf>,
    /// Further arguments, such as `--max-backends 64`.
    pub arguments: Vec<String>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// Return only when it is ready.
    pub wait: bool,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            control_plane: None,
            token_file: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            wait: true,
        }
    }
}

impl AgentOptions {
    /// With further arguments.
    pub fn with(arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(|&argument| argument.into()).collect(), ..Self::default() }
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    node: Rc<Node>,
    process: Process,
}

impl Agent {
    pub(crate) fn start(node: &Rc<Node>, options: &AgentOptions) -> anyhow::Result<Self> {
        let cgroup = node.cgroup().join("system.slice/mesh-agent.service");
        fs::create_dir_all(&cgroup)?;
        let control_plane = options.control_plane.clone().unwrap_or_else(|| node.fabric(15012));
        let mut command = command(node, "run")?;
        command.args(["--control-plane", &control_plane, "--metrics-address", "0.0.0.0:15020"]);
        command
            .args(["--control-plane-name", "mesh-control", "--control-plane-root"])
            .arg(node.site().roots());
        let token = options.token_file.clone().unwrap_or_else(|| node.site().dir().join("token"));
        command.arg("--token-file").arg(token);
        command.args(["--zone", node.zone(), "--region", "r1"]).args(&options.arguments);
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        let log = log_of(node);
        let persistent = node.site().kept();
        let at = Surroundings { netns: node.netns(), cgroup: &cgroup, log: &log, persistent };
        let process = Process::start("mesh-agent", command, at, false)?;
        let mut agent = Self { node: Rc::clone(node), process };
        if options.wait {
            agent.wait_until_ready()?;
        }
        Ok(agent)
    }

    /// Waits until it says that it is ready.
    pub fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let (node, process) = (Rc::clone(&self.node), &mut self.process);
        wait::until("the agent is ready", PATIENCE, || {
            if let Some(status) = process.ended()? {
                panic!("mesh-agent ended with {status}: {}", process.log_tail());
            }
            let status = admin(&node, "/status")?;
            ensure!(status["ready"] == true, "not ready: {status}");
            Ok(())
        })
    }

    /// Its node.
    pub fn node(&self) -> &Rc<Node> {
        &self.node
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The process, to look at.
    pub fn usage(&self) -> anyhow::Result<crate::process::Usage> {
        self.process.usage()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// `/status` of the admin socket.
    pub fn status(&self) -> anyhow::Result<Value> {
        admin(&self.node, "/status")
    }

    /// `/services`: what the kernel maps hold.
    pub fn services(&self) -> anyhow::Result<Vec<Value>> {
        list(admin(&self.node, "/services")?)
    }

    /// `/workloads`: who is enrolled.
    pub fn workloads(&self) -> anyhow::Result<Vec<Value>> {
        list(admin(&self.node, "/workloads")?)
    }

    /// `/certificates`: of the node and its workloads.
    pub fn certificates(&self) -> anyhow::Result<Vec<Value>> {
        list(admin(&self.node, "/certificates")?)
    }

    /// `/stats`: the counters of the kernel.
    pub fn stats(&self) -> anyhow::Result<Value> {
        admin(&self.node, "/stats")
    }

    /// The status and text at a path of the metrics port.
    pub fn metrics_port(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let address = SocketAddr::from(([127, 0, 0, 1], 15020));
        self.node.netns().run(|| http::get_tcp(address, path))
    }

    /// Its Prometheus metrics.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let (status, body) = self.metrics_port("/metrics")?;
        ensure!(status == 200, "/metrics answers {status}");
        Ok(body)
    }

    /// The sum of a metric's rows that have the label value `label`, or of all.
    pub fn metric(&self, name: &str, label: &str) -> anyhow::Result<f64> {
        let metrics = self.metrics()?;
        let rows = metrics
            .lines()
            .filter(|row| row.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        let rows = rows.filter(|row| label.is_empty() || row.contains(&format!("\"{label}\"")));
        let values = rows.filter_map(|row| row.rsplit_once(' ')?.1.parse::<f64>().ok());
        Ok(values.sum())
    }

    /// Descriptors that it has open.
    pub fn descriptors(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// How many of each kind those are.
    pub fn descriptor_kinds(&self) -> anyhow::Result<std::collections::BTreeMap<String, usize>> {
        let mut kinds = std::collections::BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.pid()))?.flatten() {
            // Closed meanwhile.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let kind = target.to_string_lossy().split(":[").next().unwrap_or_default().to_owned();
            *kinds.entry(kind).or_default() += 1;
        }
        Ok(kinds)
    }

    /// The backends (`ADDRESS:PORT`) that the kernel has for a service address, or `None` if it has no such service.
    pub fn backends(&self, service: &SocketAddr, protocol: &str) -> anyhow::Result<Option<BTreeSet<String>>> {
        Ok(self.service(service, protocol)?.map(|service| backends_of(&service)))
    }

    /// The service at an address, as the kernel has it.
    pub fn service(&self, address: &SocketAddr, protocol: &str) -> anyhow::Result<Option<Value>> {
        let ip = address.ip().to_string();
        let is_it = |service: &Value| {
            service["address"] == ip.as_str()
                && service["port"] == address.port()
                && service["protocol"] == protocol
        };
        Ok(self.services()?.into_iter().find(is_it))
    }

    /// Waits until the kernel has exactly these TCP backends for a service.
    pub fn wait_for_backends(&self, service: &SocketAddr, backends: &[SocketAddr]) -> anyhow::Result<()> {
        self.wait_for(service, "TCP", backends)
    }

    /// Waits until the kernel has exactly these UDP backends for a service.
    pub fn wait_for_udp_backends(&self, service: &SocketAddr, backends: &[SocketAddr]) -> anyhow::Result<()> {
        self.wait_for(service, "UDP", backends)
    }

    fn wait_for(&self, service: &SocketAddr, protocol: &str, backends: &[SocketAddr]) -> anyhow::Result<()> {
        let want: BTreeSet<String> = backends.iter().map(SocketAddr::to_string).collect();
        wait::until(&format!("{service} has {} backends", want.len()), PATIENCE, || {
            match self.backends(service, protocol)? {
                Some(have) if have == want => Ok(()),
                Some(have) => bail!("it has {have:?}"),
                None => bail!("no such service"),
            }
        })
    }

    /// Waits until the kernel has no service at this address.
    pub fn wait_until_gone(&self, service: &SocketAddr) -> anyhow::Result<()> {
        wait::until(&format!("{service} is gone"), PATIENCE, || {
            ensure!(self.backends(service, "TCP")?.is_none(), "it is still there");
            Ok(())
        })
    }

    /// Waits until this many workloads of the node are enrolled.
    pub fn wait_for_workloads(&self, names: &[&str]) -> anyhow::Result<()> {
        wait::until(&format!("{names:?} are enrolled"), PATIENCE, || {
            let workloads = self.workloads()?;
            let enrolled = |name: &str| {
                let it = workloads.iter().find(|workload| workload["name"] == name);
                it.and_then(|workload| workload["cgroups"].as_array())
                    .is_some_and(|cgroups| !cgroups.is_empty())
            };
            let missing: Vec<_> = names.iter().filter(|name| !enrolled(name)).collect();
            ensure!(missing.is_empty(), "{missing:?} are not, of {workloads:?}");
            Ok(())
        })
    }

    /// Waits until connections of these workloads can be carried under mutual TLS, and tunnels for them are taken.
    pub fn wait_for_proxies(&self, names: &[&str]) -> anyhow::Result<()> {
        wait::until(&format!("{names:?} have their proxy"), PATIENCE, || {
            let workloads = self.workloads()?;
            let ready = |name: &str| {
                let it = workloads.iter().find(|workload| workload["name"] == name);
                it.is_some_and(|workload| workload["proxy"] == "ready")
            };
            let missing: Vec<_> = names.iter().filter(|name| !ready(name)).collect();
            ensure!(missing.is_empty(), "{missing:?} have not, of {workloads:?}");
            Ok(())
        })
    }

    /// How often the kernel programs took a way, by its name in `/stats`.
    pub fn reason(&self, name: &str) -> anyhow::Result<u64> {
        let stats = self.stats()?;
        let mut all = stats["reasons"].as_array().into_iter().flatten();
        Ok(all.find(|row| row["reason"] == name).and_then(|row| row["count"].as_u64()).unwrap_or(0))
    }

    /// `/denials`: what policy refused.
    pub fn denials(&self) -> anyhow::Result<Value> {
        admin(&self.node, "/denials")
    }

    /// Runs `meshctl` against its admin socket.
    pub fn meshctl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        control::meshctl(self.node.site(), Some(&self.node.admin_socket()), arguments)
    }

    /// `meshctl … -o json`, parsed.
    pub fn meshctl_json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        control::json(&self.meshctl(&[arguments, &["-o", "json"]].concat())?)
    }
}

/// The backends of one entry of `/services`.
pub fn backends_of(service: &Value) -> BTreeSet<String> {
    let of = |backend: &Value| {
        let ip: Option<std::net::IpAddr> = backend["address"].as_str()?.parse().ok();
        Some(SocketAddr::new(ip?, u16::try_from(backend["port"].as_u64()?).ok()?).to_string())
    };
    service["backends"].as_array().into_iter().flatten().filter_map(of).collect()
}

/// `mesh-agent VERB` with the paths of `node`, ready to run.
pub fn command(node: &Node, verb: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(binaries::find("mesh-agent")?);
    command.arg(verb).arg("--pin-path").arg(node.pins()).arg("--state-dir").arg(node.state_dir());
    if verb == "run" {
        command.args(["--node-name", node.name()]);
        command.arg("--cgroup-root").arg(node.cgroup()).arg("--admin-socket").arg(node.admin_socket());
    }
    Ok(command)
}

/// `mesh-agent uninstall` on a node.
pub fn uninstall(node: &Node) -> anyhow::Result<Output> {
    let mut command = command(node, "uninstall")?;
    node.netns().start_in(&mut command, None, false)?;
    Ok(command.output()?)
}

/// Where the agents of a node log.
pub fn log_of(node: &Node) -> PathBuf {
    node.site().dir().join(format!("{}.mesh-agent.log", node.name()))
}

fn admin(node: &Node, path: &str) -> anyhow::Result<Value> {
    let socket: &Path = &node.admin_socket();
    let (status, body) = http::get_unix(socket, path)?;
    ensure!(status == 200, "{path} answers {status}: {body}");
    serde_json::from_str(&body).with_context(|| format!("{path}: {body}"))
}

fn list(value: Value) -> anyhow::Result<Vec<Value>> {
    match value {
        Value::Array(list) => Ok(list),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_)) => {
            bail!("not a list: {other}")
        }
    }
}
