//! Two pods in network namespaces of their own, joined by a cable, each on a node of its own with real proxies. The kernel programs'
//! part is done by a table; cgroups are directories.

mod hostile;
mod life;
mod traffic;
mod trust;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use mesh_common::abi;
use mesh_common::api::istio::workload as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::host::{Denial, Judged, Original};
use super::*;
use crate::datapath::desired::Vantage;
use crate::fixtures::{Directory, NetworkNamespace};
use crate::identity::SpiffeId;
use crate::proxy::congestion::Congestion;
use crate::proxy::netns::Namespace;
use crate::proxy::tls::Protocol;
use crate::proxy::tls::fixtures::{Authority, Held, Wanted, client, server};
use crate::snapshot::fixtures::{of_service, of_workload, removal, service, update, workload};
use crate::snapshot::{Delta, Locality, Snapshot, Workload};

const LONG: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_millis(100);
const CLIENT: &str = "c//Pod/shop/client";
const SERVER: &str = "c//Pod/shop/server";

/// What the kernel programs of a node would know.
#[derive(Default)]
struct Table {
    originals: Mutex<HashMap<(u64, SocketAddr), Original>>,
    clients: Mutex<HashMap<(u64, SocketAddr), SocketAddr>>,
    guarded: Mutex<Vec<u64>>,
    unguarded: Mutex<Vec<u64>>,
    steered: Mutex<Vec<(u64, IpAddr)>>,
}

impl Kernel for Table {
    fn caller(&self, _source: SocketAddr, _destination: SocketAddr) -> Option<u64> {
        None
    }

    fn take_steered(&self, _source: SocketAddr, _destination: SocketAddr) -> Option<u64> {
        None
    }

    fn steer(&self, workload: u64, address: IpAddr, _listener: BorrowedFd<'_>) -> io::Result<()> {
        self.steered.lock().unwrap().push((workload, address));
        Ok(())
    }

    fn take_original(&self, netns: u64, source: SocketAddr) -> Option<Original> {
        self.originals.lock().unwrap().remove(&(netns, source))
    }

    fn show_client(&self, netns: u64, proxy_end: SocketAddr, client: SocketAddr) -> io::Result<()> {
        self.clients.lock().unwrap().insert((netns, proxy_end), client);
        Ok(())
    }

    fn forget_client(&self, netns: u64, proxy_end: SocketAddr) {
        self.clients.lock().unwrap().remove(&(netns, proxy_end));
    }

    fn guard(&self, _netns: &File, cookie: u64) -> anyhow::Result<()> {
        self.guarded.lock().unwrap().push(cookie);
        Ok(())
    }

    fn unguard(&self, cookie: u64) {
        self.unguarded.lock().unwrap().push(cookie);
    }
}

/// A policy that refuses some sources, and all of them where a workload names it.
#[derive(Default)]
struct Refuses {
    who: Mutex<Vec<SpiffeId>>,
    /// Refuses everybody, in dry run.
    trial: AtomicBool,
    asked: AtomicU64,
    changed: watch::Sender<u64>,
}

impl Refuses {
    fn set(&self, who: Vec<SpiffeId>) {
        *self.who.lock().unwrap() = who;
        self.changed.send_modify(|version| *version += 1);
    }
}

