//! The few system calls that the standard library lacks. All unsafe code of the harness is here.
#![expect(unsafe_code, reason = "setns, unshare, prctl, mount and bpf have no safe wrapper in std")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

fn checked(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether this process may create namespaces and load kernel programs.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Moves the calling thread into a new, empty network namespace.
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: unshare takes no pointers; only the calling thread changes its namespace.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

/// Moves the calling thread into the network namespace behind `netns`.
pub fn enter_network(netns: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the borrow keeps the descriptor open for the length of the call.
    checked(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// Where a child starts: what [`start_in`] applies between fork and exec.
pub struct Place {
    /// An open network namespace.
    pub netns: File,
    /// The open `cgroup.procs` of a cgroup.
    pub cgroup_procs: Option<File>,
    /// The child outlives the thread that starts it.
    pub persistent: bool,
}

/// Makes `command` start inside `place`, and die with the thread that starts it unless it is persistent.
pub fn start_in(command: &mut Command, place: Place) {
    let parent = std::process::id();
    let enter = move || {
        enter_network(std::os::fd::AsFd::as_fd(&place.netns))?;
        if let Some(procs) = &place.cgroup_procs {
            write_all(procs, b"0")?;
        }
        if place.persistent {
            // SAFETY: setsid takes nothing; a fork's child is no group leader, so it succeeds.
            return checked(unsafe { libc::setsid() });
        }
        // SAFETY: PR_SET_PDEATHSIG takes a signal number by value.
        checked(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        // SAFETY: getppid has no preconditions.
        if unsafe { libc::getppid() } != parent.cast_signed() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls on descriptors that it owns;
    // it neither allocates nor takes locks.
    unsafe { command.pre_exec(enter) };
}

fn write_all(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    io::Write::write_all(&mut file, bytes)
}

/// Sends `signal` to one process.
pub fn kill(pid: u32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: kill takes its arguments by value; a positive pid names one process only.
    checked(unsafe { libc::kill(pid.cast_signed().max(1), signal) })
}

/// Lets a connection be reset when it is closed.
pub fn reset_on_close(connection: &std::net::TcpStream) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the pointer is to a linger of that length, which the kernel only reads.
    checked(unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(connection),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    })
}

/// Lets this process open as many files as it may at all.
pub fn raise_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to an rlimit that lives until the call returns.
    checked(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above; the kernel only reads it.
    checked(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })
}

/// Takes the exclusive lock on `file` unless someone else has it.
pub fn try_lock(file: &File) -> bool {
    // SAFETY: the descriptor is open for the length of the call.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Takes the exclusive lock on `file`, after whoever has it.
pub fn lock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call.
    checked(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) })
}

/// Mounts a file system of `kind` at `target`.
pub fn mount(kind: &str, target: &Path) -> io::Result<()> {
    let (kind, target) = (CString::new(kind)?, path(target)?);
    // SAFETY: all pointers are NUL-terminated strings that live until the call returns; data may be null.
    checked(unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) })
}

/// Makes `source` appear at `target` as well.
pub fn bind_mount(source: &Path, target: &Path) -> io::Result<()> {
    let (source, target) = (path(source)?, path(target)?);
    let none = std::ptr::null();
    // SAFETY: both paths are NUL-terminated and live until the call returns; type and data may be null.
    checked(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), none, libc::MS_BIND, none.cast()) })
}

/// Detaches what is mounted at `target`.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = path(target)?;
    // SAFETY: the path is NUL-terminated and lives until the call returns.
    checked(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) })
}

fn path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

/// `BPF_PROG_GET_FD_BY_ID` of bpf(2).
const PROGRAM_BY_ID: libc::c_int = 13;

/// Nanoseconds and runs of a kernel program so far, while `kernel.bpf_stats_enabled` is on.
pub fn program_time(id: u32) -> io::Result<(u64, u64)> {
    // The command reads an id, a next id and flags; the kernel takes zeros for the rest.
    time_of(&bpf(PROGRAM_BY_ID, &[id, 0, 0, 0])?)
}

/// A bpf(2) command that returns a descriptor.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<File> {
    // SAFETY: the pointer and the length describe `attributes`, which lives until the call returns, as does what it
    // points to: the callers keep it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

fn time_of(program: &File) -> io::Result<(u64, u64)> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse().ok())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no {name} in {info}")))
    };
    Ok((field("run_time_ns:")?, field("run_cnt:")?))
}

/// Where an [`EmptyProgram`] runs.
#[derive(Debug, Clone, Copy)]
pub enum Hook {
    /// `cgroup/connect4`
    Connect4,
    /// `sockops`
    SockOps,
}

/// A kernel program that does nothing, attached to a cgroup until it is dropped: its time is what the kernel's statistics
/// count when there is nothing to count.
#[derive(Debug)]
pub struct EmptyProgram {
    program: File,
    _link: File,
}

/// The attributes of `BPF_PROG_LOAD`, up to `expected_attach_type`.
#[repr(C)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 2],
    log_buffer: u64,
    version_and_flags: [u32; 2],
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

impl EmptyProgram {
    /// Loads one and attaches it to `cgroup`, beside what is attached there.
    pub fn attach(cgroup: &File, hook: Hook) -> io::Result<Self> {
        const PROG_LOAD: libc::c_int = 5;
        const LINK_CREATE: libc::c_int = 28;
        // r0 = 1; exit
        let instructions: [u64; 2] = [1 << 32 | 0xb7, 0x95];
        // The numbers of bpf_prog_type and bpf_attach_type.
        let (kind, attach) = match hook {
            Hook::Connect4 => (18, 10),
            Hook::SockOps => (13, 3),
        };
        let load = Load {
            kind,
            instruction_count: 2,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log: [0; 2],
            log_buffer: 0,
            version_and_flags: [0; 2],
            name: *b"bench_empty\0\0\0\0\0",
            interface: 0,
            attach,
        };
        let program = bpf(PROG_LOAD, &load)?;
        let link = bpf(LINK_CREATE, &[program.as_raw_fd(), cgroup.as_raw_fd(), attach.cast_signed(), 0])?;
        Ok(Self { program, _link: link })
    }

    /// Its nanoseconds and runs so far.
    pub fn time(&self) -> io::Result<(u64, u64)> {
        time_of(&self.program)
    }
}

/// The monotonic clock, the same for all processes.
pub fn monotonic_nanoseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives until the call returns; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Processor seconds that this process has used, user and system together.
pub fn own_cpu_seconds() -> f64 {
    // SAFETY: an all-zero rusage is a valid value, and getrusage overwrites it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
