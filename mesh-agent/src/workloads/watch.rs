//! Watches a cgroup tree by inotify, on a thread of its own: a pod's cgroup is known before its first process runs.
//!
//! Every event only says where to look; what is there decides. So doubled, late and lost events (a full queue makes the
//! kernel drop them, and the whole tree is looked at again) all end in the same state.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::{error, warn};

/// How often the tree is walked when not all of it can be watched.
const POLL: Duration = Duration::from_millis(250);

/// What happened in the tree. Paths are relative to its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupEvent {
    /// A cgroup is there, at once or in place of another one of that path.
    Appeared {
        /// Its id: the inode number of its directory.
        id: u64,
        /// Its path.
        path: PathBuf,
    },
    /// A cgroup is no longer there.
    Gone {
        /// Its path.
        path: PathBuf,
    },
}

/// How the watch fares.
#[derive(Debug, Default)]
pub struct WatchStats {
    overflows: AtomicU64,
    polls: AtomicU64,
    limited: AtomicBool,
}

impl WatchStats {
    /// How often the kernel dropped events, so that the tree was walked.
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }

    /// How often the tree was walked because not all of it can be watched.
    pub fn polls(&self) -> u64 {
        self.polls.load(Ordering::Relaxed)
    }

    /// Whether a part of the tree cannot be watched.
    pub fn limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }
}

/// A watch that began.
#[derive(Debug)]
pub struct Started {
    /// The cgroups that were there, parents before children. All that happens later comes as events.
    pub initial: Vec<CgroupEvent>,
    /// How it fares.
    pub stats: Arc<WatchStats>,
}

/// Begins to watch the tree under `root`. The thread ends when nobody receives the events any more.
pub fn start(root: &Path, events: mpsc::Sender<CgroupEvent>) -> io::Result<Started> {
    let inotify = Inotify::init().map_err(|error| match error.raw_os_error() {
        Some(libc::EMFILE) => io::Error::new(
            error.kind(),
            "too many inotify instances: raise fs.inotify.max_user_instances (sysctl)",
        ),
        _ => error,
    })?;
    if !fs::metadata(root)?.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::NotADirectory,
            format!("{} is no directory", root.display()),
        ));
    }
    let stats = Arc::new(WatchStats::default());
    let mut tree = Tree {
        root: root.to_owned(),
        inotify,
        by_watch: HashMap::new(),
        known: BTreeMap::new(),
        out: Vec::new(),
        stats: Arc::clone(&stats),
    };
    tree.walk();
    let initial = std::mem::take(&mut tree.out);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("cgroups".to_owned()).spawn(move || {
        if let Err(error) = runtime.block_on(follow(tree, &events)) {
            error!(%error, "the watch of the cgroup tree ended");
        }
    })?;
    Ok(Started { initial, stats })
}

