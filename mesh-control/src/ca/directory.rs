//! The files of the authority. What belongs together is replaced together: new files are written beside the old ones,
//! then a mark says that all are there, then they are moved. A crash before the mark undoes, one after it completes.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, fchown},
    path::Path,
};

use super::{CERT, CHAIN, KEY, ROOTS};

/// Says that all files with the ending are complete.
const MARK: &str = ".complete";
const LOCK: &str = ".lock";
const ENDING: &str = ".next";
/// Deleted when the others are moved.
const GONE: &str = ".gone";
/// Larger files are not read.
const MAX_LENGTH: u64 = 4 << 20;

/// The files of an authority in Istio's layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) cert: String,
    pub(crate) key: String,
    pub(crate) chain: Option<String>,
    pub(crate) roots: String,
}

/// Reads the files; `None` when none of them is there.
pub(crate) fn read(dir: &Path) -> Result<Option<Files>, String> {
    let file = |name: &str| text(&dir.join(name));
    if dir.join(MARK).exists() {
        return Err(format!("{}: files are being replaced", dir.display()));
    }
    let (cert, key, chain, roots) = (file(CERT)?, file(KEY)?, file(CHAIN)?, file(ROOTS)?);
    if cert.is_none() && key.is_none() && chain.is_none() && roots.is_none() {
        return Ok(None);
    }
    let missing =
        |name: &str| format!("{}: is missing, while other files are there", dir.join(name).display());
    Ok(Some(Files {
        cert: cert.ok_or_else(|| missing(CERT))?,
        key: key.ok_or_else(|| missing(KEY))?,
        chain,
        roots: roots.ok_or_else(|| missing(ROOTS))?,
    }))
}

/// A file's text; `None` when it is not there.
pub(crate) fn text(path: &Path) -> Result<Option<String>, String> {
    let about = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(about(&error)),
    };
    let length = file.metadata().map_err(|error| about(&error))?.len();
    if length > MAX_LENGTH {
        return Err(about(&format!("longer than {MAX_LENGTH} bytes")));
    }
    let mut text = String::new();
    io::Read::read_to_string(&mut file, &mut text).map_err(|error| about(&error))?;
    Ok(Some(text))
}

/// Makes the directory if need be, and keeps others from changing it until the lock is dropped.
pub(crate) fn lock(dir: &Path) -> io::Result<File> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let file = match made(dir, LOCK, 0o600) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).open(dir.join(LOCK))?
        }
        file => file?,
    };
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(io::Error::new(ErrorKind::WouldBlock, "another command is changing these files"))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Replaces files together; `None` deletes. The caller holds the lock.
pub(crate) fn write(dir: &Path, files: &[(&'static str, Option<String>)]) -> io::Result<()> {
    for (name, text) in files {
        let ending = if text.is_some() { ENDING } else { GONE };
        // Certificates are public; whatever else may be in there is not.
        let mode = if name.ends_with("cert.pem") || name.ends_with("chain.pem") { 0o644 } else { 0o600 };
        let mut file = made(dir, &format!("{name}{ending}"), mode)?;
        file.write_all(text.as_deref().unwrap_or_default().as_bytes())?;
        file.sync_all()?;
    }
    made(dir, MARK, 0o600)?.sync_all()?;
    File::open(dir)?.sync_all()?;
    heal(dir)
}

/// A new file that belongs to whom the directory belongs: what root's `meshctl ca` makes, the control plane has to read. One that
/// is there already, or a link in its place, is never touched: the directory's owner may be nobody to be trusted by root.
fn made(dir: &Path, name: &str, mode: u32) -> io::Result<File> {
    let path = dir.join(name);
    let file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&path)?;
    let (ours, owner) = (file.metadata()?, fs::metadata(dir)?);
    let same = (ours.uid(), ours.gid()) == (owner.uid(), owner.gid());
    if same {
        return Ok(file);
    }
    let given = fchown(&file, Some(owner.uid()), Some(owner.gid()));
    // Who is not root can give nothing away; it makes what it reads itself.
    if ours.uid() != 0 && given.as_ref().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied) {
        return Ok(file);
    }
    given.map_err(|error| {
        let about = format!("{}: cannot be given to the directory's owner", path.display());
        io::Error::new(error.kind(), format!("{about} ({}:{}): {error}", owner.uid(), owner.gid()))
    })?;
    Ok(file)
}

/// Completes or undoes a replacement that was interrupted. The caller holds the lock.
pub(crate) fn heal(dir: &Path) -> io::Result<()> {
    let complete = dir.join(MARK).exists();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        match (name.strip_suffix(ENDING), name.strip_suffix(GONE)) {
            (Some(target), _) if complete => fs::rename(&path, dir.join(target))?,
            (_, Some(target)) if complete => {
                match fs::remove_file(dir.join(target)) {
                    Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
                fs::remove_file(&path)?;
            }
            (Some(_), _) | (_, Some(_)) => fs::remove_file(&path)?,
            (None, None) => {}
        }
    }
    File::open(dir)?.sync_all()?;
    if complete {
        fs::remove_file(dir.join(MARK))?;
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_for_the_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made/here");
        let _lock = lock(&dir).unwrap();
        write(&dir, &[(KEY, Some("k".into())), (CERT, Some("c".into()))]).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(KEY)), mode(&dir.join(CERT))), (0o700, 0o600, 0o644));
    }

    #[test]
    fn a_replacement_is_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, &[(KEY, Some("1".into())), (CERT, Some("1".into())), (CHAIN, Some("1".into()))]).unwrap();
        let held = |name: &str| fs::read_to_string(dir.join(name)).ok();
        // Ended before the mark: the old ones stay.
        fs::write(dir.join("ca-key.pem.next"), "2").unwrap();
        heal(dir).unwrap();
        assert_eq!((held(KEY), held("ca-key.pem.next")), (Some("1".into()), None));
        // Ended after it: all are moved, also those that were not yet.
        fs::write(dir.join("ca-key.pem.next"), "2").unwrap();
        fs::write(dir.join("cert-chain.pem.gone"), "").unwrap();
        fs::write(dir.join(MARK), "").unwrap();
        assert!(read(dir).is_err());
        heal(dir).unwrap();
        assert_eq!((held(KEY), held(CERT), held(CHAIN)), (Some("2".into()), Some("1".into()), None));
        assert!(!dir.join(MARK).exists());
    }

    #[test]
    fn one_changes_at_a_time_and_what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        assert_eq!(lock(dir.path()).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(first);
        lock(dir.path()).unwrap();
        assert_eq!(read(dir.path()), Ok(None));
        fs::write(dir.path().join(CERT), "c").unwrap();
        assert!(read(dir.path()).unwrap_err().contains("ca-key.pem: is missing"));
    }
}
