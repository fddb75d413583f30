//! Congestion control of the proxy's sockets: each hop of a connection has its own.

use std::borrow::Cow;
use std::io;
use std::str::FromStr;

use mesh_common::abi::Proxy;
use socket2::{Domain, Socket, Type};

/// Most characters of a name (`TCP_CA_NAME_MAX`, with the zero at its end).
const LONGEST: usize = 15;

/// A congestion control (`tcp(7)`, `TCP_CONGESTION`), or the one that a network namespace has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Congestion(Option<Cow<'static, str>>);

impl Congestion {
    /// Between an application and the proxy there is no network that could be congested; what paces itself, as BBR does, only spends timers
    /// there. The kernel programs set the same at the application's end.
    pub const WITHIN_POD: Self = Self(Some(Cow::Borrowed(Proxy::CONGESTION)));
    /// Whatever the network namespace has.
    pub const OF_NAMESPACE: Self = Self(None);

    /// Sets it, before the socket is connected or listens: one that has been paced once always is.
    pub fn set(&self, socket: &Socket) -> io::Result<()> {
        let Some(name) = &self.0 else { return Ok(()) };
        socket.set_tcp_congestion(name.as_bytes()).map_err(|error| {
            io::Error::new(error.kind(), format!("the kernel has no congestion control {name}: {error}"))
        })
    }

    /// Whether the kernel has it.
    pub fn check(&self) -> io::Result<()> {
        self.set(&Socket::new(Domain::IPV4, Type::STREAM, None)?)
    }
}

/// No name of a congestion control.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a congestion control has a name of 1 to {LONGEST} letters, digits, - and _")]
pub struct NoName;

impl FromStr for Congestion {
    type Err = NoName;

    fn from_str(name: &str) -> Result<Self, NoName> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if name.is_empty() || name.len() > LONGEST || !name.bytes().all(fits) {
            return Err(NoName);
        }
        Ok(Self(Some(Cow::Owned(name.to_owned()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_kernel_has_are_refused() {
        for name in ["", "sixteen-letters-", "re no", "reno\0", "bbr/../x"] {
            assert_eq!(name.parse::<Congestion>(), Err(NoName), "{name:?}");
        }
        let missing: Congestion = "not_there".parse().unwrap();
        assert!(missing.check().unwrap_err().to_string().contains("not_there"));
        for has in ["reno".parse().unwrap(), Congestion::WITHIN_POD, Congestion::OF_NAMESPACE] {
            has.check().unwrap();
        }
    }

    #[test]
    fn a_socket_has_what_is_set() {
        let made = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let name = |socket: &Socket| String::from_utf8(socket.tcp_congestion().unwrap()).unwrap();
        let (as_it_is, set) = (made(), made());
        Congestion::OF_NAMESPACE.set(&as_it_is).unwrap();
        assert_eq!(name(&as_it_is), name(&made()));
        Congestion::WITHIN_POD.set(&set).unwrap();
        assert_eq!(name(&set).trim_end_matches('\0'), "reno");
    }
}
