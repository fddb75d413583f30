//! From changed files to published resources: the only writer of store, index and catalog.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use mesh_common::api::mesh::v1::FileError;
use tracing::{info, warn};

use crate::{
    catalog::Catalog,
    index::{Index, Mesh},
    kept::Kept,
    metrics::Metrics,
    source::Batch,
    store::{Applied, Store},
};

/// What is wrong with the manifests, for whoever asks.
pub(crate) type Report = RwLock<Arc<Vec<FileError>>>;

/// Everything between a source and the subscribers.
pub(crate) struct Pipeline {
    store: Store,
    kept: Kept,
    index: Index,
    catalog: Arc<Catalog>,
    report: Arc<Report>,
    metrics: Arc<Metrics>,
}

impl Pipeline {
    pub(crate) fn new(
        mesh: Mesh,
        kept: Kept,
        catalog: Arc<Catalog>,
        report: Arc<Report>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { store: Store::default(), kept, index: Index::new(mesh), catalog, report, metrics }
    }

    /// Takes the first reading of all manifests in, after what those that are not good now held before.
    ///
    /// # Errors
    /// When that cannot be read: starting without it might withdraw what is in force.
    pub(crate) fn start(&mut self, first: Batch) -> std::io::Result<()> {
        let earlier = self.kept.before(&first)?;
        self.apply(earlier);
        self.apply(first);
        Ok(())
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
        let delta = self.index.apply(changes);
        let resources = delta.len();
        self.catalog.publish(delta, Instant::now());
        self.metrics.update_seconds.observe(start.elapsed().as_secs_f64());
        info!(
            files,
            objects,
            resources,
            milliseconds = start.elapsed().as_millis() as u64,
            "manifests taken in"
        );
        self.tell();
        let kept = good.iter().map(|(path, text)| (path, self.kept.keep(path, text)));
        for (path, outcome) in kept.chain(gone.iter().map(|path| (path, self.kept.forget(path)))) {
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
