//! Real sockets in real namespaces.

use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use super::diag::{destroyed, socket};
use super::*;
use crate::proxy::netns::Namespace;

const PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Two pods, one wire: 10.0.0.1 and fd00::1 serve, 10.0.0.2 and fd00::2 call.
struct Wire {
    names: [String; 2],
    server: Namespace,
    client: Namespace,
}

impl Wire {
    /// None without the rights to make one.
    fn new(name: &str) -> Option<Self> {
        let names = ["s", "c"].map(|end| format!("mesh-agent-{name}-{}-{end}", std::process::id()));
        for name in &names {
            let made = Command::new("ip").args(["netns", "add", name]).status();
            if !made.is_ok_and(|status| status.success()) {
                eprintln!("skipped: network namespaces need root and iproute2");
                return None;
            }
        }
        let open = |name: &String| Namespace::open(&Path::new("/run/netns").join(name)).unwrap();
        let wire = Self { server: open(&names[0]), client: open(&names[1]), names };
        let [s, c] = &wire.names;
        ip_do(&format!("link add e0 netns {s} type veth peer name e0 netns {c}"));
        for (number, name) in [(1, s), (2, c)] {
            ip_do(&format!("-n {name} link set lo up"));
            ip_do(&format!("-n {name} address add 10.0.0.{number}/24 dev e0"));
            ip_do(&format!("-n {name} address add fd00::{number}/64 dev e0 nodad"));
            ip_do(&format!("-n {name} link set e0 up"));
        }
        Some(wire)
    }

    /// A listener that hears both families, as most servers do.
    async fn listen(&self, port: u16) -> TcpListener {
        let socket = self.server.run(|| stream(Domain::IPV6)).await.unwrap();
        socket.set_only_v6(false).unwrap();
        socket.bind(&SocketAddr::from(([0_u16; 8], port)).into()).unwrap();
        socket.listen(1024).unwrap();
        TcpListener::from_std(socket.into()).unwrap()
    }

    /// Both ends of a new connection.
    async fn pair(&self, to: &str, listener: &TcpListener) -> [TcpStream; 2] {
        let to = address(to);
        let connect = async {
            if !to.is_ipv6() || !to.ip().to_canonical().is_ipv4() {
                return self.client.connect(to).await.unwrap();
            }
            let socket = self.client.run(|| stream(Domain::IPV6)).await.unwrap();
            TcpSocket::from_std_stream(socket.into()).connect(to).await.unwrap()
        };
        let (client, server) = tokio::join!(connect, listener.accept());
        [client, server.unwrap().0]
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for name in &self.names {
            drop(Command::new("ip").args(["netns", "del", name]).status());
        }
    }
}

fn ip_do(words: &str) {
    assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
}

fn stream(domain: Domain) -> std::io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// What a read at this end says.
async fn said(end: &mut TcpStream) -> std::io::Result<usize> {
    timeout(Duration::from_secs(5), end.read(&mut [0; 8])).await.expect("neither bytes nor an end")
}

async fn is_alive([client, server]: &mut [TcpStream; 2]) -> bool {
    let sent = client.write_all(b"alive").await.is_ok();
    sent && said(server).await.is_ok_and(|length| length == 5)
}

/// Nothing from outside may be, except on port 81; nobody has gone.
struct Judgement;

impl Judge for Judgement {
    fn is_carried(&self, _local: SocketAddr, _remote: SocketAddr) -> bool {
        false
    }

    fn caller(&self, _local: SocketAddr, _remote: SocketAddr) -> Option<Caller> {
        None
    }

    fn permits(&self, caller: Caller, remote: IpAddr, local: SocketAddr) -> bool {
        assert_eq!(caller, Caller::Unknown);
        assert!([ip("10.0.0.2"), ip("fd00::2")].contains(&remote), "{remote}");
        local.port() == 81
    }

    fn gone(&self, _remote: SocketAddr) -> bool {
        false
    }
}

/// 10.0.0.1 has gone; and nothing may come in.
struct Departed;

impl Judge for Departed {
    fn is_carried(&self, _local: SocketAddr, _remote: SocketAddr) -> bool {
        false
    }

    fn caller(&self, _local: SocketAddr, _remote: SocketAddr) -> Option<Caller> {
        None
    }

    fn permits(&self, _caller: Caller, _remote: IpAddr, _local: SocketAddr) -> bool {
        false
    }

    fn gone(&self, remote: SocketAddr) -> bool {
        remote == address("10.0.0.1:80")
    }
}

