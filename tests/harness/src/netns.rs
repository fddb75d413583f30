//! Network namespaces without names: held open by a descriptor, gone when the last holder is.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::sys::{self, Place};

/// Settings of a new namespace: it routes, binds addresses at once, and recycles ports fast enough for loops of
/// tens of thousands of connections.
const SETTINGS: [(&str, &str); 9] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv4/ip_local_port_range", "20000 65000"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/tcp_max_tw_buckets", "2048"),
];

/// A network namespace that lives as long as this value and the processes inside.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// Creates a namespace with its loopback device up.
    pub fn create() -> anyhow::Result<Self> {
        let file = std::thread::spawn(|| -> io::Result<File> {
            sys::unshare_network()?;
            for (name, value) in SETTINGS {
                fs::write(Path::new("/proc/sys").join(name), value)
                    .map_err(|e| io::Error::new(e.kind(), format!("/proc/sys/{name}: {e}")))?;
            }
            File::open("/proc/thread-self/ns/net")
        })
        .join()
        .map_err(|_panic| anyhow::anyhow!("the thread that creates a network namespace panicked"))?
        .context("creating a network namespace")?;
        let netns = Self { file };
        netns.ip_batch("link set lo up\n")?;
        Ok(netns)
    }

    /// A path that opens this namespace, for `ip link set … netns PATH` and `nsenter --net=PATH`; it is valid
    /// while this process lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                sys::enter_network(self.file.as_fd()).context("entering a network namespace")?;
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Makes `command` start in this namespace and in `cgroup`.
    pub fn start_in(
        &self,
        command: &mut Command,
        cgroup: Option<&Path>,
        persistent: bool,
    ) -> anyhow::Result<()> {
        let procs = |dir: &Path| {
            let path = dir.join("cgroup.procs");
            File::options().write(true).open(&path).with_context(|| path.display().to_string())
        };
        let cgroup_procs = cgroup.map(procs).transpose()?;
        sys::start_in(command, Place { netns: self.file.try_clone()?, cgroup_procs, persistent });
        Ok(())
    }

    /// Runs a batch of `ip` commands inside, one a line.
    pub fn ip_batch(&self, lines: &str) -> anyhow::Result<()> {
        self.feed(Command::new("ip").args(["-batch", "-"]), lines, "iproute2")
    }

    /// Runs `command` inside with `input` on its standard input; `package` is named when it is missing.
    pub fn feed(&self, command: &mut Command, input: &str, package: &str) -> anyhow::Result<()> {
        let program = command.get_program().to_owned();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.start_in(command, None, false)?;
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {program:?}: install the package {package}"))?;
        let stdin = child.stdin.take();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                if let Some(mut stdin) = stdin {
                    // A command that refuses its input says so in its status.
                    drop(io::Write::write_all(&mut stdin, input.as_bytes()));
                }
            });
            child.wait_with_output()
        })?;
        if !output.status.success() {
            bail!("{program:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Gives the namespace a name under `/run/netns`, which keeps it after this process.
    pub fn persist(&self, name: &str) -> anyhow::Result<PathBuf> {
        let dir = Path::new("/run/netns");
        fs::create_dir_all(dir)?;
        let target = dir.join(name);
        File::create(&target)?;
        sys::bind_mount(&self.path(), &target).with_context(|| format!("naming a namespace {name}"))?;
        Ok(target)
    }
}
