//! Reading a directory tree, and comparing it with what was read before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{Batch, Reading, is_hidden, is_manifest, pending::Pending};

/// Larger files are refused: they are not manifests.
const MAX_BYTES: u64 = 256 << 20;
/// Depth of directories; a link that leads back into its own tree ends here.
const MAX_DEPTH: usize = 16;

/// A file that nobody tells of may be in the middle of being written until it has rested for so long.
const UNWATCHED: Duration = Duration::from_secs(3);

/// Tells one content of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&fs::Metadata> for Stamp {
    fn from(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Stamp {
    /// Time since the last change; a file of the future counts as old.
    fn age(&self) -> Duration {
        let seconds = u64::try_from(self.changed.0).unwrap_or(0);
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        SystemTime::now().duration_since(changed).unwrap_or(Duration::MAX)
    }
}

/// Who is told of each directory before it is listed, so that no change after the listing is missed.
pub(super) trait Watch {
    fn watch(&mut self, dir: &Path) -> io::Result<()>;
    /// Directories at or below `dir` are no longer where they were.
    fn forget(&mut self, dir: &Path);
}

/// A directory of manifests, and what is known of it.
pub(super) struct Directory {
    root: PathBuf,
    known: BTreeMap<Arc<Path>, Stamp>,
    /// Directories that could not be read: what they held stays in force.
    failed: BTreeSet<Arc<Path>>,
    /// The root itself could not be read.
    lost: bool,
}

impl Directory {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, known: BTreeMap::new(), failed: BTreeSet::new(), lost: false }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The root itself cannot be read now.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Reads what `pending` asks for.
    pub(super) fn read(&mut self, pending: &Pending, watch: &mut impl Watch) -> Batch {
        let mut batch = BTreeMap::new();
        pending.left.iter().for_each(|dir| watch.forget(dir));
        if pending.all {
            let root = self.root.clone();
            watch.forget(&root);
            self.compare(&root, Duration::ZERO, watch, &mut batch);
        }
        if pending.due {
            let root = self.root.clone();
            self.compare(&root, UNWATCHED, watch, &mut batch);
        }
        for tree in &pending.trees {
            self.compare(tree, Duration::ZERO, watch, &mut batch);
        }
        for path in &pending.files {
            self.read_file(path.as_path().into(), &mut batch);
        }
        for path in &pending.created {
            // A plain new file is told again when its writer closes it; links have no writer.
            let whole = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_symlink() || m.nlink() > 1);
            if whole {
                self.read_file(path.as_path().into(), &mut batch);
            }
        }
        batch.into_iter().collect()
    }

    /// Reads whatever at or below `tree` is not as it was, and has been so for `settled`.
    fn compare(
        &mut self,
        tree: &Path,
        settled: Duration,
        watch: &mut impl Watch,
        batch: &mut BTreeMap<Arc<Path>, Reading>,
    ) {
        let mut found = Found::default();
        found.walk(tree, tree == self.root, MAX_DEPTH, watch);
        let below = |path: &&Arc<Path>| path.starts_with(tree);
        let missing: Vec<_> = self
            .known
            .keys()
            .filter(below)
            .filter(|path| !found.files.contains_key(*path))
            .cloned()
            .collect();
        for path in missing {
            if !found.failed.iter().any(|(dir, _)| path.starts_with(dir)) {
                self.known.remove(&path);
                batch.insert(path, Reading::Gone);
            }
        }
        if tree == self.root {
            self.lost = found.failed.iter().any(|(dir, _)| **dir == *tree);
        }
        let healed: Vec<_> = self.failed.iter().filter(below).cloned().collect();
        for dir in healed {
            self.failed.remove(&dir);
            batch.insert(dir, Reading::Gone);
        }
        for (dir, reason) in found.failed.into_iter().chain(found.unwatched) {
            self.failed.insert(Arc::clone(&dir));
            batch.insert(dir, Reading::Unreadable(reason));
        }
        for (path, stamp) in found.files {
            if self.known.get(&path) != Some(&stamp) && stamp.age() >= settled {
                self.read_file(path, batch);
            }
        }
    }

    fn read_file(&mut self, path: Arc<Path>, batch: &mut BTreeMap<Arc<Path>, Reading>) {
        // The stamp is taken first: a change while reading then shows at the next comparison.
        let reading = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() || is_special(&metadata) => return,
            Ok(metadata) => {
                self.known.insert(Arc::clone(&path), Stamp::from(&metadata));
                if metadata.len() > MAX_BYTES {
                    Reading::Unreadable(format!("is larger than {} MiB", MAX_BYTES >> 20))
                } else {
                    match fs::read(&path).map(String::from_utf8) {
                        Ok(Ok(text)) => Reading::Text(text),
                        Ok(Err(error)) => {
                            Reading::Unreadable(format!("is not text in UTF-8: {}", error.utf8_error()))
                        }
                        Err(error) => self.unreadable(&path, &error),
                    }
                }
            }
            Err(error) => self.unreadable(&path, &error),
        };
        batch.insert(path, reading);
    }

    fn unreadable(&mut self, path: &Path, error: &io::Error) -> Reading {
        if error.kind() == io::ErrorKind::NotFound {
            self.known.remove(path);
            Reading::Gone
        } else {
            Reading::Unreadable(format!("cannot be read: {error}"))
        }
    }
}

/// Pipes and devices would block their reader.
fn is_special(metadata: &fs::Metadata) -> bool {
    let kind = metadata.file_type();
    kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device()
}

/// What a walk found.
#[derive(Default)]
struct Found {
    files: BTreeMap<Arc<Path>, Stamp>,
    /// Directories that could not be listed, with the reason.
    failed: Vec<(Arc<Path>, String)>,
    /// Directories that were listed, but cannot be watched.
    unwatched: Vec<(Arc<Path>, String)>,
}

impl Found {
    fn walk(&mut self, dir: &Path, is_root: bool, depth: usize, watch: &mut impl Watch) {
        // Before the listing: what changes in between is then told twice rather than not at all.
        let watched = watch.watch(dir);
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error)
                if !is_root
                    && matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                return;
            }
            Err(error) => {
                let reason = format!("the directory cannot be read: {error}; what it held stays in force");
                self.failed.push((dir.into(), reason));
                return;
            }
        };
        if let Err(error) = watched {
            let reason = format!("the directory cannot be watched: {error}; changes are found late");
            self.unwatched.push((dir.into(), reason));
        }
        for entry in entries {
            let path = match entry {
                Ok(entry) => entry.path(),
                Err(error) => {
                    self.failed.push((dir.into(), format!("the directory cannot be listed: {error}")));
                    return;
                }
            };
            if is_hidden(&path) {
                continue;
            }
            // Follows links; one that leads nowhere is no file.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() && depth > 0 {
                self.walk(&path, false, depth - 1, watch);
            } else if metadata.is_file() && is_manifest(&path) {
                self.files.insert(path.into(), Stamp::from(&metadata));
            }
        }
    }
}
