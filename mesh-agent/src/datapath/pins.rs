//! What is pinned, and where: `PIN/maps/NAME`, `PIN/links/PROGRAM` and, for the network namespaces of pods, `PIN/netns/COOKIE`.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use super::sys;

/// The folders under a pin path.
#[derive(Debug, Clone)]
pub struct Pins(PathBuf);

impl Pins {
    /// Makes the folders.
    pub fn create(pin_path: &Path) -> io::Result<Self> {
        let pins = Self(pin_path.to_owned());
        fs::create_dir_all(pins.0.join("maps"))?;
        fs::create_dir_all(pins.0.join("links"))?;
        fs::create_dir_all(pins.0.join("netns"))?;
        Ok(pins)
    }

    /// A map's pin.
    pub fn map(&self, name: &str) -> PathBuf {
        self.0.join("maps").join(name)
    }

    /// Where a map is pinned until it takes the place of one of another layout. (bpffs refuses dots in names.)
    pub fn next_map(&self, name: &str) -> PathBuf {
        self.0.join("maps").join(format!("{name}_next"))
    }

    /// Where the links of network namespaces are pinned, each under its cookie.
    pub fn namespaces(&self) -> PathBuf {
        self.0.join("netns")
    }

    /// A link's pin.
    pub fn link(&self, program: &str) -> PathBuf {
        self.0.join("links").join(program)
    }
}

/// The lock on a pin path that no agent uses, as long as it is held; `None` where there is nothing.
pub fn idle(pin_path: &Path) -> io::Result<Option<fs::File>> {
    let folder = match fs::File::open(pin_path) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(fs::TryLockError::WouldBlock) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, "an agent is running on it; stop that first"))
        }
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

/// Removes links first, so that no program runs on maps that go; says what it removed. When it returns, no program is in
/// force. What is not there is no error.
pub fn remove(pin_path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for folder in ["netns", "links", "maps"] {
        let folder = pin_path.join(folder);
        for entry in entries(&folder)? {
            if !folder.ends_with("maps") {
                sys::detach(sys::object(&entry)?.as_fd())?;
            }
            fs::remove_file(&entry)?;
            removed.push(entry);
        }
        remove_folder(&folder, &mut removed)?;
    }
    remove_folder(pin_path, &mut removed)?;
    Ok(removed)
}

pub(super) fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(list) => {
            let mut paths = list.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
            paths.sort();
            Ok(paths)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn remove_folder(folder: &Path, removed: &mut Vec<PathBuf>) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Ok(()) => {
            removed.push(folder.to_owned());
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
