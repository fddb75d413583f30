//! TCP: the server with its commands, and the client that asks who answers.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_harness::report::{Listening, error_name};
use mesh_harness::sys::reset_on_close;

use crate::attempts::{Answer, Failed, Try};
use crate::{Loop, Serve};

/// Listens, says so, and serves until it is killed.
pub(crate) fn serve(serve: &Serve) -> anyhow::Result<()> {
    let listeners = serve.listen.iter().map(TcpListener::bind).collect::<io::Result<Vec<_>>>()?;
    let listening = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
    crate::print(&Listening { listening })?;
    let name: Arc<str> = serve.name.as_str().into();
    let mut threads = Vec::new();
    for listener in listeners {
        for _ in 0..serve.threads.max(1) {
            let (listener, name) = (listener.try_clone()?, Arc::clone(&name));
            let (serial, greet, stack) = (serve.threads > 0, serve.greet, 128 << 10);
            threads.push(
                std::thread::Builder::new()
                    .stack_size(stack)
                    .spawn(move || accept(&listener, &name, serial, greet))?,
            );
        }
    }
    for thread in threads {
        drop(thread.join());
    }
    Ok(())
}

fn accept(listener: &TcpListener, name: &Arc<str>, serial: bool, greet: bool) {
    loop {
        // A client that gave up before it was accepted.
        let Ok((connection, peer)) = listener.accept() else { continue };
        let name = Arc::clone(name);
        // A client that goes away in the middle is its own affair.
        let session = move || drop(converse(&connection, peer, &name, greet));
        if serial {
            session();
        } else if let Err(error) = std::thread::Builder::new().stack_size(128 << 10).spawn(session) {
            eprintln!("no thread for a connection: {error}");
        }
    }
}

/// How the connections ended that a client had attended to.
static ATTENDED: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

fn converse(connection: &TcpStream, peer: SocketAddr, name: &str, greet: bool) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let called = connection.local_addr()?.ip().to_canonical().to_string();
    let name = if name == "@local" { &called } else { name };
    let (mut reader, mut writer) = (BufReader::with_capacity(4096, connection), connection);
    let mut line = String::new();
    if greet {
        writer.write_all(format!("{name} {peer}\n").as_bytes())?;
    }
    while reader.read_line(&mut line)? > 0 {
        match line.trim_end() {
            "who" => writer.write_all(format!("{name} {peer}\n").as_bytes())?,
            // `inline`: with TCP's urgent byte where it is in the stream.
            command @ ("echo" | "inline") => {
                socket2::SockRef::from(connection).set_out_of_band_inline(command == "inline")?;
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                return echo(&mut reader, writer);
            }
            "sink" => {
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                let mut sink = vec![0; 256 << 10];
                let mut total = 0_u64;
                loop {
                    match reader.read(&mut sink)? {
                        0 => return writer.write_all(format!("{total}\n").as_bytes()),
                        n => total += n as u64,
                    }
                }
            }
            "close" => return Ok(()),
            "reset" => return reset_on_close(connection),
            // Closes while there is something that nobody has read: the kernel resets it then.
            "leave" => return connection.peek(&mut [0]).map(drop),
            // Says much, and resets in the middle of it.
            "gush" => {
                writer.write_all(&vec![b'x'; 300_000])?;
                return reset_on_close(connection);
            }
            // Ends both directions; whatever comes later is for nobody.
            "shut" => {
                connection.shutdown(Shutdown::Both)?;
                std::thread::sleep(Duration::from_secs(1));
                return Ok(());
            }
            // Reads to the end, then goes on saying something until nobody can hear it, and remembers how that showed.
            "insist" => {
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                let ended = attend(&mut reader).and_then(|_bytes| insist(writer));
                note(&ended.map_or_else(|error| error_name(&error), |()| "end".to_owned()));
                return Ok(());
            }
            // Never reads again.
            "deaf" => {
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                loop {
                    std::thread::park();
                }
            }
            // Reads to the end, whatever comes, and remembers which that was; says then once more who is there.
            "attend" => {
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                let ended = attend(&mut reader);
                let how = ended.as_ref().map_or_else(error_name, |_bytes| "end".to_owned());
                note(&how);
                let line = format!("{name} {} {}\n", connection.peer_addr()?, ended?);
                return writer.write_all(line.as_bytes());
            }
            // Says that it says no more, and only then reads to the end, which it remembers.
            "finish" => {
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                connection.shutdown(Shutdown::Write)?;
                let heard = attend(&mut reader);
                let how = heard.map_or_else(|error| error_name(&error), |bytes| format!("{bytes} bytes"));
                note(&how);
                return Ok(());
            }
            "attended" => {
                let all = ATTENDED.lock().unwrap_or_else(PoisonError::into_inner).clone();
                writer.write_all(format!("{}\n", serde_json::to_string(&all)?).as_bytes())?;
            }
            // Says more than anybody hears.
            "pump" => {
                writer.write_all(format!("{name} {peer}\n").as_bytes())?;
                let chunk = vec![b'x'; 64 << 10];
                loop {
                    writer.write_all(&chunk)?;
                }
            }
            other => return writer.write_all(format!("unknown command {other}\n").as_bytes()),
        }
        line.clear();
    }
    Ok(())
}

