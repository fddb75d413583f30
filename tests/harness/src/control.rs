//! A control plane in the fabric, and `meshctl` to ask it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::process::{Process, Surroundings};
use crate::site::Site;
use crate::{binaries, http, wait};

/// How a control plane is started.
#[derive(Debug, Clone)]
pub struct ControlOptions {
    /// Where agents find it; its port stays the same over restarts.
    pub xds_port: u16,
    /// Further arguments.
    pub arguments: Vec<String>,
}

impl Default for ControlOptions {
    fn default() -> Self {
        Self { xds_port: 15010, arguments: Vec::new() }
    }
}

/// A running control plane.
#[derive(Debug)]
pub struct Control {
    site: Rc<Site>,
    process: Process,
}

impl Control {
    pub(crate) fn start(site: Rc<Site>, options: &ControlOptions) -> anyhow::Result<Self> {
        let mut command = Command::new(binaries::find("mesh-control")?);
        command.arg("run").arg("--manifests").arg(site.dir().join("manifests"));
        command.arg("--state-dir").arg(site.dir().join("control"));
        command.arg("--xds-address").arg(format!("0.0.0.0:{}", options.xds_port));
        command.args(["--management-address", "127.0.0.1:15016", "--metrics-address", "127.0.0.1:15014"]);
        command.args(&options.arguments);
        // The next control plane gets the same one, so it goes with the site.
        let cgroup = site.cgroup().join("mesh-control.service");
        std::fs::create_dir_all(&cgroup)?;
        let log = site.dir().join("mesh-control.log");
        let persistent = site.kept();
        let at = Surroundings { netns: site.fabric(), cgroup: &cgroup, log: &log, persistent };
        let process = Process::start("mesh-control", command, at, false)?;
        let mut control = Self { site, process };
        control.wait_until_ready(options.xds_port)?;
        Ok(control)
    }

    fn wait_until_ready(&mut self, xds_port: u16) -> anyhow::Result<()> {
        let (site, process) = (Rc::clone(&self.site), &mut self.process);
        wait::until("the control plane listens", Duration::from_secs(20), || {
            if let Some(status) = process.ended()? {
                // More patience will not help, but the reason will.
                panic!("mesh-control ended with {status}: {}", process.log_tail());
            }
            site.fabric().run(|| {
                for port in [xds_port, 15016] {
                    std::net::TcpStream::connect(("127.0.0.1", port))
                        .with_context(|| format!("port {port}"))?;
                }
                Ok(())
            })
        })
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log_tail()
    }

    /// Its Prometheus metrics.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], 15014));
        let (status, body) = self.site.fabric().run(|| http::get_tcp(address, "/metrics"))?;
        ensure!(status == 200, "/metrics answers {status}");
        Ok(body)
    }

    /// Runs `meshctl` beside it.
    pub fn meshctl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        meshctl(&self.site, None, arguments)
    }

    /// `meshctl … -o json`, parsed.
    pub fn meshctl_json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        json(&self.meshctl(&[arguments, &["-o", "json"]].concat())?)
    }
}

pub(crate) fn meshctl(site: &Site, agent: Option<&Path>, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(binaries::find("meshctl")?);
    if let Some(socket) = agent {
        command.arg("--agent-socket").arg(socket);
    }
    command.args(arguments);
    site.fabric().start_in(&mut command, None, false)?;
    Ok(command.output()?)
}

pub(crate) fn json(output: &Output) -> anyhow::Result<Value> {
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "meshctl: {}: {}", output.status, error.trim());
    serde_json::from_slice(&output.stdout).context("the output of meshctl -o json")
}
