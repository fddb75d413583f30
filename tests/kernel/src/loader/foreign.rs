//! Maps as no agent of this version makes them, pinned where the agent looks.
#![expect(unsafe_code, reason = "aya makes maps of its own layouts only")]

use std::ffi::CString;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_OBJ_PIN: libc::c_long = 6;

/// The head of `union bpf_attr` for a new map.
#[repr(C)]
pub(super) struct Layout {
    /// `enum bpf_map_type`.
    pub(super) kind: u32,
    /// Bytes of a key.
    pub(super) key: u32,
    /// Bytes of a value.
    pub(super) value: u32,
    /// Most entries.
    pub(super) entries: u32,
}

#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Makes a map and pins it at `path`, in the place of what is there.
pub(super) fn pin(path: &Path, layout: &Layout) -> Result<()> {
    let map = call(BPF_MAP_CREATE, layout).context("cannot make a map")?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let attr = Pin { path: name.as_ptr() as u64, fd: map.as_raw_fd().cast_unsigned(), flags: 0 };
    call(BPF_OBJ_PIN, &attr).with_context(|| format!("cannot pin {}", path.display()))?;
    Ok(())
}

fn call<T>(command: libc::c_long, attr: &T) -> Result<i32> {
    // SAFETY: `T` is the `repr(C)` head of `union bpf_attr` for this command and lives through the call, as does what it
    // points to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(Error::last_os_error().into()) } else { Ok(i32::try_from(result)?) }
}
