//! Two network namespaces joined by a cable (veth), by netlink alone: a virtual machine has no `ip` command.
#![expect(unsafe_code, reason = "netlink has no safe interface in std")]

use std::fs::File;
use std::io::Error;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};

use crate::namespace;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_F_NODAD: u8 = 2;

/// The end of the cable where the test runs.
pub const HERE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// As above, IPv6.
pub const HERE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
/// The other end.
pub const THERE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
/// As above, IPv6.
pub const THERE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));
/// A second address of the other end.
pub const ALSO_THERE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 3));

/// The network namespace at the other end.
pub struct There(File);

impl There {
    /// Makes one, joined with the current thread's.
    pub fn join() -> Result<Self> {
        let there = within(None, || {
            namespace::enter_new()?;
            current()
        })?;
        cable(&there).context("cannot make a veth pair (is the kernel's module there?)")?;
        addresses("here0", &[HERE4, HERE6])?;
        let there = Self(there);
        there.run(|| addresses("there0", &[THERE4, ALSO_THERE4, THERE6]))?;
        Ok(there)
    }

    /// The namespace.
    pub fn namespace(&self) -> &File {
        &self.0
    }

    /// Does something at the other end. Sockets made there stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(Some(&self.0), work)
    }
}

/// The current thread's network namespace.
pub fn current() -> Result<File> {
    File::open("/proc/thread-self/ns/net").context("cannot open this thread's network namespace")
}

fn within<T: Send>(namespace: Option<&File>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Some(file) = namespace {
                // SAFETY: an open descriptor; it changes this thread only, which ends below.
                if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(Error::last_os_error()).context("cannot enter a network namespace");
                }
            }
            work()
        });
        thread.join().map_err(|_panic| anyhow::anyhow!("the thread of a namespace panicked"))?
    })
}

fn cable(there: &File) -> std::io::Result<()> {
    let fd = there.as_raw_fd().to_ne_bytes();
    let peer =
        [interface(0, 0), attribute(IFLA_IFNAME, b"there0\0"), attribute(IFLA_NET_NS_FD, &fd)].concat();
    let info =
        [attribute(IFLA_INFO_KIND, b"veth\0"), attribute(IFLA_INFO_DATA, &attribute(VETH_INFO_PEER, &peer))]
            .concat();
    let body =
        [interface(0, 0), attribute(IFLA_IFNAME, b"here0\0"), attribute(IFLA_LINKINFO, &info)].concat();
    request(RTM_NEWLINK, NLM_F_CREATE, &body)
}

fn addresses(name: &str, addresses: &[IpAddr]) -> Result<()> {
    let index = index_of(name)?;
    let up = libc::IFF_UP as u32;
    request(RTM_NEWLINK, 0, &interface(index, up)).with_context(|| format!("cannot bring {name} up"))?;
    for address in addresses {
        let (family, prefix, bytes) = match address {
            IpAddr::V4(v4) => (libc::AF_INET, 24u8, v4.octets().to_vec()),
            IpAddr::V6(v6) => (libc::AF_INET6, 64u8, v6.octets().to_vec()),
        };
        // struct ifaddrmsg
        let mut body = vec![u8::try_from(family)?, prefix, IFA_F_NODAD, 0];
        body.extend(index.to_ne_bytes());
        body.extend(attribute(IFA_LOCAL, &bytes));
        body.extend(attribute(IFA_ADDRESS, &bytes));
        request(RTM_NEWADDR, NLM_F_CREATE, &body)
            .with_context(|| format!("cannot add {address} to {name}"))?;
    }
    Ok(())
}

fn index_of(name: &str) -> Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a string with its NUL.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(Error::last_os_error()).context("no such interface"),
        index => Ok(index),
    }
}

/// struct ifinfomsg; flags are set.
fn interface(index: u32, flags: u32) -> Vec<u8> {
    let mut bytes = vec![0u8; 4];
    bytes.extend(index.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// Sends one request and reads its acknowledgement.
fn request(kind: u16, flags: u16, body: &[u8]) -> std::io::Result<()> {
    const HEADER: usize = 16;
    // SAFETY: takes numbers; the descriptor is ours alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE);
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let length = u32::try_from(HEADER + body.len()).map_err(Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    let mut answer = [0u8; 4096];
    // SAFETY: buffers with their lengths; the kernel is the default peer of a netlink socket.
    let received = unsafe {
        let fd = socket.as_raw_fd();
        if libc::send(fd, message.as_ptr().cast(), message.len(), 0) < 0 {
            return Err(Error::last_os_error());
        }
        libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    if received < (HEADER + size_of::<i32>()) as isize {
        return Err(Error::last_os_error());
    }
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if code == 0 { Ok(()) } else { Err(Error::from_raw_os_error(-code)) }
}

/// The cookie of the current thread's network namespace.
pub fn cookie() -> Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: an open socket, and a buffer with its length.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &raw mut length)
    };
    if result != 0 || cookie == 0 {
        bail!("no cookie of the network namespace: {}", Error::last_os_error());
    }
    Ok(cookie)
}