/// Reads to the end, and says how many bytes came.
fn attend(reader: &mut impl Read) -> io::Result<u64> {
    io::copy(reader, &mut io::sink())
}

fn insist(mut writer: impl Write) -> io::Result<()> {
    // Not before the peer has seen what its own end looks like; and for longer than any of the tests waits.
    for _ in 0..1_000 {
        std::thread::sleep(Duration::from_millis(20));
        writer.write_all(b"still here\n")?;
    }
    Ok(())
}

/// Remembers how a connection has ended.
fn note(how: &str) {
    let mut all = ATTENDED.lock().unwrap_or_else(PoisonError::into_inner);
    *all.entry(how.to_owned()).or_default() += 1;
}

fn echo(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n])?,
        }
    }
}

/// Sends one command and reads the line that answers it.
pub(crate) fn ask(mut connection: &TcpStream, command: &str) -> io::Result<String> {
    connection.write_all(command.as_bytes())?;
    let (mut answer, mut chunk) = (Vec::with_capacity(128), [0; 128]);
    while answer.last() != Some(&b'\n') {
        match connection.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => answer.extend_from_slice(&chunk[..n]),
        }
    }
    answer.pop();
    String::from_utf8(answer).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Connects, asks, closes.
pub(crate) struct Dialler {
    timeout: Option<Duration>,
    mapped: bool,
}

impl Dialler {
    pub(crate) fn new(run: &Loop) -> Self {
        let timeout = (run.timeout_ms > 0).then(|| Duration::from_millis(run.timeout_ms));
        Self { timeout, mapped: run.mapped }
    }
}

impl Try for Dialler {
    fn attempt(&mut self, to: SocketAddr) -> Result<Answer, Failed> {
        let (to, started) = (crate::mapped(to, self.mapped), Instant::now());
        let connected = match self.timeout {
            Some(timeout) => TcpStream::connect_timeout(&to, timeout),
            None => TcpStream::connect(to),
        };
        let connection = connected.map_err(|e| Failed("connect", e))?;
        let connect = started.elapsed();
        // The blocking loop is for measuring: it makes no further system calls.
        let mut peer = to;
        if self.timeout.is_some() {
            connection.set_read_timeout(self.timeout).map_err(|e| Failed("connect", e))?;
            peer = connection.peer_addr().map_err(|e| Failed("getpeername", e))?;
        }
        let line = ask(&connection, "who\n").map_err(|e| Failed("receive", e))?;
        Ok(Answer { line, peer, connect })
    }
}
