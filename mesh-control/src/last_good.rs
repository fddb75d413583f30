//! The last good content of each manifest, on disk: a control plane that starts while a manifest is invalid or cannot be read
//! serves what that last held, as one that had been running would.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::warn;
use xxhash_rust::xxh3::xxh3_128;

use crate::source::{Batch, Reading};

/// Extension of a copy that is being written.
const UNFINISHED: &str = "next";

/// A directory with a file for each manifest: a comment that names the manifest, then its content.
pub(crate) struct LastGood {
    dir: PathBuf,
}

impl LastGood {
    /// Makes the directory below `state_dir` if need be.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join("manifests");
        // Manifests may hold what not everybody on the machine may read.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir })
    }

    /// What to take in before `first`, the first reading of all manifests: content that is no longer what its manifest holds,
    /// while the manifest, or a directory above it that cannot be read, is still there. What belongs to none is removed.
    pub(crate) fn before(&self, first: &Batch) -> io::Result<Batch> {
        let readings: BTreeMap<&Path, &Reading> =
            first.iter().map(|(path, reading)| (&**path, reading)).collect();
        let mut earlier = Batch::new();
        for entry in fs::read_dir(&self.dir)? {
            let copy = entry?.path();
            if copy.extension().is_some_and(|extension| extension == UNFINISHED) {
                // Whoever wrote it was ended meanwhile; it may be cut short, and still read like a manifest.
                fs::remove_file(&copy)?;
                continue;
            }
            let Some((manifest, text)) = read(&copy)? else {
                warn!(file = %copy.display(), "not a copy of a manifest; left alone");
                continue;
            };
            let unreadable = |path: &Path| matches!(readings.get(path), Some(Reading::Unreadable(_)));
            match readings.get(&*manifest) {
                Some(Reading::Text(now)) if *now == text => {}
                Some(Reading::Text(_) | Reading::Unreadable(_)) => {
                    earlier.push((manifest, Reading::Text(text)))
                }
                Some(Reading::Gone) | None if manifest.ancestors().skip(1).any(unreadable) => {
                    earlier.push((manifest, Reading::Text(text)));
                }
                Some(Reading::Gone) | None => fs::remove_file(&copy)?,
            }
        }
        Ok(earlier)
    }

    /// Keeps good content.
    pub(crate) fn keep(&self, manifest: &Path, text: &str) -> io::Result<()> {
        let Some(name) = manifest.to_str().filter(|name| !name.contains('\n')) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its path is not one line of UTF-8"));
        };
        let (copy, content) = (self.copy(manifest), format!("# {name}\n{text}"));
        if fs::read(&copy).is_ok_and(|kept| kept == content.as_bytes()) {
            return Ok(());
        }
        // A reader meets the old content or the new one; after a loss of power perhaps neither, and then there is no copy.
        let next = copy.with_extension(UNFINISHED);
        fs::write(&next, content)?;
        fs::rename(next, copy)
    }

    /// Forgets a manifest that was withdrawn.
    pub(crate) fn forget(&self, manifest: &Path) -> io::Result<()> {
        match fs::remove_file(self.copy(manifest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn copy(&self, manifest: &Path) -> PathBuf {
        self.dir.join(format!("{:032x}.yaml", xxh3_128(manifest.as_os_str().as_encoded_bytes())))
    }
}

/// The manifest that a copy is of, and its content; `None` if it is no copy.
fn read(copy: &Path) -> io::Result<Option<(Arc<Path>, String)>> {
    let Ok(content) = String::from_utf8(fs::read(copy)?) else { return Ok(None) };
    let parts = content.split_once('\n').and_then(|(name, text)| Some((name.strip_prefix("# ")?, text)));
    Ok(parts.map(|(name, text)| (Arc::from(Path::new(name)), text.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &str, text: &str) -> (Arc<Path>, Reading) {
        (Arc::from(Path::new(path)), Reading::Text(text.to_owned()))
    }

    fn kept() -> (tempfile::TempDir, LastGood) {
        let dir = tempfile::tempdir().unwrap();
        let kept = LastGood::open(dir.path()).unwrap();
        for name in ["/m/same", "/m/changed", "/m/lost", "/m/sub/hidden", "/m/gone"] {
            kept.keep(Path::new(name), "old").unwrap();
        }
        (dir, kept)
    }

    fn first() -> Batch {
        let unreadable = |path: &str| (Arc::from(Path::new(path)), Reading::Unreadable("why".to_owned()));
        vec![text("/m/same", "old"), text("/m/changed", "new"), unreadable("/m/lost"), unreadable("/m/sub")]
    }

    #[test]
    fn what_is_no_longer_readable_as_it_was_comes_first() {
        let (_dir, kept) = kept();
        let mut names: Vec<_> = kept.before(&first()).unwrap().into_iter().map(|(path, _)| path).collect();
        names.sort();
        assert_eq!(names, ["/m/changed", "/m/lost", "/m/sub/hidden"].map(|name| Arc::from(Path::new(name))));
    }

    #[test]
    fn what_was_withdrawn_is_forgotten() {
        let (dir, kept) = kept();
        kept.before(&first()).unwrap();
        kept.forget(Path::new("/m/changed")).unwrap();
        kept.forget(Path::new("/m/never")).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("manifests")).unwrap().count(), 3);
    }

    #[test]
    fn a_copy_that_was_not_finished_is_none() {
        let (_dir, kept) = kept();
        let cut = kept.copy(Path::new("/m/lost")).with_extension(UNFINISHED);
        fs::write(&cut, "# /m/lost\ncut").unwrap();
        let earlier = kept.before(&first()).unwrap();
        assert!(
            earlier.iter().all(|(_, reading)| *reading == Reading::Text("old".to_owned())),
            "{earlier:?}"
        );
        assert!(!cut.exists());
    }

    #[test]
    fn strange_files_and_names_harm_nothing() {
        let (dir, kept) = kept();
        fs::write(dir.path().join("manifests/x.yaml"), [0xff, 0xfe]).unwrap();
        fs::write(dir.path().join("manifests/y.yaml"), "no comment").unwrap();
        assert_eq!(kept.before(&first()).unwrap().len(), 3);
        kept.keep(Path::new("/m/two\nlines"), "text").unwrap_err();
    }
}
