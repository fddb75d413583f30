//! The virtual machine's whole file system: a shell, the tester, and the libraries that the tester is linked with.
//!
//! The tester's shared libraries are copied along, instead of a static build: that would compile the agent and all of
//! its dependencies a second time.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::output;

/// The first process. `poweroff -f` because there is no init system to ask.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t cgroup2 none /sys/fs/cgroup
/bin/busybox mount -t bpf none /sys/fs/bpf
/bin/busybox mount -t tmpfs none /tmp
/bin/busybox uname -r
/bin/busybox insmod /lib/veth.ko
/bin/tester FILTER
/bin/busybox echo tester-exit-status $?
/bin/busybox poweroff -f
";

/// Writes the archive into `folder` and returns its path.
pub(crate) fn build(folder: &Path, tester: &Path, filter: &str) -> Result<PathBuf> {
    let root = folder.join("initramfs");
    if root.exists() {
        std::fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    for path in ["bin", "dev", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(path))
            .with_context(|| format!("cannot create {}", root.display()))?;
    }
    copy(Path::new("/bin/busybox"), &root.join("bin/busybox"))?;
    // Debug information would triple what the virtual machine has to unpack.
    output(Command::new("strip").arg("-o").arg(root.join("bin/tester")).arg(tester))?;
    for library in libraries(tester)? {
        let inside = root.join(library.strip_prefix("/").unwrap_or(&library));
        copy(&library, &inside)?;
    }
    module(&folder.join("root/lib/modules"), "veth", &root.join("lib"))?;
    let init = root.join("init");
    let filter: String = filter.chars().filter(|c| c.is_ascii_alphanumeric() || "_-:".contains(*c)).collect();
    std::fs::write(&init, INIT.replace("FILTER", &filter))
        .with_context(|| format!("cannot write {}", init.display()))?;
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", init.display()))?;
    let archive = folder.join("initramfs.cpio");
    let pack = "find . -print0 | cpio --null --create --format=newc --quiet --owner=0:0 >\"$0\"";
    output(Command::new("sh").args(["-c", pack]).arg(&archive).current_dir(&root))?;
    Ok(archive)
}

/// Copies a module of the kernel, whatever folder of its package holds it.
fn module(modules: &Path, name: &str, to: &Path) -> Result<()> {
    let found = output(Command::new("find").arg(modules).args(["-name", &format!("{name}.ko*")]))?;
    let found = found.lines().next().with_context(|| format!("{} has no {name}", modules.display()))?;
    let (from, plain) = (Path::new(found), to.join(format!("{name}.ko")));
    if from.extension().is_some_and(|extension| extension == "xz") {
        let unpack = "xz --decompress --stdout \"$0\" >\"$1\"";
        return output(Command::new("sh").args(["-c", unpack]).arg(from).arg(&plain)).map(drop);
    }
    copy(from, &plain)
}

/// What `ldd` lists, the loader included.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(Command::new("ldd").arg(program))?;
    Ok(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).with_context(context)?;
    }
    std::fs::copy(from, to).map(drop).with_context(context)
}