async fn follow(tree: Tree, events: &mpsc::Sender<CgroupEvent>) -> io::Result<()> {
    let mut tree = register(tree)?;
    let mut buffer = vec![0; 64 << 10];
    let mut poll = interval_at(Instant::now() + POLL, POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let limited = tree.get_ref().stats.limited();
        tokio::select! {
            ready = tree.readable_mut() => {
                let mut ready = ready?;
                match ready.try_io(|tree| tree.get_mut().read(&mut buffer)) {
                    Ok(read) => read?,
                    Err(_would_block) => continue,
                }
            }
            _ = poll.tick(), if limited => {
                let tree = tree.get_mut();
                tree.stats.polls.fetch_add(1, Ordering::Relaxed);
                tree.walk();
            }
            () = events.closed() => return Ok(()),
        }
        for event in std::mem::take(&mut tree.get_mut().out) {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
}

#[expect(unsafe_code, reason = "tokio wants to be promised that the descriptor stays the same")]
fn register(tree: Tree) -> io::Result<AsyncFd<Tree>> {
    // SAFETY: `Tree` gives the descriptor of its `Inotify`, which owns it; nothing assigns that field or closes it before
    // `Tree` is dropped, and `AsyncFd` deregisters before it drops `Tree`.
    Ok(unsafe { AsyncFd::register(tree) }?)
}

/// What is known of the tree.
struct Tree {
    root: PathBuf,
    inotify: Inotify,
    by_watch: HashMap<WatchDescriptor, PathBuf>,
    /// By relative path; the root itself is the empty one. Sorted, so that a subtree is one range.
    known: BTreeMap<PathBuf, Known>,
    out: Vec<CgroupEvent>,
    stats: Arc<WatchStats>,
}

struct Known {
    id: u64,
    watch: Option<WatchDescriptor>,
}

impl std::os::fd::AsRawFd for Tree {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.inotify.as_raw_fd()
    }
}

impl Tree {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut look = Vec::new();
        let mut overflow = false;
        for event in self.inotify.read_events(buffer)? {
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                overflow = true;
            } else if event.mask.contains(EventMask::ISDIR) || event.mask.contains(EventMask::DELETE_SELF) {
                let Some(parent) = self.by_watch.get(&event.wd) else { continue };
                look.push(event.name.map_or_else(|| parent.clone(), |name| parent.join(name)));
            }
        }
        if overflow {
            warn!("the kernel dropped events of the cgroup tree; walking it");
            self.stats.overflows.fetch_add(1, Ordering::Relaxed);
            self.walk();
        } else {
            look.into_iter().for_each(|path| self.look(path));
        }
        Ok(())
    }

    /// Looks at the whole tree.
    fn walk(&mut self) {
        let gone: Vec<PathBuf> =
            self.known.keys().filter(|path| self.inode(path).is_none()).cloned().collect();
        gone.iter().rev().for_each(|path| self.forget(path));
        let mut pending = vec![PathBuf::new()];
        while let Some(path) = pending.pop() {
            self.look(path.clone());
            pending.extend(self.children(&path));
        }
    }

    /// Makes what is known of a directory, and all below a new one, equal to what is there.
    fn look(&mut self, path: PathBuf) {
        let mut pending = vec![path];
        while let Some(path) = pending.pop() {
            let id = self.inode(&path);
            let known = self.known.get(&path).map(|known| known.id);
            if known.is_some() && known != id {
                self.forget(&path);
            }
            let Some(id) = id else { continue };
            if known == Some(id) {
                continue;
            }
            // First the watch, then the children: one made in between is seen twice rather than never.
            let watch = self.watch(&path);
            if !path.as_os_str().is_empty() {
                self.out.push(CgroupEvent::Appeared { id, path: path.clone() });
            }
            pending.extend(self.children(&path));
            self.known.insert(path, Known { id, watch });
        }
    }

    fn watch(&mut self, path: &Path) -> Option<WatchDescriptor> {
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE
            | WatchMask::ONLYDIR;
        match self.inotify.watches().add(self.root.join(path), mask | WatchMask::DONT_FOLLOW) {
            Ok(watch) => {
                self.by_watch.insert(watch.clone(), path.to_owned());
                Some(watch)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let path = path.display();
                if self.stats.limited.swap(true, Ordering::Relaxed) {
                    return None;
                }
                if error.raw_os_error() == Some(libc::ENOSPC) {
                    error!(%path, "too many inotify watches: raise fs.inotify.max_user_watches (sysctl); polling until restart");
                } else {
                    error!(%path, %error, "cannot watch a cgroup; polling until restart");
                }
                None
            }
        }
    }

    /// Forgets a directory and all below it, the deepest first.
    fn forget(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self
            .known
            .range::<Path, _>((std::ops::Bound::Included(path), std::ops::Bound::Unbounded))
            .map(|(known, _)| known)
            .take_while(|known| known.starts_with(path))
            .cloned()
            .collect();
        for path in below.into_iter().rev() {
            if let Some(watch) = self.known.remove(&path).and_then(|known| known.watch) {
                self.by_watch.remove(&watch);
                // The kernel has dropped the watch of a removed directory already; only a moved one still has it.
                drop(self.inotify.watches().remove(watch));
            }
            if !path.as_os_str().is_empty() {
                self.out.push(CgroupEvent::Gone { path });
            }
        }
    }

    fn inode(&self, path: &Path) -> Option<u64> {
        let found = fs::symlink_metadata(self.root.join(path)).ok()?;
        found.is_dir().then(|| found.ino())
    }

    fn children(&self, path: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root.join(path)).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories.map(|entry| path.join(entry.file_name())).collect()
    }
}

#[cfg(test)]
mod tests;
