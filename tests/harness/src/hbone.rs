//! A node proxy that is not ours: `hbone-peer/hbone_peer.py`, in a pod of a node without agent.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::pod::Pod;
use crate::process::Process;

/// Debian's own: another one before it in the path has not its packages.
const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/hbone-peer/hbone_peer.py");
/// Where a node takes tunnels.
const PORT: u16 = 15008;

/// Whether it can run here.
pub(crate) fn available() -> anyhow::Result<()> {
    for (program, arguments, package) in
        [(PYTHON, &["-c", "import h2"][..], "python3-h2"), ("openssl", &["version"], "openssl")]
    {
        let ran = Command::new(program).args(arguments).output();
        ensure!(
            ran.is_ok_and(|output| output.status.success()),
            "Debian's {package} is not installed: {program} {arguments:?} fails"
        );
    }
    ensure!(Path::new(SCRIPT).exists(), "{SCRIPT} is missing");
    Ok(())
}

/// The proxy of a pod.
#[derive(Debug)]
pub struct Foreign {
    process: Process,
    at: [String; 2],
}

/// A stream that it has opened.
#[derive(Debug)]
pub struct Opened {
    tunnel: Value,
    stream: Value,
    /// The response's headers, with `:status`.
    pub headers: Value,
}

impl Foreign {
    /// Starts it, with a certificate for `identity`, which the control plane grants to the pod's node.
    pub fn start(pod: &Pod, identity: &str) -> anyhow::Result<Self> {
        let mut command = Command::new(PYTHON);
        command.arg(SCRIPT);
        let name = format!("the foreign proxy of {}", pod.name);
        let log = pod.log();
        let process = Process::start(&name, command, pod.surroundings(&log), true)?;
        let at = [pod.address(PORT), pod.address6(PORT)].map(|at| at.to_string());
        let mut foreign = Self { process, at };
        foreign.certify(pod, identity)?;
        Ok(foreign)
    }

    /// Has another certificate made, and uses that from now on.
    pub fn certify(&mut self, pod: &Pod, identity: &str) -> anyhow::Result<()> {
        let file = pod.node().site().dir().join(format!("{}.foreign.pem", pod.name));
        self.enrol(pod, json!({"do": "certify", "identity": identity, "file": file}))
    }

    /// Makes the pod's node one that has joined, and whose workloads take tunnels therefore.
    pub fn join(&mut self, pod: &Pod) -> anyhow::Result<()> {
        self.enrol(pod, json!({"do": "join"}))
    }

    fn enrol(&mut self, pod: &Pod, mut command: Value) -> anyhow::Result<()> {
        let site = pod.node().site();
        let token = std::fs::read_to_string(site.dir().join("token"))?;
        let url = pod.node().fabric(15012);
        command["control"] = json!(url.strip_prefix("https://"));
        command["token"] = json!(token.trim());
        command["node"] = json!(pod.node().name());
        command["roots"] = json!(site.roots());
        self.ask(&command).map(drop)
    }

    /// One command, one answer.
    pub fn ask(&mut self, command: &Value) -> anyhow::Result<Value> {
        let answer = self.attempt(command)?;
        ensure!(answer.get("error").is_none(), "{command}: {answer}");
        Ok(answer)
    }

    /// The same, where an error is an answer, too.
    pub fn attempt(&mut self, command: &Value) -> anyhow::Result<Value> {
        self.process.say(&command.to_string())?;
        let line = self.process.line().with_context(|| command.to_string())?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Takes tunnels over IPv4 and IPv6; `how`: `windows`, `limit`.
    pub fn listen(&mut self, how: &Value) -> anyhow::Result<()> {
        for at in self.at.clone() {
            let mut command = json!({"do": "listen", "at": at});
            for (name, value) in how.as_object().into_iter().flatten() {
                command[name] = value.clone();
            }
            self.ask(&command)?;
        }
        Ok(())
    }

    /// The tunnels that have come, with their streams.
    pub fn seen(&mut self) -> anyhow::Result<Vec<Value>> {
        let seen = self.ask(&json!({"do": "seen"}))?;
        Ok(seen["tunnels"].as_array().cloned().unwrap_or_default())
    }

    /// The streams of all tunnels that have come.
    pub fn streams(&mut self) -> anyhow::Result<Vec<Value>> {
        let streams = |tunnel: Value| tunnel["streams"].as_array().cloned().unwrap_or_default();
        Ok(self.seen()?.into_iter().flat_map(streams).collect())
    }

    /// Makes a tunnel; what is known of it is in the answer.
    pub fn tunnel(&mut self, to: std::net::SocketAddr, windows: &str) -> anyhow::Result<Value> {
        self.ask(&json!({"do": "tunnel", "to": to.to_string(), "windows": windows}))
    }

    /// Asks for a stream with a CONNECT.
    pub fn connect(
        &mut self,
        tunnel: &Value,
        authority: &str,
        others: &[(&str, &str)],
    ) -> anyhow::Result<Opened> {
        self.open(tunnel, &[&[(":method", "CONNECT"), (":authority", authority)], others].concat())
    }

    /// Asks with any headers.
    pub fn open(&mut self, tunnel: &Value, headers: &[(&str, &str)]) -> anyhow::Result<Opened> {
        let answer = self.ask(&json!({"do": "open", "tunnel": tunnel["tunnel"], "headers": headers}))?;
        Ok(Opened {
            tunnel: tunnel["tunnel"].clone(),
            stream: answer["stream"].clone(),
            headers: answer["headers"].clone(),
        })
    }

    /// Does something on a stream.
    pub fn on(&mut self, opened: &Opened, mut command: Value) -> anyhow::Result<Value> {
        command["tunnel"] = opened.tunnel.clone();
        command["stream"] = opened.stream.clone();
        self.ask(&command)
    }

    /// Says a line, and hears one.
    pub fn line(&mut self, opened: &Opened, text: &str) -> anyhow::Result<String> {
        self.on(opened, json!({"do": "say", "text": format!("{text}\n")}))?;
        let heard = self.on(opened, json!({"do": "hear", "line": true}))?;
        Ok(heard["text"].as_str().unwrap_or_default().trim_end().to_owned())
    }
}
