//! Child processes that never outlive the test, and what they cost.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::netns::Netns;
use crate::sys;

/// A running child; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    stdin: Option<ChildStdin>,
    stdout: Option<BufReader<ChildStdout>>,
    persistent: bool,
}

/// Where a process runs and where its words go.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Its network.
    pub netns: &'a Netns,
    /// Its cgroup.
    pub cgroup: &'a Path,
    /// The file that collects its standard error.
    pub log: &'a Path,
    /// It outlives the harness.
    pub persistent: bool,
}

/// Processor time and memory of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time so far.
    pub cpu_s: f64,
    /// Resident memory.
    pub rss_bytes: u64,
}

impl Process {
    /// Starts `command`; its standard output is read through [`Process::line`] when `talks`, else logged.
    pub fn start(
        name: &str,
        mut command: Command,
        at: Surroundings<'_>,
        talks: bool,
    ) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(at.log)?;
        let (stdin, stdout) = match talks {
            true => (Stdio::piped(), Stdio::piped()),
            false => (Stdio::null(), Stdio::from(log.try_clone()?)),
        };
        command.stdin(stdin).stdout(stdout).stderr(log);
        at.netns.start_in(&mut command, Some(at.cgroup), at.persistent)?;
        let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().map(BufReader::new));
        let (name, log) = (name.to_owned(), at.log.to_owned());
        Ok(Self { child, name, log, stdin, stdout, persistent: at.persistent })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line of its standard output.
    pub fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().with_context(|| format!("{} does not talk", self.name))?;
        if stdout.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            bail!("{} ended ({status}): {}", self.name, self.log_tail());
        }
        Ok(line)
    }

    /// Writes one line to its standard input.
    pub fn say(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("{} does not listen", self.name))?;
        Ok(stdin.write_all(format!("{line}\n").as_bytes())?)
    }

    /// Ends its standard input.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// The last words it logged.
    pub fn log_tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(4000)..];
        String::from_utf8_lossy(tail).trim().to_owned()
    }

    /// Its status, once it has ended.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self, at_most: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + at_most;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {at_most:?}: {}", self.name, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks it to stop (`SIGTERM`) and waits; an exit status other than 0 is an error.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        sys::kill(self.pid(), libc::SIGTERM)?;
        let status = self.wait(Duration::from_secs(10))?;
        if !status.success() {
            bail!("{} ended with {status} (signal {:?}): {}", self.name, status.signal(), self.log_tail());
        }
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// What it has used so far.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        usage_of(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.persistent {
            // Already gone is as good.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// Processor time and memory of any process.
pub fn usage_of(pid: u32) -> anyhow::Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name, in parentheses, may contain anything; fields 14, 15 (times) and 24 (pages) count from it.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let field = |number: usize| -> anyhow::Result<u64> {
        Ok(fields
            .get(number - 3)
            .with_context(|| format!("/proc/{pid}/stat has no field {number}"))?
            .parse()?)
    };
    let ticks = field(14)? + field(15)?;
    Ok(Usage { cpu_s: ticks as f64 / 100.0, rss_bytes: field(24)? * 4096 })
}

/// Resident memory that is a process's own, not shared with a file: what its work has cost.
pub fn anonymous_bytes_of(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kibibytes = line.with_context(|| format!("no RssAnon of {pid}"))?.trim().trim_end_matches(" kB");
    Ok(kibibytes.parse::<u64>()? * 1024)
}

/// Bytes that the kernel accounts to the eBPF maps which process `pid` holds open, each map once.
pub fn map_bytes_of(pid: u32) -> anyhow::Result<u64> {
    let mut maps = std::collections::BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        // Closed meanwhile.
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        let field =
            |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}
