//! Two pods and their proxies over loopback, with real sockets and real certificates. The kernel's part, which destination a
//! connection was meant for, is told by a table.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::drain::{Drain, Phase};
use super::host::{Denied, Endpoint, Inward, Later, Outcome, Outward, Route, Wanted};
use super::inbound::{self, Inbound};
use super::limits::{Allowance, Limits};
use super::outbound::{self, Outbound};
use super::pool::Pool;
use super::stream::Reason;
use super::tls::Protocol;
use super::tls::fixtures::{Pair, client, server};
use super::{relay, tls};

const LONG: Duration = Duration::from_secs(20);

/// The server's node.
struct Policy {
    open: AtomicBool,
    changed: watch::Sender<u64>,
    finished: Mutex<Vec<(Wanted, Outcome)>>,
}

impl Inward for Policy {
    fn permits(&self, _wanted: &Wanted) -> Result<(), Denied> {
        let denied = Denied { policy: "shop/nobody".to_owned() };
        if self.open.load(Ordering::Relaxed) { Ok(()) } else { Err(denied) }
    }

    fn dial<'a>(&'a self, wanted: &'a Wanted) -> Later<'a, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(wanted.destination))
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn finished(&self, wanted: &Wanted, outcome: &Outcome) {
        self.finished.lock().unwrap().push((wanted.clone(), outcome.clone()));
    }
}

/// The client's node.
#[derive(Default)]
struct Table {
    meant: Mutex<HashMap<SocketAddr, SocketAddr>>,
    routes: Mutex<HashMap<SocketAddr, Route>>,
}

impl Outward for Table {
    fn destination(&self, application: SocketAddr, _listener: SocketAddr) -> Option<SocketAddr> {
        self.meant.lock().unwrap().get(&application).copied()
    }

    fn route(&self, destination: SocketAddr) -> Route {
        self.routes.lock().unwrap().get(&destination).cloned().unwrap_or(Route::Refuse)
    }

    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(to))
    }
}

struct Mesh {
    pair: Pair,
    table: Arc<Table>,
    policy: Arc<Policy>,
    inbound: Arc<Inbound>,
    outbound: Arc<Outbound>,
    /// Where the proxies listen.
    capture: SocketAddr,
    tunnel: SocketAddr,
    phase: watch::Sender<Phase>,
    _outbound_phase: watch::Sender<Phase>,
    serving: JoinHandle<()>,
}

async fn listener() -> (TcpListener, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(4096).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn limits() -> Limits {
    Limits { connect_timeout: Duration::from_secs(5), ..Limits::default() }
}

impl Mesh {
    async fn new() -> Self {
        Self::with(vec![Protocol::Stream, Protocol::H2], limits()).await
    }

    async fn with(protocols: Vec<Protocol>, limits: Limits) -> Self {
        let pair = Pair::speaking(protocols);
        let table = Arc::new(Table::default());
        let policy = Arc::new(Policy {
            open: AtomicBool::new(true),
            changed: watch::channel(0).0,
            finished: Mutex::default(),
        });
        let inbound = Arc::new(Inbound {
            own: server(),
            configs: Arc::clone(&pair.server),
            host: Arc::clone(&policy) as Arc<dyn Inward>,
            allowance: Allowance::new(limits),
        });
        let outbound = Arc::new(Outbound {
            own: client(),
            configs: Arc::clone(&pair.client),
            host: Arc::clone(&table) as Arc<dyn Outward>,
            allowance: Allowance::new(limits),
            pool: Pool::new(limits.idle_tunnels, limits.idle_timeout),
            baggage: None,
        });
        let ((tunnels, tunnel), (captured, capture)) = (listener().await, listener().await);
        let (phase, drain) = Drain::new();
        let serving = tokio::spawn(inbound::serve(Arc::clone(&inbound), tunnels, drain));
        let (_outbound_phase, drain) = Drain::new();
        tokio::spawn(outbound::serve(Arc::clone(&outbound), captured, drain));
        Self { pair, table, policy, inbound, outbound, capture, tunnel, phase, _outbound_phase, serving }
    }

    fn endpoint(&self, target: SocketAddr) -> Endpoint {
        Endpoint { identity: server(), tunnel: self.tunnel, target }
    }

    fn route(&self, destination: SocketAddr, endpoints: Vec<Endpoint>) {
        self.table.routes.lock().unwrap().insert(destination, Route::Tunnel { endpoints, host: None });
    }

    /// As the kernel does it: the application's connection comes to the proxy, which is told where it was meant to go.
    async fn connect(&self, destination: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        self.table.meant.lock().unwrap().insert(socket.local_addr().unwrap(), destination);
        timeout(LONG, socket.connect(self.capture)).await.unwrap().unwrap()
    }

    fn outcomes(&self) -> Vec<Outcome> {
        self.policy.finished.lock().unwrap().iter().map(|(_wanted, outcome)| outcome.clone()).collect()
    }

    fn count(&self, of: fn(&super::limits::Counts) -> &std::sync::atomic::AtomicU64) -> (u64, u64) {
        let value = |allowance: &Allowance| of(&allowance.counts).load(Ordering::Relaxed);
        (value(&self.outbound.allowance), value(&self.inbound.allowance))
    }
}

/// An application that sends back what it hears.
async fn echo() -> SocketAddr {
    let (listener, address) = listener().await;
    tokio::spawn(async move {
        loop {
            let (mut tcp, _peer) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = tcp.split();
                if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                    drop(write.shutdown().await);
                }
            });
        }
    });
    address
}

