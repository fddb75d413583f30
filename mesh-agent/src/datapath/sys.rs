//! The calls of bpf(2) that aya does not offer: replacing the program of a pinned link, ending a link, attaching one program in many
//! network namespaces, and copying maps whose types are not known at compile time. And the clock of the kernel programs.
#![expect(unsafe_code, reason = "system calls")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
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

/// Pins an object at `path`.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjGet { pathname: path.as_ptr() as u64, fd: raw(object), flags: 0 };
    call(BPF_OBJ_PIN, &attr).map(|_| ())
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
}

/// Puts an `sk_lookup` program in force in a network namespace. Since Linux 5.9.
pub(super) fn attach_lookup(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_SK_LOOKUP: u32 = 36;
    let attr = LinkCreate { program: raw(program), target: raw(netns), attach: BPF_SK_LOOKUP, flags: 0 };
    let fd = call(BPF_LINK_CREATE, &attr)?;
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

/// Whether the network namespace that a link is attached to is still there.
pub(super) fn has_netns(link: BorrowedFd<'_>) -> io::Result<bool> {
    // Where a cgroup link has its id, these have the inode number of their namespace, in four bytes; 0 when that has gone.
    Ok(cgroup_of(link)? as u32 != 0)
}

/// Cookie of the network namespace that the calling thread is in. Since Linux 5.14.
pub(super) fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: an open socket, and a buffer of the length that is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which is the clock of `bpf_ktime_get_ns`.
pub(super) fn monotonic_nanoseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid pointer; the clock exists on every kernel.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    if result != 0 {
        return 0;
    }
    now.tv_sec.unsigned_abs().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec.unsigned_abs())
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
