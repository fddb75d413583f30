//! Sockets inside a pod's network namespace.
//!
//! A socket belongs for its whole life to the namespace that its thread was in when it was made. One thread for each pod goes into the
//! pod's namespace and stays there: a thread of the runtime is never anywhere else than at home, so nothing of another
//! task can end up in the wrong pod.
#![expect(unsafe_code, reason = "setns, and an option of sockets that no crate knows")]

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;
/// What the thread needs.
const STACK: usize = 64 << 10;

/// Sockets made ahead for a family that is used, so that a connection need not wait for the thread.
const AHEAD: usize = 8;

const ENDED: &str = "the thread of a network namespace has ended";

/// A pod's network namespace. Dropped, its thread ends; sockets that were made live on.
#[derive(Debug, Clone)]
pub struct Namespace {
    cookie: u64,
    asks: mpsc::Sender<Ask>,
    ahead: Arc<Mutex<Ahead>>,
}

#[derive(Debug)]
enum Ask {
    Now(Domain, oneshot::Sender<io::Result<Socket>>),
    /// Something else.
    Work(Work),
    Ahead(Domain),
}

struct Work(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Work")
    }
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
        let (asks, asked) = mpsc::channel::<Ask>();
        let ahead = Arc::new(Mutex::new(Ahead::default()));
        let filled = Arc::clone(&ahead);
        let (entered, entering) = mpsc::sync_channel(1);
        std::thread::Builder::new().name("netns".to_owned()).stack_size(STACK).spawn(move || {
            let inside = enter(&file).and_then(|()| cookie());
            // The file alone would keep the namespace of a pod that has gone; the thread in it does as well, and ends with `asks`.
            drop(file);
            let stay = inside.is_ok();
            if entered.send(inside).is_err() || !stay {
                return;
            }
            while let Ok(ask) = asked.recv() {
                match ask {
                    // Whoever asked may have gone: the socket goes, too.
                    Ask::Now(domain, made) => drop(made.send(make(domain))),
                    Ask::Work(Work(work)) => work(),
                    Ask::Ahead(domain) => fill(&filled, domain),
                }
            }
        })?;
        let cookie = entering.recv().map_err(|_ended| io::Error::other(ENDED))??;
        Ok(Self { cookie, asks, ahead })
    }

    /// The namespace's cookie: a number that no other one of this machine ever has.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Listens at `address` in the namespace.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.socket(address).await?;
        socket.set_reuse_address(true)?;
        // So that [::]:15006 and 0.0.0.0:15006 do not get into each other's way.
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    /// Connects from within the namespace.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to).await?;
        TcpSocket::from_std_stream(socket.into()).connect(to).await
    }

    /// A socket in the namespace at an address of the pod, for a connection to `to`.
    pub async fn bound(&self, from: SocketAddr, to: SocketAddr) -> io::Result<TcpSocket> {
        let socket = self.socket(to).await?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        Ok(TcpSocket::from_std_stream(socket.into()))
    }

    /// Does something in the namespace that does not take long: sockets wait meanwhile.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let ended = || io::Error::other("the thread of a network namespace has ended");
        let (done, result) = oneshot::channel();
        // Whoever asked may have gone.
        let work = Work(Box::new(move || drop(done.send(work()))));
        self.asks.send(Ask::Work(work)).map_err(|_gone| ended())?;
        result.await.map_err(|_gone| ended())?
    }

    async fn socket(&self, address: SocketAddr) -> io::Result<Socket> {
        let ended = || io::Error::other(ENDED);
        let domain = Domain::for_address(address);
        let (found, left) = {
            let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            let sockets = ahead.of(domain);
            (sockets.pop(), sockets.len())
        };
        if left < AHEAD / 2 {
            self.asks.send(Ask::Ahead(domain)).map_err(|_gone| ended())?;
        }
        if let Some(socket) = found {
            return Ok(socket);
        }
        let (made, socket) = oneshot::channel();
        self.asks.send(Ask::Now(domain, made)).map_err(|_gone| ended())?;
        socket.await.map_err(|_gone| ended())?
    }
}

fn fill(ahead: &Mutex<Ahead>, domain: Domain) {
    let have = ahead.lock().unwrap_or_else(PoisonError::into_inner).of(domain).len();
    // A socket that cannot be made now is missed, and its error told, when one is asked for.
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