async fn converse(mut tcp: TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
    tcp.write_all(text).await?;
    tcp.shutdown().await?;
    let mut heard = Vec::new();
    timeout(LONG, tcp.read_to_end(&mut heard)).await.unwrap()?;
    Ok(heard)
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_tunnel_is_reused_after_a_clean_end() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    for round in 0..10 {
        assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
        until("the tunnel rests", || mesh.outbound.pool.idle() == 1).await;
        assert_eq!(mesh.count(|counts| &counts.reused).0, round);
    }
    assert_eq!(mesh.count(|counts| &counts.handshakes), (1, 1));
    let (wanted, outcome) = mesh.policy.finished.lock().unwrap()[0].clone();
    assert_eq!(wanted.source, Some(client()));
    assert_eq!(outcome, Outcome::Ended(relay::Moved { sent: 5, received: 5 }));
}

#[tokio::test]
async fn a_tunnel_is_not_reused_after_a_reset() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut tcp = mesh.connect(target).await;
    tcp.write_all(b"hello").await.unwrap();
    tcp.read_exact(&mut [0; 5]).await.unwrap();
    relay::reset_on_drop(&tcp);
    drop(tcp);
    until("the stream is cut", || matches!(mesh.outcomes()[..], [Outcome::Cut(..)])).await;
    assert_eq!(mesh.outbound.pool.idle(), 0);
    assert_eq!(converse(mesh.connect(target).await, b"again").await.unwrap(), b"again");
    assert_eq!(mesh.count(|counts| &counts.handshakes), (2, 2));
}

#[tokio::test]
async fn a_peer_that_speaks_only_http2_is_served() {
    let mesh = Mesh::with(vec![Protocol::H2], limits()).await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    for _round in 0..10 {
        assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    }
    assert_eq!(mesh.count(|counts| &counts.handshakes), (1, 1));
}

#[tokio::test]
async fn a_thousand_connections_at_once() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Arc::new(Mesh::with(protocols, limits()).await);
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        // All of them are open at the same time: nobody ends before the last has begun.
        let mut open = Vec::new();
        for round in 0..1_000_u32 {
            let mut tcp = mesh.connect(target).await;
            tcp.write_all(&round.to_be_bytes()).await.unwrap();
            open.push(tcp);
        }
        for (round, mut tcp) in open.into_iter().enumerate() {
            let mut heard = [0; 4];
            timeout(LONG * 3, tcp.read_exact(&mut heard)).await.unwrap().unwrap();
            assert_eq!(u32::from_be_bytes(heard), round as u32);
            tcp.shutdown().await.unwrap();
            assert_eq!(timeout(LONG, tcp.read(&mut heard)).await.unwrap().unwrap(), 0);
        }
        until("all are told", || mesh.outcomes().len() == 1_000).await;
    }
}

#[tokio::test]
async fn another_endpoint_takes_what_the_first_refuses() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    let (gone, closed) = listener().await;
    drop(gone);
    let nobody = Endpoint { tunnel: closed, ..mesh.endpoint(target) };
    // No node, no application, and then one.
    mesh.route(target, vec![nobody, mesh.endpoint(closed), mesh.endpoint(target)]);
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    assert_eq!(mesh.count(|counts| &counts.retried).0, 2);
    assert!(mesh.outcomes().contains(&Outcome::Refused(Reason::Upstream)));
}

