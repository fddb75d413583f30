//! A network namespace for the current thread, by system calls alone: a virtual machine has no `ip` command.
#![expect(unsafe_code, reason = "unshare and interface flags have no safe interface in std")]

use std::io::Error;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

/// Moves the current thread, and those it starts later, into a new network namespace whose loopback interface is up.
pub fn enter_new() -> Result<()> {
    // SAFETY: takes flags and touches no memory; it changes this thread only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(Error::last_os_error()).context("cannot make a network namespace");
    }
    loopback_up().context("cannot bring the loopback interface up")
}

/// Brings the loopback interface of the current thread's namespace up.
pub fn loopback_up() -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid one, with an empty name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, letter) in request.ifr_name.iter_mut().zip(*b"lo") {
        *place = letter.cast_signed();
    }
    // SAFETY: the descriptor is open, and the request lives through both calls; the flags are the member in use.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) != 0 {
            return Err(Error::last_os_error().into());
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) != 0 {
            return Err(Error::last_os_error().into());
        }
    }
    Ok(())
}
