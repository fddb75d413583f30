//! What the kernel's events ask to be read again. Pure.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use inotify::EventMask;

use super::{is_hidden, is_manifest};

/// Files and directories to be read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    /// Watches may be lost or point elsewhere: everything is watched and compared anew.
    pub(super) all: bool,
    /// Nothing happened; the whole tree is compared for what events cannot tell.
    pub(super) due: bool,
    /// Directories whose files are to be compared with what is known.
    pub(super) trees: BTreeSet<PathBuf>,
    /// Directories that left their place: their watches are void.
    pub(super) left: BTreeSet<PathBuf>,
    pub(super) files: BTreeSet<PathBuf>,
    /// New files: read now if they cannot be in the middle of being written.
    pub(super) created: BTreeSet<PathBuf>,
}

impl Pending {
    /// Takes an event of the directory `dir` in.
    pub(super) fn note(&mut self, dir: &Path, mask: EventMask, name: Option<&OsStr>) {
        if mask.intersects(EventMask::Q_OVERFLOW) {
            self.all = true;
            return;
        }
        let Some(name) = name else {
            // The directory itself went; for any but the root its parent tells, too.
            self.all |= mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT);
            return;
        };
        let path = dir.join(name);
        if name.as_encoded_bytes().starts_with(b"..") {
            // Kubernetes publishes a new ConfigMap by renaming the link `..data`, to which all files lead.
            if !mask.contains(EventMask::ISDIR) {
                self.trees.insert(dir.to_owned());
            }
        } else if is_hidden(&path) {
        } else if mask.contains(EventMask::ISDIR) {
            if mask.intersects(EventMask::MOVED_FROM | EventMask::DELETE) {
                self.left.insert(path.clone());
            }
            self.trees.insert(path);
        } else if !is_manifest(&path) {
            // A link to a directory comes and goes like a file.
            if mask.intersects(
                EventMask::CREATE | EventMask::DELETE | EventMask::MOVED_FROM | EventMask::MOVED_TO,
            ) {
                self.trees.insert(path);
            }
        } else if mask.contains(EventMask::CREATE) {
            self.created.insert(path);
        } else {
            self.files.insert(path);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(events: &[(EventMask, &str)]) -> Pending {
        let mut pending = Pending::default();
        for (mask, name) in events {
            pending.note(Path::new("/m"), *mask, Some(OsStr::new(name)));
        }
        pending
    }

    #[test]
    fn editors_and_their_files_cost_nothing() {
        assert!(
            note(&[(EventMask::CLOSE_WRITE, ".a.yaml.swp"), (EventMask::CLOSE_WRITE, "a.yaml~")]).is_empty()
        );
        let pending = note(&[(EventMask::MOVED_FROM, "tmp-x.txt"), (EventMask::MOVED_TO, "a.yaml")]);
        assert_eq!(pending.files, [PathBuf::from("/m/a.yaml")].into());
    }

    #[test]
    fn a_new_config_map_is_read_as_a_whole() {
        let pending =
            note(&[(EventMask::CREATE | EventMask::ISDIR, "..2026"), (EventMask::MOVED_TO, "..data")]);
        assert_eq!(pending.trees, [PathBuf::from("/m")].into());
        assert!(!pending.all);
    }

    #[test]
    fn directories_come_and_go() {
        let pending = note(&[
            (EventMask::MOVED_FROM | EventMask::ISDIR, "a"),
            (EventMask::CREATE | EventMask::ISDIR, "b"),
        ]);
        assert_eq!(pending.trees, [PathBuf::from("/m/a"), PathBuf::from("/m/b")].into());
        assert_eq!(pending.left, [PathBuf::from("/m/a")].into());
    }

    #[test]
    fn lost_events_and_a_lost_root_mean_everything() {
        let mut pending = Pending::default();
        pending.note(Path::new("/m"), EventMask::DELETE_SELF, None);
        assert!(pending.all);
        let mut pending = Pending::default();
        pending.note(Path::new("/m"), EventMask::Q_OVERFLOW, None);
        assert!(pending.all);
    }
}