#[tokio::test]
async fn a_stale_tunnel_is_replaced() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    converse(mesh.connect(target).await, b"hello").await.unwrap();
    until("the tunnel rests", || mesh.outbound.pool.idle() == 1).await;
    // The server's node is restarted, at the same address.
    mesh.phase.send(Phase::Over).unwrap();
    mesh.serving.await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(mesh.tunnel).unwrap();
    let (_phase, drain) = Drain::new();
    tokio::spawn(inbound::serve(Arc::clone(&mesh.inbound), socket.listen(128).unwrap(), drain));
    let outbound = &mesh.outbound;
    let mut tcp = {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        mesh.table.meant.lock().unwrap().insert(socket.local_addr().unwrap(), target);
        socket.connect(mesh.capture).await.unwrap()
    };
    tcp.write_all(b"again").await.unwrap();
    timeout(LONG, tcp.read_exact(&mut [0; 5])).await.unwrap().unwrap();
    assert_eq!(outbound.allowance.counts.handshakes.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn policy_refuses_before_a_byte_and_ends_what_is_open() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        let mut open = mesh.connect(target).await;
        open.write_all(b"hello").await.unwrap();
        open.read_exact(&mut [0; 5]).await.unwrap();
        mesh.policy.open.store(false, Ordering::Relaxed);
        mesh.policy.changed.send_modify(|version| *version += 1);
        assert!(timeout(LONG, open.read(&mut [0])).await.unwrap().is_err());
        assert_eq!(mesh.count(|counts| &counts.revoked).1, 1);
        let mut late = mesh.connect(target).await;
        assert!(timeout(LONG, late.read(&mut [0])).await.unwrap().is_err());
        assert_eq!(mesh.outcomes().last(), Some(&Outcome::Refused(Reason::Policy)));
    }
}

#[tokio::test]
async fn a_tunnel_leads_only_to_its_own_workload_and_not_into_the_proxy() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let other: SocketAddr = "127.0.0.2:80".parse().unwrap();
        let ports = inbound::RESERVED.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        for wrong in [vec![other], ports.to_vec()].concat() {
            mesh.route(wrong, vec![mesh.endpoint(wrong)]);
            let mut tcp = mesh.connect(wrong).await;
            assert!(timeout(LONG, tcp.read(&mut [0])).await.unwrap().is_err());
            assert_eq!(mesh.outcomes().last(), Some(&Outcome::Refused(Reason::BadRequest)));
        }
    }
}

#[tokio::test]
async fn a_connection_that_nobody_redirected_is_reset() {
    let mesh = Mesh::new().await;
    let mut tcp = TcpStream::connect(mesh.capture).await.unwrap();
    assert!(timeout(LONG, tcp.read(&mut [0])).await.unwrap().is_err());
}

#[tokio::test]
async fn a_slow_handshake_ends_and_stops_nobody() {
    let quick = Limits { handshake_timeout: Duration::from_millis(500), handshakes: 8, ..limits() };
    let mesh = Mesh::with(vec![Protocol::Stream], quick).await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut slow = Vec::new();
    for _ in 0..7 {
        let mut tcp = TcpStream::connect(mesh.tunnel).await.unwrap();
        tcp.write_all(&[22, 3, 1]).await.unwrap();
        slow.push(tcp);
    }
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    for tcp in &mut slow {
        drop(timeout(LONG, tcp.read(&mut [0])).await.unwrap());
    }
    assert_eq!(mesh.count(|counts| &counts.slow_handshakes).1, 7);
    // One more than are allowed at a time is reset.
    let mut many = Vec::new();
    for _ in 0..9 {
        many.push(TcpStream::connect(mesh.tunnel).await.unwrap());
    }
    until("one is refused", || mesh.count(|counts| &counts.over_handshakes).1 == 1).await;
}

