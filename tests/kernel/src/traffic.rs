//! Listeners, and who of them a client reached. One thread does both sides: the kernel completes a connection before
//! anyone accepts it, so nothing depends on timing.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::runner::until;

/// No test waits longer than this for a reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// A service's address; it exists nowhere but in the maps.
pub const VIP4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
/// As above, IPv6.
pub const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1));
/// A backend's address.
pub const HOST4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// As above, IPv6.
pub const HOST6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// How an IPv6 socket writes an IPv4 address.
pub fn through_ipv6(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// TCP backends on ports of their own.
pub struct Listeners(Vec<TcpListener>);

impl Listeners {
    /// `count` of them.
    pub fn at(host: IpAddr, count: usize) -> Result<Self> {
        let bound = (0..count).map(|_| TcpListener::bind((host, 0)).context("cannot listen"));
        let listeners: Vec<TcpListener> = bound.collect::<Result<_>>()?;
        listeners.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
        Ok(Self(listeners))
    }

    /// Where they listen.
    pub fn addresses(&self) -> Result<Vec<SocketAddr>> {
        self.0.iter().map(|listener| listener.local_addr().context("a listener has no address")).collect()
    }

    /// The index of the one with a new connection, and the connection.
    pub fn accept(&self) -> Result<(usize, TcpStream)> {
        self.waiting(PATIENCE)?.context("no connection at any backend")
    }

    /// As [`Listeners::accept`], but none is no error.
    pub fn waiting(&self, patience: Duration) -> Result<Option<(usize, TcpStream)>> {
        let end = Instant::now() + patience;
        loop {
            for (index, listener) in self.0.iter().enumerate() {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false)?;
                        stream.set_read_timeout(Some(PATIENCE))?;
                        return Ok(Some((index, stream)));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if Instant::now() > end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How often each backend was reached by `count` connections to `address`.
    pub fn spread(&self, address: SocketAddr, count: usize) -> Result<Vec<usize>> {
        let mut reached = vec![0; self.0.len()];
        for _ in 0..count {
            let client = connect(address)?;
            reached[self.accept()?.0] += 1;
            drop(client);
        }
        Ok(reached)
    }
}

/// A TCP client.
pub fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Bytes that differ go both ways, unchanged.
pub fn exchange(client: &mut TcpStream, server: &mut TcpStream, there: usize, back: usize) -> Result<()> {
    one_way(client, server, there)?;
    one_way(server, client, back)
}

fn one_way(from: &mut TcpStream, to: &mut TcpStream, count: usize) -> Result<()> {
    let sent: Vec<u8> = (0..count).map(|place| (place % 251) as u8).collect();
    from.write_all(&sent)?;
    let mut received = vec![0; count];
    to.read_exact(&mut received)?;
    ensure!(sent == received, "bytes were changed on the way");
    Ok(())
}

/// UDP backends on ports of their own.
pub struct Responders(Vec<UdpSocket>);

impl Responders {
    /// `count` of them.
    pub fn at(host: IpAddr, count: usize) -> Result<Self> {
        let sockets: Vec<UdpSocket> = (0..count).map(|_| udp(host)).collect::<Result<_>>()?;
        sockets.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        Ok(Self(sockets))
    }

    /// Where they are bound.
    pub fn addresses(&self) -> Result<Vec<SocketAddr>> {
        self.0.iter().map(|socket| socket.local_addr().context("a socket has no address")).collect()
    }

    /// Sends back the next datagram, and says who got it.
    pub fn answer(&self) -> Result<usize> {
        let mut found = None;
        until("a datagram at any backend", || {
            let mut bytes = [0; 2048];
            for (index, socket) in self.0.iter().enumerate() {
                match socket.recv_from(&mut bytes) {
                    Ok((size, from)) => {
                        socket.send_to(&bytes[..size], from).context("cannot answer")?;
                        found = Some(index);
                        return Ok(true);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(false)
        })?;
        found.context("no datagram")
    }

    /// A datagram to `address` and its answer: who answered, and from which address it seemed to come.
    pub fn ask(&self, client: &UdpSocket, address: SocketAddr) -> Result<(usize, SocketAddr)> {
        client.send_to(b"question", address).with_context(|| format!("cannot send to {address}"))?;
        let index = self.answer()?;
        let mut bytes = [0; 2048];
        let (size, from) = client.recv_from(&mut bytes).context("no answer")?;
        ensure!(&bytes[..size] == b"question", "the answer was changed on the way");
        Ok((index, from))
    }
}

/// A UDP socket.
pub fn udp(host: IpAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((host, 0)).context("cannot bind")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// That the call was refused by the programs: at once, and with the error of a closed port.
pub fn refused<T>(result: std::io::Result<T>) -> Result<()> {
    match result {
        Ok(_) => anyhow::bail!("was not refused"),
        Err(error) => ensure!(error.kind() == ErrorKind::ConnectionRefused, "refused with {error}"),
    }
    Ok(())
}
