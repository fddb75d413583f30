//! The journal, kept by threads of its own, so that no disk holds up what is put in force.
//!
//! A change is written before it is in force, so that the agent after this one knows at least what the kernel does, however this one ends. It is
//! acknowledged when it is safe from a power failure, too: one thread writes, another syncs all that was written meanwhile.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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

/// Bytes of changes that wait for a disk that does not take them. Beyond, the next snapshot has to have them all.
const WAITING: usize = 16 << 20;

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
    /// Bytes on their way to the thread that writes.
    waiting: Arc<AtomicUsize>,
}

enum Command {
    /// No change: there was no room for it.
    Write {
        sequence: u64,
        change: Option<Vec<u8>>,
        written: oneshot::Sender<()>,
        safe: oneshot::Sender<()>,
    },
    Sync {
        safe: oneshot::Sender<()>,
    },
    Covered {
        sequence: u64,
    },
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
        let waiting = Arc::<AtomicUsize>::default();
        let lossy = Arc::<AtomicBool>::default();
        let sequence = journal.sequence();
        let of_syncer = (Arc::clone(&unsafely), Arc::clone(&lossy));
        let (of_writer, taken) = (Arc::clone(&unsafely), Arc::clone(&waiting));
        let writer = Writer {
            journal,
            owed: VecDeque::new(),
            last: None,
            files,
            lossy,
            unsafely: of_writer,
            failing: false,
        };
        thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run(&received, &taken))?;
        thread::Builder::new().name("journal-sync".to_owned()).spawn(move || {
            sync(&written, std::fs::File::sync_data, &of_syncer.0, &of_syncer.1);
        })?;
        Ok(Self { commands, sequence, unsafely, late: None, waiting })
    }

    /// Writes a change that is about to be put in force. What is returned tells when it may be acknowledged; `None`: at once.
    pub(super) async fn write(&mut self, change: Option<Vec<u8>>) -> Option<oneshot::Receiver<()>> {
        let change = change?;
        self.sequence += 1;
        let (written, done) = oneshot::channel();
        let (safe, saved) = oneshot::channel();
        let length = change.len();
        let fits = self.waiting.fetch_add(length, Ordering::Relaxed) + length <= WAITING;
        if !fits {
            self.waiting.fetch_sub(length, Ordering::Relaxed);
        }
        self.send(Command::Write { sequence: self.sequence, change: fits.then_some(change), written, safe });
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
            let reason = match timeout(SYNCING, saved).await {
                Ok(Ok(())) => None,
                Ok(Err(_dropped)) => Some("a thread of the journal has failed"),
                Err(_elapsed) => Some("the disk of --state-dir is slow"),
            };
            if let Some(reason) = reason {
                warn!(reason, "a change is acknowledged before it is safe");
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

/// What the thread that writes has.
struct Writer {
    journal: Journal,
    /// Changes that the disk has not taken, in order.
    owed: VecDeque<(u64, Vec<u8>)>,
    /// What is to be synced for all that has been written.
    last: Option<Arc<File>>,
    files: Sender<Written<File>>,
    /// Syncing has failed since this was last looked at.
    lossy: Arc<AtomicBool>,
    unsafely: Arc<AtomicU64>,
    failing: bool,
}

impl Writer {
    fn run(mut self, commands: &Receiver<Command>, taken: &AtomicUsize) {
        match self.journal.written() {
            // Read by this process, and soon told of: but perhaps only the one before this had written it.
            Ok(written) => self.last = written,
            Err(error) => error!(%error, "the journal cannot be opened"),
        }
        for command in commands {
            if self.lossy.swap(false, Ordering::Relaxed) {
                self.journal.distrust();
            }
            match command {
                Command::Write { sequence, change, written, safe } => {
                    taken.fetch_sub(change.as_ref().map_or(0, Vec::len), Ordering::Relaxed);
                    if self.write(sequence, change).is_err() {
                        self.unsafely.fetch_add(1, Ordering::Relaxed);
                    }
                    let _gone_on = written.send(());
                    drop(self.files.send(Written { file: self.last.clone(), safe }));
                }
                Command::Sync { safe } => drop(self.files.send(Written { file: self.last.clone(), safe })),
                Command::Covered { sequence } => {
                    self.owed.retain(|(owed, _)| *owed > sequence);
                    if let Err(error) = self.journal.covered(sequence) {
                        warn!(%error, "the journal could not be cut; the snapshot has what is in it");
                    }
                    // It has said so, if it fails again.
                    drop(self.pay());
                }
            }
        }
    }

    fn write(&mut self, sequence: u64, change: Option<Vec<u8>>) -> io::Result<()> {
        let outcome = match change {
            Some(change) => {
                self.owed.push_back((sequence, change));
                self.pay()
            }
            None => Err(io::Error::other("too much waits for the disk")),
        };
        let owed: usize = self.owed.iter().map(|(_, change)| change.len()).sum();
        if outcome.is_err() && owed > WAITING {
            // The snapshot has to have them all.
            self.owed.clear();
        }
        outcome
    }

    /// Writes what is owed, as far as the disk takes it.
    fn pay(&mut self) -> io::Result<()> {
        while let Some((sequence, change)) = self.owed.front() {
            match self.journal.append(*sequence, change) {
                Ok(file) => self.last = Some(file),
                Err(error) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        error!(%error, "changes are in force and acknowledged, but not on disk; it will be tried again");
                    }
                    return Err(error);
                }
            }
            self.owed.pop_front();
        }
        self.failing = false;
        Ok(())
    }
}

/// Syncs what comes, all that has come at once, and tells.
fn sync<F>(
    written: &Receiver<Written<F>>,
    sync: impl Fn(&F) -> io::Result<()>,
    unsafely: &AtomicU64,
    lossy: &AtomicBool,
) {
    while let Ok(first) = written.recv() {
        let group: Vec<_> = std::iter::once(first).chain(written.try_iter()).collect();
        let mut files: Vec<&F> = group.iter().filter_map(|one| one.file.as_deref()).collect();
        files.dedup_by(|a, b| std::ptr::eq(*a, *b));
        for file in files {
            if let Err(error) = sync(file) {
                error!(%error, "changes are in force and acknowledged, but may not outlive a power failure");
                unsafely.fetch_add(1, Ordering::Relaxed);
                // The next sync may succeed without them.
                lossy.store(true, Ordering::Relaxed);
            }
        }
        for one in group {
            let _gone = one.safe.send(());
        }
    }
}

#[cfg(test)]
mod tests;