impl Judge for Refuses {
    fn judge(
        &self,
        destination: &Workload,
        source: Option<&SpiffeId>,
        _source_ip: IpAddr,
        _destination_ip: IpAddr,
        _port: u16,
    ) -> Judged {
        let named = destination.policies().iter().any(|policy| **policy == *"shop/nobody");
        let refused = named || self.who.lock().unwrap().iter().any(|who| Some(who) == source);
        let policy = refused.then(|| "shop/nobody".into());
        self.asked.fetch_add(1, Ordering::Relaxed);
        let would_deny = self.trial.load(Ordering::Relaxed).then(|| ("shop/trial".into(), None));
        Judged { allowed: !refused, policy, rule: refused.then_some(0), cause: None, would_deny }
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// A pod with one process.
struct Pod {
    net: NetworkNamespace,
    /// For its applications' sockets.
    inside: Namespace,
    addresses: [IpAddr; 2],
    process: Child,
}

impl Pod {
    fn new(number: u8) -> Option<Self> {
        let net = NetworkNamespace::new()?;
        let addresses = [[10, 99, 0, number].into(), format!("fd99::{number}").parse().unwrap()];
        let inside = Namespace::open(&net.path()).unwrap();
        let process = process(&net);
        Some(Self { net, inside, addresses, process })
    }

    fn at(&self, six: bool, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses[usize::from(six)], port)
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.kill();
    }
}

fn process(net: &NetworkNamespace) -> Child {
    Command::new("ip").args(["netns", "exec", &net.0, "sleep", "600"]).spawn().unwrap()
}

/// A node with one pod.
struct Node {
    pods: Pods,
    events: mpsc::UnboundedReceiver<Event>,
    /// As the last event says.
    proxy: Option<abi::Proxy>,
    kernel: Arc<Table>,
    judge: Arc<Refuses>,
    mesh: Arc<Mesh>,
    denials: Arc<Mutex<Vec<Denial>>>,
    certificates: Arc<Held>,
    cgroups: Directory,
    snapshot: Snapshot,
}

impl Node {
    fn new(limits: Limits) -> Self {
        let (events, told) = mpsc::unbounded_channel();
        let kernel = Arc::new(Table::default());
        let judge = Arc::new(Refuses::default());
        let mesh = Arc::new(Mesh::new(GRACE));
        let (denials, certificates) = (Arc::<Mutex<Vec<Denial>>>::default(), Arc::<Held>::default());
        let cgroups = Directory::new();
        let tell = Arc::clone(&denials);
        let parts = Parts {
            revocations: crate::proxy::tls::Revocations::none(),
            cgroups: cgroups.path().to_owned(),
            kernel: Arc::clone(&kernel) as Arc<dyn Kernel>,
            judge: Arc::clone(&judge) as Arc<dyn Judge>,
            mesh: Arc::clone(&mesh),
            certificates: Arc::clone(&certificates) as Arc<dyn Certificates>,
            protocols: vec![Protocol::Stream, Protocol::H2],
            congestion: Congestion::OF_NAMESPACE,
            limits,
            denied: Arc::new(move |denial| tell.lock().unwrap().push(denial)),
            threads: Threads::start(2, std::time::Duration::ZERO).unwrap(),
            events,
        };
        let pods = Pods::new(parts).unwrap();
        let snapshot = Snapshot::new();
        Self {
            pods,
            events: told,
            proxy: None,
            kernel,
            judge,
            mesh,
            denials,
            certificates,
            cgroups,
            snapshot,
        }
    }

    fn apply(&mut self, delta: Delta) {
        let changed = self.snapshot.apply(delta);
        let vantage = Vantage {
            node: "node".into(),
            locality: Locality::default(),
            cluster: "".into(),
            network: "".into(),
        };
        self.mesh.apply(&changed, &self.snapshot, &vantage, Instant::now());
    }

    /// The processes of its pod.
    fn processes(&self, processes: &[u32]) {
        let at = self.cgroups.path().join("pod/container");
        std::fs::create_dir_all(&at).unwrap();
        let lines: String = processes.iter().map(|process| format!("{process}\n")).collect();
        std::fs::write(at.join("cgroup.procs"), lines).unwrap();
    }

    fn enroll(&mut self, uid: &str) {
        let workload = Arc::clone(self.snapshot.workload(uid).unwrap());
        self.pods.sync(vec![Enrolled { uid: uid.into(), workload, cgroups: vec!["pod".into()] }]);
    }

    async fn event(&mut self) -> Event {
        let event = timeout(LONG, self.events.recv()).await.expect("an event").unwrap();
        self.proxy = match &event {
            Event::Proxy { proxy, .. } => Some(*proxy),
            Event::Gone { .. } => None,
        };
        event
    }

    fn is_ready(&self) -> bool {
        self.proxy.is_some_and(|proxy| proxy.flags & abi::Proxy::READY != 0)
    }

    async fn ready(&mut self) {
        while !self.is_ready() {
            self.event().await;
        }
    }

    async fn gone(&mut self) {
        while self.event().await != (Event::Gone { uid: self.uid() }) {}
    }

    fn uid(&self) -> Arc<str> {
        if self.cgroups.path().join("client").exists() { CLIENT.into() } else { SERVER.into() }
    }

