//! Changing an authority that was made here, on its files; a running control plane takes them into force by itself.
//!
//! A new root takes three steps, so that at no time a certificate is in use whose root somebody lacks: the new root is
//! trusted ([`add_root`]), then it signs ([`use_root`]), then the old one is no longer trusted ([`drop_roots`]).
//! Between the steps every agent must have renewed its certificates, so each step refuses to come too early.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};

use super::{
    Authority, CERT, CHAIN, Files, KEY, NEW_ROOT, NEW_ROOT_KEY, ROOT_KEY, ROOTS,
    authority::{certificates, not_before, pem},
    create::{NamedFiles, Pair, issuer, root},
    directory::{heal, lock, read, text, write},
};

/// A new issuing certificate, under the same root.
///
/// # Errors
/// When the key of the root is not there, or files cannot be read or written.
pub fn new_issuer(dir: &Path, now: SystemTime) -> anyhow::Result<()> {
    change(dir, now, |files| {
        let root = signing_root(dir, files)?;
        let issuer = issuer(&root, now)?;
        Ok(vec![(KEY, Some(issuer.key)), (CHAIN, Some(issuer.cert.clone())), (CERT, Some(issuer.cert))])
    })
}

/// Step one: a new root is made and trusted, but signs nothing yet.
///
/// # Errors
/// When a new root is there already, or files cannot be read or written.
pub fn add_root(dir: &Path, now: SystemTime) -> anyhow::Result<()> {
    change(dir, now, |files| {
        ensure!(!dir.join(NEW_ROOT).exists(), "{NEW_ROOT}: a new root is already trusted; let it sign next");
        let new = root(now)?;
        Ok(vec![
            (NEW_ROOT_KEY, Some(new.key)),
            (ROOTS, Some(format!("{}\n{}", files.roots.trim_end(), new.cert))),
            (NEW_ROOT, Some(new.cert)),
        ])
    })
}

/// Step two: the new root signs a new issuing certificate. `wait` is how long agents keep certificates.
///
/// # Errors
/// When step one was not taken, or less than `wait` ago.
pub fn use_root(dir: &Path, wait: Duration, now: SystemTime) -> anyhow::Result<()> {
    change(dir, now, |_| {
        let file = |name| text(&dir.join(name)).map_err(anyhow::Error::msg);
        let missing = "is missing: add a new root first";
        let new = Pair {
            cert: file(NEW_ROOT)?.with_context(|| format!("{NEW_ROOT}: {missing}"))?,
            key: file(NEW_ROOT_KEY)?.with_context(|| format!("{NEW_ROOT_KEY}: {missing}"))?,
        };
        waited(NEW_ROOT, &new.cert, wait, now)?;
        let issuer = issuer(&new, now)?;
        Ok(vec![
            (ROOT_KEY, Some(new.key)),
            (KEY, Some(issuer.key)),
            (CHAIN, Some(issuer.cert.clone())),
            (CERT, Some(issuer.cert)),
            (NEW_ROOT, None),
            (NEW_ROOT_KEY, None),
        ])
    })
}

/// Step three: only the root that signs is still trusted. `wait` is how long agents keep certificates.
///
/// # Errors
/// When the issuing certificate is younger than `wait`, so that certificates of an old root may be in use.
pub fn drop_roots(dir: &Path, wait: Duration, now: SystemTime) -> anyhow::Result<()> {
    change(dir, now, |files| {
        ensure!(
            !dir.join(NEW_ROOT).exists(),
            "{NEW_ROOT}: the new root does not sign yet; let it sign first"
        );
        waited(CERT, &files.cert, wait, now)?;
        let root = signing_root(dir, files)?;
        Ok(vec![(ROOTS, Some(root.cert))])
    })
}

/// Makes a change that leaves an authority in good order, or none.
fn change(
    dir: &Path,
    now: SystemTime,
    make: impl FnOnce(&Files) -> anyhow::Result<NamedFiles>,
) -> anyhow::Result<()> {
    let about = || dir.display().to_string();
    ensure!(dir.is_dir(), "{} is not a directory", dir.display());
    let lock = lock(dir).with_context(about)?;
    heal(dir).with_context(about)?;
    let mut files =
        read(dir).map_err(anyhow::Error::msg)?.with_context(|| format!("{}: holds no authority", about()))?;
    let new = make(&files).with_context(about)?;
    for (name, text) in &new {
        match (*name, text) {
            (CERT, Some(text)) => files.cert.clone_from(text),
            (KEY, Some(text)) => files.key.clone_from(text),
            (CHAIN, text) => files.chain.clone_from(text),
            (ROOTS, Some(text)) => files.roots.clone_from(text),
            _ => {}
        }
    }
    Authority::load(&files, now).with_context(about)?;
    write(dir, &new).with_context(about)?;
    drop(lock);
    Ok(())
}

