//! Which network namespace a workload's processes are in, by its cgroups.
//!
//! A pod's own cgroup has no processes; those of its containers are further down. What is found is a file that keeps the namespace:
//! its inode number cannot come to mean another one while the file is open.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Most cgroups of a workload, and processes of them, that are looked at: a workload makes as many of either as it likes.
const CGROUPS: usize = 1024;
const PROCESSES: usize = 1024;

/// A namespace's identity, as long as a file of it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn of(file: &fs::Metadata) -> Self {
        Self { device: file.dev(), number: file.ino() }
    }
}

/// The namespace of a workload.
#[derive(Debug)]
pub struct Found {
    /// Keeps it.
    pub file: File,
    /// Which one it is.
    pub inode: Inode,
    /// A process that is in it.
    pub process: u32,
}

/// What there is to be found.
#[derive(Debug)]
pub enum Look {
    /// No process, or none any more.
    Nobody,
    /// Processes in the agent's own network namespace: nothing can be captured for them alone.
    Host,
    /// Processes whose numbers mean nothing here: the agent is not in the node's own process namespace.
    Hidden,
    /// A namespace of its own.
    Inside(Found),
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    /// Root of the cgroup tree.
    pub cgroups: PathBuf,
    /// Where the processes are, `/proc`.
    pub processes: PathBuf,
    home: Inode,
}

impl Places {
    /// On this machine.
    pub fn new(cgroups: PathBuf) -> io::Result<Self> {
        let processes = PathBuf::from("/proc");
        let home = Inode::of(&fs::metadata(processes.join("self/ns/net"))?);
        Ok(Self { cgroups, processes, home })
    }

    /// Looks through `cgroups`, relative to the root of the tree. Where processes are in several namespaces, the first process's
    /// is the workload's: what it or its children made for themselves came later.
    pub fn look(&self, cgroups: &[PathBuf]) -> Look {
        let members = self.members(cgroups);
        let mut hidden = members.contains(&0);
        let mut all: Vec<(u32, Inode)> = Vec::new();
        for process in members.into_iter().filter(|process| *process != 0) {
            match fs::metadata(self.namespace(process)) {
                Ok(found) => all.push((process, Inode::of(&found))),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => hidden = true,
                // It has ended since.
                Err(_) => {}
            }
        }
        if all.iter().any(|(_, inode)| *inode != all[0].1) {
            all.sort_by_cached_key(|(process, _)| self.started(*process).unwrap_or(u64::MAX));
        }
        match all.first() {
            None if hidden => Look::Hidden,
            None => Look::Nobody,
            Some((_, inode)) if *inode == self.home => Look::Host,
            Some((process, inode)) => match File::open(self.namespace(*process)) {
                Ok(file) if file.metadata().is_ok_and(|now| Inode::of(&now) == *inode) => {
                    Look::Inside(Found { file, inode: *inode, process: *process })
                }
                // It ended just now: the next look says what is left.
                Ok(_) | Err(_) => Look::Nobody,
            },
        }
    }

    /// Whether a process that was found is still there. A number that now means another process is in another namespace, or serves
    /// as well.
    pub fn holds(&self, process: u32, inode: Inode) -> bool {
        fs::metadata(self.namespace(process)).is_ok_and(|now| Inode::of(&now) == inode)
    }

    fn namespace(&self, process: u32) -> PathBuf {
        self.processes.join(process.to_string()).join("ns/net")
    }

    /// Clock ticks between boot and the start of a process.
    fn started(&self, process: u32) -> Option<u64> {
        let stat = fs::read_to_string(self.processes.join(process.to_string()).join("stat")).ok()?;
        // The name, in parentheses, may hold anything; the 22nd field is the 20th after it.
        stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
    }

    /// The processes of these cgroups and of those below; 0: one of another process namespace.
    fn members(&self, cgroups: &[PathBuf]) -> Vec<u32> {
        let mut waiting: VecDeque<PathBuf> = cgroups.iter().map(|path| self.cgroups.join(path)).collect();
        let mut seen = waiting.len();
        let mut processes = Vec::new();
        while let Some(cgroup) = waiting.pop_front() {
            // Whatever cannot be read has gone, or is a threaded cgroup, whose processes its parent lists.
            let listed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            let room = PROCESSES.saturating_sub(processes.len());
            processes.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()).take(room));
            for entry in fs::read_dir(&cgroup).into_iter().flatten().flatten() {
                if seen < CGROUPS && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    seen += 1;
                    waiting.push_back(entry.path());
                }
            }
        }
        processes
    }
}

#[cfg(test)]
mod tests;
