//! From changed files to published resources: the only writer of store, index and catalog.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use mesh_common::api::mesh::v1::FileError;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::{
    catalog::Catalog,
    index::{Index, Joined, Mesh},
    joined::Kept,
    last_good::LastGood,
    manifest::Kind,
    metrics::Metrics,
    source::Batch,
    store::{Applied, Change, Store},
    xds::Agents,
};

/// Nodes that may have joined: a token for any node must not fill the memory.
const MAX_NODES: usize = 65_536;

/// What is wrong with the manifests, for whoever asks.
pub(crate) type Report = RwLock<Arc<Vec<FileError>>>;

/// What the pipeline is told beside manifests.
#[derive(Debug)]
pub(crate) enum Order {
    /// An agent has come for a node.
    Join { node: Arc<str>, done: oneshot::Sender<()> },
    /// The node's agent will not come back; answered with whether one had come.
    Forget { node: Arc<str>, done: oneshot::Sender<bool> },
}

/// How to tell it, and what came of it.
#[derive(Clone)]
pub(crate) struct Joining {
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) joined: watch::Receiver<Arc<Joined>>,
}

/// What the pipeline keeps between starts.
pub(crate) struct State {
    pub(crate) last_good: LastGood,
    pub(crate) joined: Kept,
}

/// Everything between a source and the subscribers.
pub(crate) struct Pipeline {
    store: Store,
    state: State,
    index: Index,
    catalog: Arc<Catalog>,
    agents: Arc<Agents>,
    joined: watch::Sender<Arc<Joined>>,
    report: Arc<Report>,
    metrics: Arc<Metrics>,
}

impl Pipeline {
    pub(crate) fn new(
        mesh: Mesh,
        state: State,
        (catalog, agents): (Arc<Catalog>, Arc<Agents>),
        report: Arc<Report>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (store, index, joined) = (Store::default(), Index::new(mesh), watch::Sender::default());
        Self { store, state, index, catalog, agents, joined, report, metrics }
    }

    /// The nodes whose agent has joined.
    pub(crate) fn joined(&self) -> watch::Receiver<Arc<Joined>> {
        self.joined.subscribe()
    }

    /// Takes the first reading of all manifests in, after what those that are not good now held before.
    ///
    /// # Errors
    /// When that cannot be read: starting without it might withdraw what is in force.
    pub(crate) fn start(&mut self, first: Batch) -> std::io::Result<()> {
        self.index.remember(self.state.joined.load()?);
        let earlier = self.state.last_good.before(&first)?;
        self.apply(earlier);
        self.apply(first);
        self.index.forget_deleted();
        self.publish(Vec::new());
        Ok(())
    }

    /// Does what it is told.
    pub(crate) fn obey(&mut self, order: Order) {
        match order {
            Order::Join { node, done } => {
                if self.index.joined().len() >= MAX_NODES {
                    warn!(%node, "no more than {MAX_NODES} nodes can join");
                } else if self.index.join(&node) {
                    info!(%node, "node joined");
                    self.publish(Vec::new());
                }
                // The stream may have ended meanwhile.
                done.send(()).ok();
            }
            Order::Forget { node, done } => {
                let known = self.index.forget(&node);
                if known {
                    info!(%node, "node forgotten");
                    self.publish(Vec::new());
                }
                done.send(known).ok();
            }
        }
    }

    /// Publishes what changes lead to; returns to how many resources.
    fn publish(&mut self, changes: Vec<Change>) -> usize {
        // A Node resource that moves from file to file is deleted and made again, while its agent stays.
        let made = changes
            .iter()
            .filter(|change| change.before.is_none())
            .filter_map(|change| change.after.as_ref());
        let made = made.filter(|object| object.kind() == Kind::Node).map(|object| object.meta().name.clone());
        let back: Vec<_> = made.filter(|node| self.agents.is_connected(node)).collect();
        let update = self.index.apply(changes);
        let mut resources = update.len();
        let mut again = false;
        for node in back {
            again |= self.index.join(&node);
        }
        // Before peers rely on it: what is forgotten by a restart would have them fall back to plaintext.
        let joined = Arc::new(self.index.joined().clone());
        let moved = *self.joined.borrow() != joined;
        if moved && let Err(error) = self.state.joined.keep(&joined) {
            self.metrics.keep_failures.inc();
            warn!(%error, "the list of nodes that have joined is not kept for the next start");
        }
        let now = Instant::now();
        self.catalog.publish(update, now);
        if again {
            let update = self.index.apply(Vec::new());
            resources += update.len();
            self.catalog.publish(update, now);
        }
        if moved {
            self.metrics.joined.set(i64::try_from(joined.len()).unwrap_or(i64::MAX));
            self.joined.send_replace(joined);
        }
        resources
    }

    /// Takes a batch of files in and publishes what it changes. Blocks, for a large batch for seconds.
    pub(crate) fn apply(&mut self, batch: Batch) {
        if batch.is_empty() {
            return;
        }
        let start = Instant::now();
        let files = batch.len();
        self.metrics.files_read.inc_by(files as u64);
        let Applied { changes, good, gone } = self.store.apply(batch);
        let objects = changes.len();
        let resources = self.publish(changes);
        self.metrics.update_seconds.observe(start.elapsed().as_secs_f64());
        info!(
            files,
            objects,
            resources,
            milliseconds = start.elapsed().as_millis() as u64,
            "manifests taken in"
        );
        self.tell();
        let kept = good.iter().map(|(path, text)| (path, self.state.last_good.keep(path, text)));
        for (path, outcome) in kept.chain(gone.iter().map(|path| (path, self.state.last_good.forget(path)))) {
            if let Err(error) = outcome {
                self.metrics.keep_failures.inc();
                warn!(file = %path.display(), %error, "the manifest's copy for the next start is not what is in force");
            }
        }
    }

    /// Publishes and logs what is wrong.
    fn tell(&self) {
        let mut errors = self.store.errors();
        errors.extend(self.index.problems().map(|problem| {
            let (file, document) = self
                .store
                .place(&problem.key)
                .map_or((String::new(), 0), |(file, document)| (file.display().to_string(), document));
            FileError { file, document, field: problem.field.clone(), reason: problem.reason.clone() }
        }));
        errors.sort_by(|a, b| (&a.file, a.document, &a.field).cmp(&(&b.file, b.document, &b.field)));
        self.metrics.files.set(i64::try_from(self.store.files()).unwrap_or(i64::MAX));
        self.metrics.file_errors.set(i64::try_from(errors.len()).unwrap_or(i64::MAX));
        let former = Arc::clone(&self.report.read().unwrap_or_else(PoisonError::into_inner));
        if *former == errors {
            return;
        }
        let known: std::collections::HashSet<_> = former.iter().map(as_text).collect();
        for error in errors.iter().filter(|error| !known.contains(&as_text(error))) {
            warn!(file = %error.file, document = error.document, field = %error.field, reason = %error.reason, "manifest");
        }
        *self.report.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(errors);
    }
}

fn as_text(error: &FileError) -> (&str, u32, &str, &str) {
    (&error.file, error.document, &error.field, &error.reason)
}
