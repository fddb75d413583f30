//! Two pods and their proxies over loopback, with real sockets and real certificates. The kernel's part, which destination a
//! connection was meant for, is told by a table.

mod hostile;
mod traffic;

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
use super::host::{
    Application, Caller, Denied, Dialled, Endpoint, Inward, Later, Original, Outcome, Outward, Route, Wanted,
};
use super::inbound::{self, Inbound};
use super::limits::{Allowance, Limits};
use super::outbound::{self, Outbound};
use super::pool::Pool;
use super::relay;
use super::stream::Reason;
use super::threads::Threads;
use super::tls::Protocol;
use super::tls::fixtures::{Pair, client, server};

const LONG: Duration = Duration::from_secs(20);

/// The server's node.
struct Policy {
    open: AtomicBool,
    changed: watch::Sender<u64>,
    finished: Mutex<Vec<(Wanted, Outcome)>>,
}

impl Inward for Policy {
    fn caller(&self, _peer: SocketAddr, _destination: SocketAddr) -> Option<Caller> {
        None
    }

    fn permits(&self, _wanted: &Wanted) -> Result<(), Denied> {
        let denied = Denied { policy: "shop/nobody".to_owned() };
        if self.open.load(Ordering::Relaxed) { Ok(()) } else { Err(denied) }
    }

    fn still(&self, _wanted: &Wanted) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    fn dial<'a>(&'a self, wanted: &'a Wanted) -> Later<'a, io::Result<Application>> {
        Box::pin(async { TcpStream::connect(wanted.destination).await.map(Into::into) })
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn finished(&self, wanted: &Wanted, outcome: &Outcome) {
        self.finished.lock().unwrap().push((wanted.clone(), outcome.clone()));
    }
}

/// The client's node.
struct Table {
    meant: Mutex<HashMap<SocketAddr, SocketAddr>>,
    routes: Mutex<HashMap<SocketAddr, Route>>,
    changed: watch::Sender<u64>,
    finished: Mutex<Vec<(Dialled, Outcome)>>,
}

impl Outward for Table {
    fn original(&self, application: SocketAddr, _listener: SocketAddr) -> Option<Original> {
        self.meant.lock().unwrap().get(&application).copied().map(Original::to)
    }

    fn route(&self, _application: SocketAddr, original: &Original) -> Route {
        let found = self.routes.lock().unwrap().get(&original.dialled).cloned();
        found.unwrap_or(Route::Refuse(Reason::Policy))
    }

    fn still(&self, dialled: &Dialled) -> bool {
        match (self.route(dialled.application, &Original::to(dialled.destination)), &dialled.endpoint) {
            (Route::Tunnel { endpoints, .. }, Some(endpoint)) => endpoints.contains(endpoint),
            (Route::Direct(_), None) => true,
            (Route::Tunnel { .. } | Route::Direct(_) | Route::Refuse(_), _) => false,
        }
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn finished(&self, dialled: &Dialled, outcome: &Outcome) {
        self.finished.lock().unwrap().push((dialled.clone(), outcome.clone()));
    }

    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(to))
    }

    fn dial_tunnel(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>> {
        self.dial(to)
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
        let table = Arc::new(Table {
            meant: Mutex::default(),
            routes: Mutex::default(),
            changed: watch::channel(0).0,
            finished: Mutex::default(),
        });
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
            threads: Threads::here(),
            baggage: None,
        });
        let outbound = Arc::new(Outbound {
            own: client(),
            configs: Arc::clone(&pair.client),
            host: Arc::clone(&table) as Arc<dyn Outward>,
            allowance: Allowance::new(limits),
            pool: Pool::new(limits.idle_tunnels, limits.idle_timeout),
            threads: Threads::here(),
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
