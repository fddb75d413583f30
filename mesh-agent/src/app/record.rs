//! The journal, kept by threads of its own, so that no disk holds up what is put in force.
//!
//! A change is written before it is in force, so that the agent after this one knows at least what the kernel does, however this one ends. It is
//! acknowledged when it is safe from a power failure, too: one thread writes, another syncs all that was written meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::timeout;
use tracing::{error, warn};

use crate::snapshot::journal::Journal;

/// How long a change waits to be written before it is put in force. That takes a fraction of a millisecond, unless the disk is in trouble.
const WRITING: Duration = Duration::from_millis(100);
/// How long a change waits to be safe before it is acknowledged all the same: some control planes send nothing more before.
const SYNCING: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Record {
    commands: Sender<Command>,
    /// The number of the last change.
    sequence: u64,
    /// Changes that were acknowledged and are not safe.
    unsafely: Arc<AtomicU64>,
    /// A change that was put in force before it was written.
    late: Option<oneshot::Receiver<()>>,
}

enum Command {
    Write { sequence: u64, change: Vec<u8>, written: oneshot::Sender<()>, safe: oneshot::Sender<()> },
    Sync { safe: oneshot::Sender<()> },
    Covered { sequence: u64 },
}

/// Where a change is, and whom to tell when it is safe.
struct Written<F> {
    file: Option<Arc<F>>,
    safe: oneshot::Sender<()>,
}

impl Record {
    /// Goes on with a journal.
    pub(super) fn start(journal: Journal) -> io::Result<Self> {
        let (commands, received) = channel();
        let (files, written) = channel();
        let unsafely = Arc::new(AtomicU64::new(0));
        let sequence = journal.sequence();
        let (of_writer, of_syncer) = (Arc::clone(&unsafely), Arc::clone(&unsafely));
        thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || write(journal, &received, &files, &of_writer))?;
        thread::Builder::new().name("journal-sync".to_owned()).spawn(move || {
            sync(&written, std::fs::File::sync_data, &of_syncer);
        })?;
        Ok(Self { commands, sequence, unsafely, late: None })
    }

    /// Writes a change that is about to be put in force. What is returned tells when it may be acknowledged; `None`: at once.
    pub(super) async fn write(&mut self, change: Option<Vec<u8>>) -> Option<oneshot::Receiver<()>> {
        let change = change?;
        self.sequence += 1;
        let (written, done) = oneshot::channel();
        let (safe, saved) = oneshot::channel();
        self.send(Command::Write { sequence: self.sequence, change, written, safe });
        self.until_written(done).await;
        Some(self.in_time(saved))
    }

    /// Tells when all that was written may be acknowledged.
    pub(super) fn all(&self) -> oneshot::Receiver<()> {
        let (safe, saved) = oneshot::channel();
        self.send(Command::Sync { safe });
        self.in_time(saved)
    }

    /// The number of the last change that was written, which is in every snapshot that is taken now.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// A snapshot has been saved with all up to that change.
    pub(super) fn covered(&self, sequence: u64) {
        self.send(Command::Covered { sequence });
    }

    /// Changes that were acknowledged although the disk did not take them.
    pub(super) fn unsafely(&self) -> u64 {
        self.unsafely.load(Ordering::Relaxed)
    }

    /// Waits, but not behind a disk that is stuck: in force the change is to be whatever becomes of it here.
    async fn until_written(&mut self, mut done: oneshot::Receiver<()>) {
        if let Some(late) = &mut self.late
            && late.try_recv() == Err(TryRecvError::Empty)
        {
            return;
        }
        self.late = None;
        if timeout(WRITING, &mut done).await.is_err() {
            warn!("changes are put in force before they are written: the disk of --state-dir is slow");
            self.late = Some(done);
        }
    }

    fn in_time(&self, saved: oneshot::Receiver<()>) -> oneshot::Receiver<()> {
        let (may, acknowledge) = oneshot::channel();
        let unsafely = Arc::clone(&self.unsafely);
        tokio::spawn(async move {
            if timeout(SYNCING, saved).await.is_err() {
                warn!("a change is acknowledged before it is safe: the disk of --state-dir is slow");
                unsafely.fetch_add(1, Ordering::Relaxed);
            }
            // The stream may be another by now.
            let _gone = may.send(());
        });
        acknowledge
    }

    fn send(&self, command: Command) {
        // The thread lives as long as this does; if it has failed, whoever waits is told by what is dropped.
        drop(self.commands.send(command));
    }
}

fn write(
    mut journal: Journal,
    commands: &Receiver<Command>,
    files: &Sender<Written<std::fs::File>>,
    unsafely: &AtomicU64,
) {
    let mut failing = false;
    let mut last = None;
    for command in commands {
        match command {
            Command::Write { sequence, change, written, safe } => {
                let result = journal.append(sequence, &change);
                if let Err(error) = &result {
                    unsafely.fetch_add(1, Ordering::Relaxed);
                    if !failing {
                        error!(%error, "changes are in force and acknowledged, but not on disk; the snapshot will be tried again");
                    }
                }
                failing = result.is_err();
                last = result.ok();
                let _gone_on = written.send(());
                drop(files.send(Written { file: last.clone(), safe }));
            }
            Command::Sync { safe } => drop(files.send(Written { file: last.clone(), safe })),
            Command::Covered { sequence } => {
                if let Err(error) = journal.covered(sequence) {
                    warn!(%error, "the journal could not be cut; the snapshot has what is in it");
                }
            }
        }
    }
}

/// Syncs what comes, all that has come at once, and tells.
fn sync<F>(written: &Receiver<Written<F>>, sync: impl Fn(&F) -> io::Result<()>, unsafely: &AtomicU64) {
    while let Ok(first) = written.recv() {
        let group: Vec<_> = std::iter::once(first).chain(written.try_iter()).collect();
        let mut files: Vec<&F> = group.iter().filter_map(|one| one.file.as_deref()).collect();
        files.dedup_by(|a, b| std::ptr::eq(*a, *b));
        for file in files {
            if let Err(error) = sync(file) {
                error!(%error, "changes are in force and acknowledged, but may not outlive a power failure");
                unsafely.fetch_add(1, Ordering::Relaxed);
            }
        }
        for one in group {
            let _gone = one.safe.send(());
        }
    }
}

#[cfg(test)]
mod tests;