/// The root whose key is in the directory.
fn signing_root(dir: &Path, files: &Files) -> anyhow::Result<Pair> {
    let key = text(&dir.join(ROOT_KEY)).map_err(anyhow::Error::msg)?;
    let key = key.with_context(|| format!("{ROOT_KEY}: is missing; without it only its owner can sign"))?;
    let public = rcgen::KeyPair::from_pem(&key).with_context(|| ROOT_KEY)?;
    let public = rcgen::PublicKeyData::subject_public_key_info(&public);
    let mut roots = certificates(ROOTS, &files.roots)?.into_iter();
    let cert = roots
        .find(|root| root.windows(public.len()).any(|window| window == public))
        .with_context(|| format!("{ROOT_KEY}: is the key of no certificate in {ROOTS}"))?;
    Ok(Pair { cert: pem(&cert), key })
}

fn waited(file: &'static str, cert: &str, wait: Duration, now: SystemTime) -> anyhow::Result<()> {
    let cert = certificates(file, cert)?.remove(0);
    let made = not_before(&cert).with_context(|| format!("{file}: has no time"))? + super::create::DAY;
    let age = now.duration_since(made).unwrap_or_default();
    ensure!(
        age >= wait,
        "{file} is {} s old: wait until it is {} s, when all agents have renewed their certificates",
        age.as_secs(),
        wait.as_secs()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn authority(dir: &Path, now: SystemTime) -> Authority {
        Authority::load(&read(dir).unwrap().unwrap(), now).unwrap()
    }

    #[test]
    fn a_root_is_replaced_in_three_steps_none_of_which_comes_early() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, start) = (dir.path(), SystemTime::now());
        write(dir, &super::super::create_first(start).unwrap()).unwrap();
        let old = read(dir).unwrap().unwrap();
        assert!(
            use_root(dir, HOUR, start).unwrap_err().root_cause().to_string().contains("add a new root first")
        );

        add_root(dir, start).unwrap();
        assert_eq!((authority(dir, start).roots(), &read(dir).unwrap().unwrap().cert), (2, &old.cert));
        assert!(add_root(dir, start).is_err());
        assert!(use_root(dir, HOUR, start + HOUR / 2).is_err());
        assert!(drop_roots(dir, HOUR, start + HOUR * 2).is_err());

        let signs = start + HOUR + Duration::from_secs(2);
        use_root(dir, HOUR, signs).unwrap();
        assert_eq!(authority(dir, signs).roots(), 2);
        assert_ne!(read(dir).unwrap().unwrap().cert, old.cert);
        assert!(drop_roots(dir, HOUR, signs + HOUR / 2).is_err());

        let dropped = signs + HOUR + Duration::from_secs(2);
        drop_roots(dir, HOUR, dropped).unwrap();
        assert_eq!(authority(dir, dropped).roots(), 1);
        assert!(!read(dir).unwrap().unwrap().roots.contains(old.roots.trim()));
        new_issuer(dir, dropped).unwrap();
        authority(dir, dropped);
    }

    #[test]
    fn what_root_writes_belongs_to_whom_the_directory_belongs() {
        use std::os::unix::fs::{MetadataExt as _, chown};
        let made = tempfile::tempdir().unwrap();
        let dir = &made.path().join("ca");
        std::fs::create_dir(dir).unwrap();
        if chown(dir, Some(12_345), Some(12_346)).is_err() {
            return eprintln!("skipped: giving files away needs root");
        }
        let start = SystemTime::now();
        let belongs = |step: &str| {
            for entry in std::fs::read_dir(dir).unwrap() {
                let (path, of) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
                assert_eq!((of.uid(), of.gid()), (12_345, 12_346), "{} after {step}", path.display());
            }
        };
        write(dir, &super::super::create_first(start).unwrap()).unwrap();
        belongs("the start");
        add_root(dir, start).unwrap();
        belongs("add-root");
        use_root(dir, Duration::ZERO, start).unwrap();
        belongs("use-root");
        drop_roots(dir, Duration::ZERO, start).unwrap();
        belongs("drop-roots");
        new_issuer(dir, start).unwrap();
        belongs("new-issuer");
    }

    #[test]
    fn without_the_key_of_the_root_nothing_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        write(dir.path(), &super::super::create_first(now).unwrap()).unwrap();
        std::fs::remove_file(dir.path().join(ROOT_KEY)).unwrap();
        let before = read(dir.path());
        assert!(
            format!("{:#}", new_issuer(dir.path(), now).unwrap_err()).contains("root-key.pem: is missing")
        );
        assert_eq!(read(dir.path()), before);
    }
}
