//! UDP: the server, and clients with connected and unconnected sockets.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use mesh_harness::report::Listening;

use crate::attempts::{Answer, Failed, Try};
use crate::{Loop, Serve};

/// Binds, says so, and answers until it is killed.
pub(crate) fn serve(serve: &Serve) -> anyhow::Result<()> {
    let sockets = serve.listen.iter().map(UdpSocket::bind).collect::<io::Result<Vec<_>>>()?;
    let listening = sockets.iter().map(UdpSocket::local_addr).collect::<io::Result<_>>()?;
    crate::print(&Listening { listening })?;
    std::thread::scope(|scope| {
        for socket in &sockets {
            scope.spawn(|| answer_all(socket, &serve.name));
        }
    });
    Ok(())
}

fn answer_all(socket: &UdpSocket, name: &str) {
    let mut payload = [0; 2048];
    loop {
        // Errors here are ICMP's word about an earlier answer: its client has gone.
        let Ok((length, from)) = socket.recv_from(&mut payload) else { continue };
        let mut answer = format!("{name} {from}\n").into_bytes();
        answer.extend_from_slice(&payload[..length]);
        drop(socket.send_to(&answer, from));
    }
}

/// Sends a datagram and waits for its answer.
pub(crate) struct Caller {
    timeout: Duration,
    mapped: bool,
    connected: bool,
    one_socket: bool,
    socket: Option<UdpSocket>,
    sequence: u64,
}

impl Caller {
    pub(crate) fn new(run: &Loop, connected: bool, one_socket: bool) -> Self {
        let timeout = Duration::from_millis(run.timeout_ms.max(1));
        Self { timeout, mapped: run.mapped, connected, one_socket, socket: None, sequence: 0 }
    }

    fn open(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let any = match to {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(self.timeout))?;
        if self.connected {
            socket.connect(to)?;
        }
        Ok(socket)
    }
}

impl Try for Caller {
    fn attempt(&mut self, to: SocketAddr) -> Result<Answer, Failed> {
        let (to, started) = (crate::mapped(to, self.mapped), Instant::now());
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => self.open(to).map_err(|e| Failed("connect", e))?,
        };
        let connect = started.elapsed();
        self.sequence += 1;
        let payload = format!("datagram {} of {}", self.sequence, std::process::id());
        let sent = match self.connected {
            true => socket.send(payload.as_bytes()),
            false => socket.send_to(payload.as_bytes(), to),
        };
        sent.map_err(|e| Failed("send", e))?;
        let mut answer = [0; 2048];
        let (length, source) = loop {
            let received = match self.connected {
                true => socket.recv(&mut answer).and_then(|n| Ok((n, socket.peer_addr()?))),
                false => socket.recv_from(&mut answer),
            };
            let (length, source) = received.map_err(|e| Failed("receive", e))?;
            // A late answer to an earlier datagram is not this one's.
            if answer[..length].ends_with(payload.as_bytes()) {
                break (length, source);
            }
        };
        if self.one_socket {
            self.socket = Some(socket);
        }
        let line = String::from_utf8_lossy(&answer[..length]).lines().next().unwrap_or("").to_owned();
        Ok(Answer { line, peer: source, connect })
    }
}
