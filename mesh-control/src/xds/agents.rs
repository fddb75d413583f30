//! Who is connected, and how far each has come.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use mesh_common::api::mesh::v1::AgentStatus;

use crate::catalog::{Contents, Revision};

/// Longest text of a client that is kept.
const MAX_TEXT: usize = 1_024;

/// The connected agents.
#[derive(Debug, Default)]
pub(crate) struct Agents(Mutex<Connected>);

#[derive(Debug, Default)]
struct Connected {
    next: u64,
    agents: BTreeMap<u64, Agent>,
}

/// One stream of an agent.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub(super) node: String,
    pub(super) version: String,
    pub(super) address: String,
    pub(super) since: Instant,
    pub(super) acknowledged: Revision,
    /// All that is due was sent and accepted.
    pub(super) settled: bool,
    pub(super) rejected: u64,
    pub(super) last_rejection: String,
}

impl Agents {
    /// Enters a stream; it leaves when the entry is dropped.
    pub(super) fn enter(self: &Arc<Self>, address: String, now: Instant) -> Entry {
        let agent = Agent {
            node: String::new(),
            version: String::new(),
            address,
            since: now,
            acknowledged: 0,
            settled: false,
            rejected: 0,
            last_rejection: String::new(),
        };
        let mut connected = self.lock();
        connected.next += 1;
        let id = connected.next;
        connected.agents.insert(id, agent);
        Entry { agents: Arc::clone(self), id }
    }

    /// Every connected agent by node; connections that have not said who they are do not count.
    pub(crate) fn status(&self, contents: &Contents, now: Instant) -> Vec<AgentStatus> {
        let connected = self.lock();
        let mut agents: Vec<_> = connected.agents.values().filter(|agent| !agent.node.is_empty()).collect();
        agents.sort_by(|a, b| (&a.node, a.since).cmp(&(&b.node, b.since)));
        agents.into_iter().map(|agent| agent.status(contents, now)).collect()
    }

    /// Whether an agent is here for a node.
    pub(crate) fn is_connected(&self, node: &str) -> bool {
        self.lock().agents.values().any(|agent| agent.node == node)
    }

    /// Number of agents, and the largest lag in revisions.
    pub(crate) fn summary(&self, contents: &Contents) -> (usize, u64) {
        let connected = self.lock();
        let agents = connected.agents.values().filter(|agent| !agent.node.is_empty());
        let lags: Vec<_> =
            agents.map(|agent| contents.revision().saturating_sub(agent.acknowledged)).collect();
        (lags.len(), lags.into_iter().max().unwrap_or(0))
    }

    fn lock(&self) -> MutexGuard<'_, Connected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    fn status(&self, contents: &Contents, now: Instant) -> AgentStatus {
        let lag = contents.revision().saturating_sub(self.acknowledged);
        // What was published before the agent came is late only since then.
        let since = contents.published_after(self.acknowledged).map(|published| published.max(self.since));
        let late = since.map_or(0, |since| now.saturating_duration_since(since).as_millis());
        AgentStatus {
            node: self.node.clone(),
            version: self.version.clone(),
            address: self.address.clone(),
            connected_seconds: now.saturating_duration_since(self.since).as_secs(),
            synced: self.settled && lag == 0,
            lag,
            lag_milliseconds: u64::try_from(late).unwrap_or(u64::MAX),
            acknowledged_revision: self.acknowledged,
            rejected: self.rejected,
            last_rejection: self.last_rejection.clone(),
        }
    }
}

/// A stream's place among the connected agents.
#[derive(Debug)]
pub(super) struct Entry {
    agents: Arc<Agents>,
    id: u64,
}

impl Entry {
    pub(super) fn update(&self, change: impl FnOnce(&mut Agent)) {
        if let Some(agent) = self.agents.lock().agents.get_mut(&self.id) {
            change(agent);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.agents.lock().agents.remove(&self.id);
    }
}

/// A client's text, cut to a length that may be kept.
pub(super) fn bounded(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}
