//! The shell around the directory: inotify, the short wait for more, and the slow comparison that needs no events.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_stream::StreamExt as _;

use super::{
    Batch,
    directory::{Directory, Watch},
    pending::Pending,
};

/// Files that are written together are taken together.
const QUIET: Duration = Duration::from_millis(10);
/// But under steady writing nothing waits longer.
const PATIENCE: Duration = Duration::from_millis(40);
/// Finds what events cannot tell: changes behind links that leave the tree, and on network file systems.
const COMPARE: Duration = Duration::from_secs(30);
/// Bytes of events read at once; one takes 16 and a name.
const BUFFER: usize = 16 << 10;
/// A root that is gone is looked for.
const SEARCH: Duration = Duration::from_secs(1);

/// A watched directory of manifests.
pub(crate) struct Source {
    events: EventStream<Vec<u8>>,
    tree: Option<Tree>,
    compare_at: Instant,
}

/// What a reading needs; it moves to a thread that may block.
struct Tree {
    directory: Directory,
    watched: Watched,
}

impl Source {
    /// Reads the directory for the first time.
    ///
    /// # Errors
    /// When it is missing or cannot be listed; the message names the option.
    pub(crate) async fn open(root: &Path) -> anyhow::Result<(Self, Batch)> {
        let about = || format!("--manifests {}", root.display());
        let kind = tokio::fs::metadata(root).await.with_context(about)?;
        anyhow::ensure!(kind.is_dir(), "--manifests {} is not a directory", root.display());
        let inotify = Inotify::init().context("inotify, which tells of changed manifests")?;
        let watched = Watched { watches: inotify.watches(), paths: HashMap::new() };
        let tree = Tree { directory: Directory::new(root.to_owned()), watched };
        let events = inotify.into_event_stream(vec![0; BUFFER]).context("waiting for changed manifests")?;
        let mut source = Self { events, tree: Some(tree), compare_at: Instant::now() };
        let batch = source.read(Pending { all: true, ..Pending::default() }).await?;
        if source.tree()?.directory.is_lost() {
            anyhow::bail!("--manifests {} cannot be read", root.display());
        }
        Ok((source, batch))
    }

    /// Waits for changes and reads them; may be empty.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Batch> {
        let mut pending = Pending::default();
        tokio::select! {
            () = sleep_until(self.compare_at) => {
                let tree = self.tree()?;
                pending.all = tree.directory.is_lost();
                pending.due = true;
            }
            event = self.event(&mut pending) => event?,
        }
        let last = Instant::now() + PATIENCE;
        while !pending.is_empty() {
            let quiet = (Instant::now() + QUIET).min(last);
            match timeout_at(quiet, self.event(&mut pending)).await {
                Ok(more) => more?,
                Err(_elapsed) => break,
            }
        }
        self.read(pending).await
    }

    /// Waits for an event and takes it in.
    async fn event(&mut self, pending: &mut Pending) -> anyhow::Result<()> {
        let event = self.events.next().await.context("the kernel tells of no more changes")??;
        let tree = self.tree()?;
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            pending.note(tree.directory.root(), event.mask, None);
        } else if let Some(dir) = tree.watched.paths.get(&event.wd) {
            pending.note(dir, event.mask, event.name.as_deref());
        }
        // Else the watch was given up while its events were under way.
        Ok(())
    }

    async fn read(&mut self, pending: Pending) -> anyhow::Result<Batch> {
        let mut tree = self.tree.take().context("the reader of manifests ended early")?;
        let compared = pending.all || pending.due;
        let read = move || {
            let batch = tree.directory.read(&pending, &mut tree.watched);
            (tree, batch)
        };
        let (tree, batch) = tokio::task::spawn_blocking(read).await.context("reading manifests")?;
        if compared {
            self.compare_at = Instant::now() + if tree.directory.is_lost() { SEARCH } else { COMPARE };
        }
        self.tree = Some(tree);
        Ok(batch)
    }

    fn tree(&self) -> anyhow::Result<&Tree> {
        self.tree.as_ref().context("the reader of manifests ended early")
    }
}

/// Which directory a watch stands for.
struct Watched {
    watches: Watches,
    paths: HashMap<WatchDescriptor, PathBuf>,
}

impl Watch for Watched {
    fn watch(&mut self, dir: &Path) -> io::Result<()> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let descriptor = self.watches.add(dir, mask)?;
        self.paths.insert(descriptor, dir.to_owned());
        Ok(())
    }

    fn forget(&mut self, dir: &Path) {
        let gone: Vec<_> =
            self.paths.iter().filter(|(_, path)| path.starts_with(dir)).map(|(wd, _)| wd.clone()).collect();
        for descriptor in gone {
            self.paths.remove(&descriptor);
            // The kernel has removed the watch itself when the directory is deleted.
            self.watches.remove(descriptor).ok();
        }
    }
}
