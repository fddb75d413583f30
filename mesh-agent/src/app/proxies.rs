//! Joins the node proxy with the kernel side: what passes between the two, and the heartbeat.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use crate::datapath::guard::Guard;
use crate::datapath::passages::{BEAT, Heartbeat, Passages, socket_address};
use crate::pods::host::{Kernel, Original};

/// What the proxies ask of the kernel side.
pub(super) struct KernelSide {
    pub(super) passages: Passages,
    pub(super) guard: Guard,
}

impl Kernel for KernelSide {
    fn take_original(&self, netns: u64, source: SocketAddr) -> Option<Original> {
        let found = self.passages.take_original(netns, source)?;
        Some(Original {
            dialled: socket_address(&found.dialled)?,
            chosen: socket_address(&found.chosen),
            is_service: found.service != 0,
        })
    }

    fn show_client(&self, netns: u64, proxy_end: SocketAddr, client: SocketAddr) -> io::Result<()> {
        self.passages.show_client(netns, proxy_end, client)
    }

    fn forget_client(&self, netns: u64, proxy_end: SocketAddr) {
        if let Err(error) = self.passages.forget_client(netns, proxy_end) {
            warn!(%error, "a client that the proxy stood for could not be forgotten");
        }
    }

    fn guard(&self, netns: &File, cookie: u64) -> Result<()> {
        self.guard.guard(netns.as_fd(), cookie)
    }

    fn unguard(&self, cookie: u64) {
        if let Err(error) = self.guard.unguard(cookie) {
            warn!(%error, "the program of a network namespace could not be taken out of force");
        }
    }
}

/// Says several times a second that the proxy is alive, for as long as this task gets its turn.
pub(super) async fn beat(heartbeat: Arc<Heartbeat>) -> Result<()> {
    let mut due = interval(BEAT);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        heartbeat.beat().context("the heartbeat cannot be written")?;
    }
}
