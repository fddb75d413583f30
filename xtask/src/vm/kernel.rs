//! Debian's cloud kernels: found by pattern because each version is superseded, kept in the target folder.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{output, timed};
use crate::{debian, paths};

/// An unpacked kernel.
pub(crate) struct Kernel {
    pub(crate) package: String,
    pub(crate) folder: PathBuf,
    /// The bootable file.
    pub(crate) image: PathBuf,
}

/// The newest kernel of `series` that Debian offers here; one fetched earlier if Debian cannot be asked.
pub(crate) fn fetch(series: &str) -> Result<Kernel> {
    let cache = paths::own_target().join("vm");
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let package = match newest(&offered(series)?) {
        Some(package) => package,
        None => {
            debian::update()?;
            newest(&offered(series)?).or_else(|| newest(&cached(&cache, series))).with_context(|| {
                format!("this system's package lists have no linux-image-{series}.*-cloud-amd64")
            })?
        }
    };
    let folder = cache.join(&package);
    if !folder.join("complete").exists() {
        let fetched = timed(&format!("fetching {package}"), || unpack(&package, &cache, &folder));
        if let Err(error) = fetched {
            // No network, or the version is gone: an older one of the series is still a fair test, and is named.
            let Some(older) = newest(&cached(&cache, series)) else { return Err(error) };
            println!("xtask: {error:#}; using {older}");
            return open(older, &cache);
        }
    }
    open(package, &cache)
}

fn open(package: String, cache: &Path) -> Result<Kernel> {
    let folder = cache.join(&package);
    let boot = folder.join("root/boot");
    let files = std::fs::read_dir(&boot).with_context(|| format!("cannot read {}", boot.display()))?;
    let names = files.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let mut images = names
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")));
    let image = images.next().with_context(|| format!("{package} has no vmlinuz"))?;
    Ok(Kernel { package, folder, image })
}

fn offered(series: &str) -> Result<Vec<String>> {
    let pattern = format!("^linux-image-{}\\.[0-9].*-cloud-amd64$", series.replace('.', "\\."));
    let found = output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    Ok(found.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
}

fn cached(cache: &Path, series: &str) -> Vec<String> {
    let prefix = format!("linux-image-{series}.");
    let folders = std::fs::read_dir(cache).into_iter().flatten().flatten();
    let complete = folders.filter(|entry| entry.path().join("complete").exists());
    let names = complete.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&prefix)).collect()
}

fn unpack(package: &str, cache: &Path, folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let root = folder.join("root");
    std::fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    let download =
        || output(Command::new("apt-get").args(["download", "--quiet", package]).current_dir(folder));
    download().or_else(|_stale| debian::update().and_then(|()| download()))?;
    let files = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut archives =
        files.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "deb"));
    let Some(archive) = archives.next() else {
        bail!("apt-get download left nothing in {}", cache.display())
    };
    output(Command::new("dpkg").arg("--extract").arg(&archive).arg(&root))?;
    std::fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
    std::fs::write(folder.join("complete"), "")
        .with_context(|| format!("cannot write in {}", folder.display()))
}

fn newest(packages: &[String]) -> Option<String> {
    packages.iter().max_by(|left, right| by_number(left, right)).cloned()
}

/// Compares names with the numbers in them taken as numbers.
fn by_number(left: &str, right: &str) -> Ordering {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    numbers(left).cmp(&numbers(right)).then_with(|| left.cmp(right))
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn the_newest_is_by_number_not_by_letter() {
        let names = ["linux-image-6.12.99+deb12-cloud-amd64", "linux-image-6.12.117+deb12-cloud-amd64"];
        assert_eq!(newest(&names.map(str::to_owned)).as_deref(), Some(names[1]));
        let names = ["linux-image-6.1.0-56-cloud-amd64", "linux-image-6.1.0-9-cloud-amd64"];
        assert_eq!(newest(&names.map(str::to_owned)).as_deref(), Some(names[0]));
    }
}