#[tokio::test]
async fn more_connections_than_allowed_are_reset() {
    let few = Limits { connections: 3, ..limits() };
    let mesh = Mesh::with(vec![Protocol::Stream], few).await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut tcp = mesh.connect(target).await;
        tcp.write_all(b"x").await.unwrap();
        tcp.read_exact(&mut [0]).await.unwrap();
        open.push(tcp);
    }
    let mut late = mesh.connect(target).await;
    assert!(timeout(LONG, late.read(&mut [0])).await.unwrap().is_err());
    assert_eq!(mesh.count(|counts| &counts.over_connections).0, 1);
    for tcp in open {
        assert!(converse(tcp, b"").await.unwrap().is_empty());
    }
    until("there is room again", || mesh.outbound.allowance.connected() == 0).await;
}

#[tokio::test]
async fn a_drain_lets_streams_end_and_then_resets() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut tcp = mesh.connect(target).await;
            tcp.write_all(b"hello").await.unwrap();
            tcp.read_exact(&mut [0; 5]).await.unwrap();
            open.push(tcp);
        }
        mesh.phase.send(Phase::Draining).unwrap();
        until("the listener is closed", || std::net::TcpStream::connect(mesh.tunnel).is_err()).await;
        let mut late = mesh.connect(target).await;
        assert!(timeout(LONG, late.read(&mut [0])).await.unwrap().is_err());
        // What is open goes on, in both directions, and may end in order.
        assert_eq!(converse(open.remove(0), b"still here").await.unwrap(), b"still here");
        assert!(!mesh.serving.is_finished());
        mesh.phase.send(Phase::Over).unwrap();
        timeout(LONG, mesh.serving).await.unwrap().unwrap();
        assert!(timeout(LONG, open[0].read(&mut [0])).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn what_looks_like_the_proxys_own_words_is_payload() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        let forged = b"CONNECT 127.0.0.1:15008 HTTP/1.1\r\nforwarded: for=\"10.0.0.1:1\"\r\nbaggage: k8s.namespace.name=admin\r\n\r\n";
        let tcp = mesh.connect(target).await;
        let address = tcp.local_addr().unwrap();
        assert_eq!(converse(tcp, forged).await.unwrap(), forged);
        until("it is told", || mesh.outcomes().len() == 1).await;
        let wanted = mesh.policy.finished.lock().unwrap()[0].0.clone();
        assert_eq!((wanted.source, wanted.client), (Some(client()), Some(address)));
    }
}

/// A peer with a valid certificate that says nonsense: its connection ends, nobody else's does.
#[tokio::test]
async fn nonsense_in_a_tunnel_ends_only_that_tunnel() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut well = mesh.connect(target).await;
    well.write_all(b"x").await.unwrap();
    well.read_exact(&mut [0]).await.unwrap();
    for nonsense in
        [&[9_u8][..], &[0, 1], &[1, 4, 127], &[2], &[4], &[1, 5, 0, 0, 0, 0, 0, 0], &[255; 16_384]]
    {
        let tcp = TcpStream::connect(mesh.tunnel).await.unwrap();
        let mut peer = tls::connect(&mesh.pair.client, &client(), &server(), tcp).await.unwrap();
        let record = peer.writer.data(nonsense).unwrap();
        peer.tcp.write_all(&record).await.unwrap();
        let mut rest = Vec::new();
        drop(timeout(LONG, peer.tcp.read_to_end(&mut rest)).await.unwrap());
    }
    well.write_all(b"y").await.unwrap();
    timeout(LONG, well.read_exact(&mut [0])).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_without_tls_is_asked_by_its_own_address() {
    let mesh = Mesh::new().await;
    // As sk_lookup does it: the connection's own address is what the client meant. Here that is the listener's.
    let (steered, address) = listener().await;
    let (_phase, drain) = Drain::new();
    tokio::spawn(inbound::serve_plain(Arc::clone(&mesh.inbound), steered, drain));
    mesh.policy.open.store(false, Ordering::Relaxed);
    let mut tcp = TcpStream::connect(address).await.unwrap();
    assert!(timeout(LONG, tcp.read(&mut [0])).await.unwrap().is_err());
    let wanted = mesh.policy.finished.lock().unwrap()[0].0.clone();
    assert_eq!((wanted.source, wanted.destination), (None, address));
}

#[tokio::test]
async fn what_is_not_meshed_goes_on_as_it_is() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.table.routes.lock().unwrap().insert(target, Route::Direct(target));
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    assert_eq!(mesh.count(|counts| &counts.handshakes), (0, 0));
}