    fn outcome(&self, side: fn(&Figures) -> &figures::SideFigures, name: &str) -> u64 {
        side(&self.pods.figures()).outcomes().get(name).copied().unwrap_or_default()
    }
}

struct World {
    client: Node,
    server: Node,
    client_pod: Pod,
    server_pod: Pod,
    authority: Authority,
}

impl World {
    /// Both pods ready; none without the rights.
    async fn new() -> Option<Self> {
        let mut world = Self::unready(Limits::default())?;
        world.certify();
        world.begin().await;
        Some(world)
    }

    fn unready(limits: Limits) -> Option<Self> {
        let (client_pod, server_pod) = (Pod::new(1)?, Pod::new(2)?);
        let far = &server_pod.net.0;
        client_pod.net.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far]);
        for pod in [&client_pod, &server_pod] {
            pod.net.ip(&["addr", "add", &format!("{}/24", pod.addresses[0]), "dev", "eth0"]);
            pod.net.ip(&["addr", "add", &format!("{}/64", pod.addresses[1]), "dev", "eth0", "nodad"]);
            pod.net.ip(&["link", "set", "eth0", "up"]);
        }
        let (mut client, mut server) = (Node::new(limits), Node::new(limits));
        std::fs::write(client.cgroups.path().join("client"), "").unwrap();
        let pods = [(CLIENT, &client_pod), (SERVER, &server_pod)];
        for node in [&mut client, &mut server] {
            node.apply(update(&pods.map(|(uid, pod)| of_workload(announced(uid, pod), "1"))));
        }
        Some(Self { client, server, client_pod, server_pod, authority: Authority::new() })
    }

    fn certify(&self) {
        for (node, id) in [(&self.client, client()), (&self.server, server())] {
            node.certificates.set(&id, self.authority.issue(&Wanted::of(&id)));
        }
    }

    async fn begin(&mut self) {
        self.client.processes(&[self.client_pod.process.id()]);
        self.server.processes(&[self.server_pod.process.id()]);
        self.client.enroll(CLIENT);
        self.server.enroll(SERVER);
        self.client.ready().await;
        self.server.ready().await;
    }

    /// As the kernel does it: the client's connection comes to its own pod's proxy, which will ask where it was meant to go.
    async fn connect(&self, original: Original) -> io::Result<TcpStream> {
        let six = original.dialled.is_ipv6();
        let (from, to) = (self.client_pod.at(six, 0), self.client_pod.at(six, 15001));
        let socket = self.client_pod.inside.bound(from, to).await?;
        let key = (self.client_pod.inside.cookie(), socket.local_addr()?);
        self.client.kernel.originals.lock().unwrap().insert(key, original);
        timeout(LONG, socket.connect(to)).await.unwrap()
    }

    /// What an application of the server's pod sees at the other end of a connection.
    fn seen(&self, tcp: &TcpStream) -> SocketAddr {
        let peer = tcp.peer_addr().unwrap();
        let clients = self.server.kernel.clients.lock().unwrap();
        clients.get(&(self.server_pod.inside.cookie(), peer)).copied().unwrap_or(peer)
    }

    /// An open connection: both applications' ends.
    async fn joined(&self, six: bool, port: u16) -> (TcpStream, TcpStream) {
        let address = self.server_pod.at(six, port);
        let listener = self.server_pod.inside.listen(address).await.unwrap();
        let near = self.connect(Original::to(address)).await.unwrap();
        let (far, _peer) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        (near, far)
    }
}

fn announced(uid: &str, pod: &Pod) -> wire::Workload {
    let mut announced = workload(uid, &pod.addresses[0].to_string(), "node", &[]);
    let IpAddr::V6(six) = pod.addresses[1] else { panic!() };
    announced.addresses.push(six.octets().to_vec());
    announced.tunnel_protocol = wire::TunnelProtocol::Hbone as i32;
    announced.service_account = uid.rsplit('/').next().unwrap().to_owned();
    announced
}

async fn passes(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
    from.write_all(text).await.unwrap();
    let mut heard = vec![0; text.len()];
    timeout(LONG, to.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, text);
}

async fn is_reset(tcp: &mut TcpStream) {
    let error = timeout(LONG, tcp.read(&mut [0; 16])).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// The same of a connection that has just been made, which may be too late to be seen open.
async fn is_reset_at_once(made: io::Result<TcpStream>) {
    match made {
        Ok(mut tcp) => is_reset(&mut tcp).await,
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}
