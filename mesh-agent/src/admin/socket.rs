//! The unix socket: for root only, and never taken from an agent that is alive.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Listens at `path`, mode 0600. What a dead agent left there is replaced; an agent that lives, or a file that is no
/// socket, is an error.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    free(path)?;
    // Under another name first, so that nobody can connect before the mode is set; the rename also replaces the stale one.
    let temporary = temporary(path);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)?;
    Ok(listener)
}

fn free(path: &Path) -> io::Result<()> {
    let taken = |what: &str| io::Error::new(io::ErrorKind::AddrInUse, format!("{} {what}", path.display()));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => return Err(taken("exists and is no socket")),
        Ok(_socket) => {}
    }
    match UnixStream::connect(path) {
        Ok(_alive) => Err(taken("belongs to an agent that is running")),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("~");
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::fixtures::Directory;

    #[tokio::test]
    async fn only_the_owner_may_use_it() {
        let directory = Directory::new();
        let path = directory.path().join("run/agent/admin.sock");
        let _listener = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_stale_one_is_replaced() {
        let directory = Directory::new();
        let path = directory.path().join("admin.sock");
        drop(bind(&path).unwrap());
        assert!(path.exists());
        let _listener = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_live_one_is_left_alone() {
        let directory = Directory::new();
        let path = directory.path().join("admin.sock");
        let listener = bind(&path).unwrap();
        let error = bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("an agent that is running"), "{error}");
        UnixStream::connect(&path).unwrap();
        drop(listener);
    }

    #[tokio::test]
    async fn a_file_of_somebody_is_left_alone() {
        let directory = Directory::new();
        let path = directory.path().join("admin.sock");
        fs::write(&path, "precious").unwrap();
        assert!(bind(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
