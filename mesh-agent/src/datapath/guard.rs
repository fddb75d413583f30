//! The program `inbound` in the network namespaces of pods, each by a pinned link, so that policy stays in force without an agent.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::programs::ProgramFd;

use super::pins::{self, Pins};
use super::sys;

/// Puts the program in force in a namespace, and takes it out again.
#[derive(Debug)]
pub struct Guard {
    program: OwnedFd,
    folder: PathBuf,
}

impl Guard {
    /// With the program of this agent.
    pub fn new(program: &ProgramFd, pins: &Pins) -> Result<Self> {
        let program = program.as_fd().try_clone_to_owned().context("keeping the program `inbound`")?;
        Ok(Self { program, folder: pins.namespaces() })
    }

    /// Puts this agent's program in the place of an earlier agent's wherever that is in force, since the maps may be others now.
    pub fn renew(&self) -> Result<()> {
        for pin in pins::entries(&self.folder).context("listing network namespaces")? {
            let link = sys::object(&pin).with_context(|| format!("opening {}", pin.display()))?;
            match sys::replace_program(link.as_fd(), self.program.as_fd()) {
                // The namespace has just gone.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                replaced => {
                    replaced.with_context(|| format!("replacing the program of {}", pin.display()))?;
                }
            }
        }
        Ok(())
    }

    /// Puts this agent's program in force in the namespace: in the place of an earlier agent's, without a moment between, or anew.
    pub fn guard(&self, netns: BorrowedFd<'_>, cookie: u64) -> Result<()> {
        let pin = self.pin(cookie);
        if pin.exists() {
            // No cookie is ever given to another namespace.
            let link = sys::object(&pin).with_context(|| format!("opening {}", pin.display()))?;
            return sys::replace_program(link.as_fd(), self.program.as_fd())
                .context("replacing the program of a network namespace");
        }
        let link = sys::attach_lookup(self.program.as_fd(), netns)
            .context("attaching the program `inbound` in a network namespace")?;
        sys::pin(link.as_fd(), &pin).with_context(|| format!("pinning {}", pin.display()))
    }

    /// Takes it out: the pod has gone, or is no workload any more. What is not there is no error.
    pub fn unguard(&self, cookie: u64) -> io::Result<()> {
        let pin = self.pin(cookie);
        if !pin.exists() {
            return Ok(());
        }
        sys::detach(sys::object(&pin)?.as_fd())?;
        fs::remove_file(&pin)
    }

    /// Takes it out of namespaces that `used` does not know, by their cookies; how many those were.
    pub fn retain(&self, used: impl Fn(u64) -> bool) -> io::Result<usize> {
        let name = |path: PathBuf| path.file_name().and_then(|name| name.to_str()?.parse().ok());
        let cookies = pins::entries(&self.folder)?.into_iter().filter_map(name);
        let unused: Vec<u64> = cookies.filter(|cookie| !used(*cookie)).collect();
        // One that fails is no reason to leave the others.
        let outcomes: Vec<_> = unused.iter().map(|cookie| self.unguard(*cookie)).collect();
        outcomes.into_iter().collect::<io::Result<()>>()?;
        Ok(unused.len())
    }

    /// Removes the links of namespaces that have gone.
    pub fn sweep(&self) -> io::Result<()> {
        for pin in pins::entries(&self.folder)? {
            if !sys::has_netns(sys::object(&pin)?.as_fd())? {
                fs::remove_file(&pin)?;
            }
        }
        Ok(())
    }

    fn pin(&self, cookie: u64) -> PathBuf {
        self.folder.join(cookie.to_string())
    }
}
