//! Sockets inside a pod's network namespace.
//!
//! A socket belongs for its whole life to the namespace that its thread was in when it was made. One thread makes them for all pods: it goes
//! into the pod's namespace for each wish anew. A thread of a runtime is never anywhere else than at home, so nothing of
//! another task can end up in the wrong pod.
#![expect(unsafe_code, reason = "setns, and an option of sockets that no crate knows")]

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tracing::error;

use super::congestion::Congestion;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;
/// What a thread that enters namespaces needs.
const STACK: usize = 64 << 10;

/// Sockets made ahead for a family that is used, so that a connection need not wait for the thread.
const AHEAD: usize = 8;

const ENDED: &str = "the thread that enters network namespaces has ended";

/// A pod's network namespace, which lives as long as this. Sockets that were made live on.
#[derive(Debug, Clone)]
pub struct Namespace {
    cookie: u64,
    file: Arc<File>,
    ahead: Arc<Mutex<Ahead>>,
}

#[derive(Debug)]
struct Ask {
    file: Arc<File>,
    wish: Wish,
}

#[derive(Debug)]
enum Wish {
    Now(Domain, oneshot::Sender<io::Result<Socket>>),
    Ahead(Domain, Arc<Mutex<Ahead>>),
}

#[derive(Debug, Default)]
struct Ahead {
    four: Vec<Socket>,
    six: Vec<Socket>,
}

impl Ahead {
    fn of(&mut self, domain: Domain) -> &mut Vec<Socket> {
        if domain == Domain::IPV6 { &mut self.six } else { &mut self.four }
    }
}

/// Asks the one thread that makes sockets. It is at home between two wishes: in a pod's namespace it would keep that alive.
fn ask(ask: Ask) -> io::Result<()> {
    static MAKER: Mutex<Option<mpsc::Sender<Ask>>> = Mutex::new(None);
    let mut maker = MAKER.lock().unwrap_or_else(PoisonError::into_inner);
    let ask = match &*maker {
        None => ask,
        Some(asks) => match asks.send(ask) {
            Ok(()) => return Ok(()),
            Err(mpsc::SendError(ask)) => {
                error!("the thread that makes the sockets of pods has ended: another one takes its place");
                ask
            }
        },
    };
    let asks = make_maker()?;
    asks.send(ask).map_err(|_gone| io::Error::other(ENDED))?;
    *maker = Some(asks);
    Ok(())
}

fn make_maker() -> io::Result<mpsc::Sender<Ask>> {
    let home = File::open("/proc/thread-self/ns/net")?;
    let (asks, asked) = mpsc::channel::<Ask>();
    std::thread::Builder::new().name("netns".to_owned()).stack_size(STACK).spawn(move || {
        while let Ok(Ask { file, wish }) = asked.recv() {
            let inside = enter(&file);
            match wish {
                // Whoever asked may have gone: the socket goes, too.
                Wish::Now(domain, made) => drop(made.send(inside.and_then(|()| make(domain)))),
                // A socket that cannot be made now is missed, and its error told, when one is asked for.
                Wish::Ahead(domain, ahead) => drop(inside.map(|()| fill(&ahead, domain))),
            }
            drop(file);
            if enter(&home).is_err() {
                // Nobody is served by a thread that is in no known place.
                return;
            }
        }
    })?;
    Ok(asks)
}

impl Namespace {
    /// The namespace of a process.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        Self::open(&PathBuf::from(format!("/proc/{pid}/ns/net")))
    }

    /// The namespace that a file stands for. Needs CAP_SYS_ADMIN.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::enter(File::open(path)?)
    }

    /// The namespace of an open file. Needs CAP_SYS_ADMIN.
    pub fn enter(file: File) -> io::Result<Self> {
        let file = Arc::new(file);
        let inside = Arc::clone(&file);
        let cookie = visit(move || enter(&inside).and_then(|()| cookie()))?;
        let cookie = cookie.join().map_err(|_panic| io::Error::other(ENDED))??;
        Ok(Self { cookie, file, ahead: Arc::default() })
    }

    /// The namespace's cookie: a number that no other one of this machine ever has.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Listens at `address` in the namespace.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        self.listen_with(&Congestion::OF_NAMESPACE, address).await
    }

    /// As [`Self::listen`], and what is accepted has this congestion control.
    pub async fn listen_with(&self, congestion: &Congestion, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.socket(address).await?;
        congestion.set(&socket)?;
        socket.set_reuse_address(true)?;
        // So that [::]:15008 and 0.0.0.0:15008 do not get into each other's way.
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    /// Connects from within the namespace.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.connect_with(&Congestion::OF_NAMESPACE, to).await
    }

    /// As [`Self::connect`], with this congestion control.
    pub async fn connect_with(&self, congestion: &Congestion, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to).await?;
        congestion.set(&socket)?;
        TcpSocket::from_std_stream(socket.into()).connect(to).await
    }

    /// A socket in the namespace at an address of the pod, for a connection to `to`, which is in it as well.
    pub async fn bound(&self, from: SocketAddr, to: SocketAddr) -> io::Result<TcpSocket> {
        let socket = self.socket(to).await?;
        Congestion::WITHIN_POD.set(&socket)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        Ok(TcpSocket::from_std_stream(socket.into()))
    }

    /// Does something in the namespace, on a thread of its own.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (done, result) = oneshot::channel();
        let file = Arc::clone(&self.file);
        // Whoever asked may have gone.
        visit(move || drop(done.send(enter(&file).and_then(|()| work()))))?;
        result.await.map_err(|_gone| io::Error::other(ENDED))?
    }

    async fn socket(&self, address: SocketAddr) -> io::Result<Socket> {
        let domain = Domain::for_address(address);
        let (found, left) = {
            let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            let sockets = ahead.of(domain);
            (sockets.pop(), sockets.len())
        };
        if left < AHEAD / 2 {
            self.ask(Wish::Ahead(domain, Arc::clone(&self.ahead)))?;
        }
        if let Some(socket) = found {
            return Ok(socket);
        }
        let (made, socket) = oneshot::channel();
        self.ask(Wish::Now(domain, made))?;
        socket.await.map_err(|_gone| io::Error::other(ENDED))?
    }

    fn ask(&self, wish: Wish) -> io::Result<()> {
        ask(Ask { file: Arc::clone(&self.file), wish })
    }
}

/// A thread that may go where it likes: it ends afterwards.
fn visit<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name("netns-visit".to_owned()).stack_size(STACK).spawn(work)
}

fn fill(ahead: &Mutex<Ahead>, domain: Domain) {
    let have = ahead.lock().unwrap_or_else(PoisonError::into_inner).of(domain).len();
    let made = (have..AHEAD).map_while(|_| make(domain).ok()).collect::<Vec<_>>();
    ahead.lock().unwrap_or_else(PoisonError::into_inner).of(domain).extend(made);
}

fn make(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

/// The cookie of the namespace that the calling thread is in.
fn cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: an open socket, and pointers to a value and its length that live until the call has returned.
    let read = unsafe {
        let place = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, place, &raw mut length)
    };
    if read == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

fn enter(file: &File) -> io::Result<()> {
    // SAFETY: an open file, and no pointers; only this thread changes its namespace.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests;
