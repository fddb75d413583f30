//! The calls of bpf(2) that aya does not offer: replacing the program of a pinned link, ending a link, and copying maps whose types are not
//! known at compile time.
#![expect(unsafe_code, reason = "system calls")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

#[repr(C)]
struct ObjGet {
    pathname: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at `path`.
pub(super) fn object(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjGet { pathname: path.as_ptr() as u64, fd: 0, flags: 0 };
    let fd = call(BPF_OBJ_GET, &attr)?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts `program` in the place of the link's program, without a moment between them. Since Linux 5.7.
pub(super) fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attr = LinkUpdate { link: raw(link), program: raw(program), flags: 0, old_program: 0 };
    call(BPF_LINK_UPDATE, &attr).map(|_| ())
}

/// Takes the link's program out of force before this returns; unpinning alone leaves it there for a moment. Since Linux 5.9.
pub(super) fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    call(BPF_LINK_DETACH, &raw(link)).map(|_| ())
}

/// The head of `struct bpf_link_info`, for cgroup links.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    cgroup: u64,
    attach: u32,
    padding_end: u32,
}

#[repr(C)]
struct Info {
    fd: u32,
    length: u32,
    info: u64,
}

/// Id of the cgroup that a link is attached to; 0 when that has been removed.
pub(super) fn cgroup_of(link: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = LinkInfo::default();
    let attr = Info { fd: raw(link), length: size_of::<LinkInfo>() as u32, info: (&raw mut info) as u64 };
    call(BPF_OBJ_GET_INFO_BY_FD, &attr)?;
    Ok(info.cgroup)
}

#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Access to a map by bytes; keys and values must have the map's sizes, values for each CPU one after the other.
pub(super) struct RawMap<'a> {
    /// The map.
    pub(super) fd: BorrowedFd<'a>,
    /// Bytes of a key.
    pub(super) key: usize,
    /// Bytes of a value as the system call moves it.
    pub(super) value: usize,
}

impl RawMap<'_> {
    /// The key after `key`, or the first.
    pub(super) fn next(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0; self.key];
        let from = match key {
            Some(key) => sized(key, self.key)?.as_ptr() as u64,
            None => 0,
        };
        match call(BPF_MAP_GET_NEXT_KEY, &self.element(from, next.as_mut_ptr() as u64)) {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value of `key`, if there is one.
    pub(super) fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value];
        let key = sized(key, self.key)?;
        match call(BPF_MAP_LOOKUP_ELEM, &self.element(key.as_ptr() as u64, value.as_mut_ptr() as u64)) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value of `key`.
    pub(super) fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.update(key, value, 0)
    }

    /// Sets the value of `key` unless it has one.
    pub(super) fn add(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        const BPF_NOEXIST: u64 = 1;
        match self.update(key, value, BPF_NOEXIST) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        let (key, value) = (sized(key, self.key)?, sized(value, self.value)?);
        let element = Element { flags, ..self.element(key.as_ptr() as u64, value.as_ptr() as u64) };
        call(BPF_MAP_UPDATE_ELEM, &element).map(|_| ())
    }

    fn element(&self, key: u64, value: u64) -> Element {
        Element { map: raw(self.fd), padding: 0, key, value, flags: 0 }
    }
}

/// The kernel reads and writes as many bytes as the map says, so a slice of another length must not get there.
fn sized(bytes: &[u8], size: usize) -> io::Result<&[u8]> {
    if bytes.len() == size {
        return Ok(bytes);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{} bytes where the map has {size}", bytes.len()),
    ))
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn call<T>(command: libc::c_long, attr: &T) -> io::Result<i32> {
    // SAFETY: `T` is the `repr(C)` head of `union bpf_attr` for this command and lives through the call, as does what it
    // points to; slices have the sizes that the map has.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *const T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