#[tokio::test]
async fn what_policy_forbids_ends_and_nothing_else() {
    let Some(wire) = Wire::new("policy") else { return };
    let (closed, open) = (wire.listen(80).await, wire.listen(81).await);
    let mut forbidden = Vec::new();
    for to in ["10.0.0.1:80", "[fd00::1]:80", "[::ffff:10.0.0.1]:80"] {
        forbidden.push(wire.pair(to, &closed).await);
    }
    let mut permitted = [wire.pair("10.0.0.1:81", &open).await, wire.pair("[fd00::1]:81", &open).await];
    let pod = vec![ip("10.0.0.1"), ip("fd00::1")];
    // The pod's own traffic to itself, by its address.
    let own = async {
        let (client, server) = tokio::join!(wire.server.connect(address("10.0.0.1:80")), closed.accept());
        [client.unwrap(), server.unwrap().0]
    };
    let mut own = own.await;
    let sweeper = Sweeper::default();
    let swept = sweeper.sweep(&wire.server, pod.clone(), Judgement).await.unwrap();
    // Two listeners, the pod's own connection at both ends, and the others' at this one.
    assert_eq!(swept, Swept { seen: 2 + 2 + 5, destroyed: 3, left: 0 });
    assert_eq!(sweeper.counts().policy.load(Ordering::Relaxed), 3);
    for [client, server] in &mut forbidden {
        assert_eq!(said(server).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert_eq!(said(client).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    for pair in permitted.iter_mut().chain([&mut own]) {
        assert!(is_alive(pair).await);
    }
    // Listeners go on.
    assert!(is_alive(&mut wire.pair("10.0.0.1:80", &closed).await).await);
    drop(forbidden);
    let again = sweeper.sweep(&wire.server, pod, Judgement).await.unwrap();
    assert_eq!(again.left, 0);
}

#[tokio::test]
async fn what_goes_to_a_removed_endpoint_ends_and_nothing_else() {
    let Some(wire) = Wire::new("gone") else { return };
    let (gone, stays) = (wire.listen(80).await, wire.listen(81).await);
    // Ports that elsewhere are those of servers.
    wire.client.run(|| std::fs::write(PORTS, "2000 2999")).await.unwrap();
    let mut ended = [wire.pair("10.0.0.1:80", &gone).await, wire.pair("[::ffff:10.0.0.1]:80", &gone).await];
    let mut alive = [wire.pair("10.0.0.1:81", &stays).await, wire.pair("[fd00::1]:80", &gone).await];
    let sweeper = Sweeper::default();
    let pod = vec![ip("10.0.0.2"), ip("fd00::2")];
    let swept = sweeper.sweep(&wire.client, pod, Departed).await.unwrap();
    assert_eq!(swept, Swept { seen: 4, destroyed: 2, left: 0 });
    assert_eq!(sweeper.counts().gone.load(Ordering::Relaxed), 2);
    for [client, server] in &mut ended {
        assert_eq!(said(client).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert_eq!(said(server).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    for pair in &mut alive {
        assert!(is_alive(pair).await);
    }
}

#[tokio::test]
async fn a_thousand_sockets_are_listed_and_destroyed() {
    let Some(wire) = Wire::new("many") else { return };
    let listener = wire.listen(80).await;
    let mut held = Vec::new();
    for number in 0..500 {
        // Nobody accepts them: the sockets at the server's end are there all the same. Half of them are IPv6.
        let to = if number % 2 == 0 { "10.0.0.1:80" } else { "[fd00::1]:80" };
        held.push(wire.server.connect(address(to)).await.unwrap());
    }
    let mut diag = Diag::of(&wire.server).await.unwrap();
    let listed = diag.list().unwrap();
    let count = |want: State| listed.iter().filter(|socket| socket.state == want).count();
    assert_eq!((count(State::Established), count(State::Listen)), (1000, 1));
    for socket in listed.iter().filter(|socket| socket.state == State::Established) {
        // One of the two ends may have taken the other with it.
        diag.destroy(socket).unwrap();
        assert!(!diag.destroy(socket).unwrap(), "destroyed, and still found");
    }
    let left = diag.list().unwrap();
    assert!(left.iter().all(|socket| socket.state == State::Listen), "{left:?}");
    drop((held, listener));
}

#[test]
fn nobody_but_the_kernel_answers() {
    let diag = match Diag::here() {
        Ok(diag) => diag,
        Err(error) => panic!("anybody may list: {error}"),
    };
    let stranger = socket().unwrap();
    // Needs CAP_NET_ADMIN; without it, it is refused all the more.
    let sent = stranger.send_to(&[0; 16], &diag.address().unwrap());
    let code = sent.unwrap_err().raw_os_error();
    assert!(matches!(code, Some(libc::ECONNREFUSED | libc::EPERM)), "{code:?}");
}

#[test]
fn a_kernel_that_cannot_says_so_once_and_counts() {
    assert!(destroyed(None).unwrap() && !destroyed(Some(libc::ENOENT)).unwrap());
    let counts = Counts::default();
    for code in [libc::EOPNOTSUPP, libc::EINVAL, libc::EPERM] {
        counts.count(&destroyed(Some(code)).unwrap_err());
    }
    let read = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    assert_eq!((read(&counts.unsupported), read(&counts.failed)), (2, 1));
}
