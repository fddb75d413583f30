//! Which nodes have joined, on disk: a control plane that starts would otherwise announce their workloads as outside the
//! mesh until their agents are back, and peers would fall back to plaintext.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{identity::is_name, index::Joined};

/// After the name of a node whose Node resource was known.
const LISTED: &str = " listed";

/// A file with a node in each line.
pub(crate) struct Kept {
    file: PathBuf,
}

impl Kept {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { file: state_dir.join("joined-nodes") }
    }

    /// What was kept; nothing before the first time.
    ///
    /// # Errors
    /// When it cannot be read, or is not what was written: starting without it would send plaintext.
    pub(crate) fn load(&self) -> io::Result<Joined> {
        let text = match fs::read_to_string(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Joined::new()),
            text => text?,
        };
        let node = |line: &str| {
            let (name, listed) = match line.strip_suffix(LISTED) {
                Some(name) => (name, true),
                None => (line, false),
            };
            let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("{line:?} names no node"));
            is_name(name).then(|| (name.into(), listed)).ok_or_else(bad)
        };
        text.lines()
            .map(node)
            .collect::<io::Result<_>>()
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.file.display())))
    }

    /// Puts it in the place of what was kept.
    pub(crate) fn keep(&self, joined: &Joined) -> io::Result<()> {
        let line = |(name, listed): (&std::sync::Arc<str>, &bool)| {
            format!("{name}{}\n", if *listed { LISTED } else { "" })
        };
        let text: String = joined.iter().map(line).collect();
        let next = self.file.with_extension("next");
        fs::write(&next, text)?;
        // Else a loss of power might leave an empty file in its place.
        fs::File::open(&next)?.sync_all()?;
        fs::rename(next, &self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept::new(dir.path());
        assert!(kept.load().unwrap().is_empty());
        let joined = Joined::from([("node-a".into(), true), ("node-b".into(), false)]);
        kept.keep(&joined).unwrap();
        assert_eq!(kept.load().unwrap(), joined);
        kept.keep(&Joined::new()).unwrap();
        assert!(kept.load().unwrap().is_empty());
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for content in [&b"node-a\n\nnode-b\n"[..], b"node a\n", b"\xff\n"] {
            fs::write(dir.path().join("joined-nodes"), content).unwrap();
            Kept::new(dir.path()).load().unwrap_err();
        }
    }
}
