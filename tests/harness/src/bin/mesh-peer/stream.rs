//! One established connection: round trips, throughput, byte-exact transfer.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use mesh_harness::report::{Latency, Stream as Report};
use mesh_harness::sys::own_cpu_seconds;

use crate::Stream;
use crate::tcp::ask;

fn open(args: &Stream, command: &str) -> io::Result<(TcpStream, Report)> {
    let connection = TcpStream::connect(args.to)?;
    connection.set_nodelay(true)?;
    let answer = ask(&connection, command)?;
    let name = answer.split(' ').next().unwrap_or("").to_owned();
    let peer = connection.peer_addr()?.to_string();
    Ok((connection, Report { name, peer, exact: true, ..Report::default() }))
}

/// Sends `size` bytes, waits until they are back, again until the time is over.
pub(crate) fn request(args: &Stream) -> io::Result<Report> {
    let (mut connection, mut report) = open(args, "echo\n")?;
    let (mut bytes, mut back) = (Bytes::new(args.seed), vec![0; args.size]);
    let mut sent = vec![0; args.size];
    let (mut times, begin, cpu) = (Vec::with_capacity(1 << 16), Instant::now(), own_cpu_seconds());
    while begin.elapsed() < Duration::from_millis(args.duration_ms) {
        bytes.fill(&mut sent);
        let started = Instant::now();
        connection.write_all(&sent)?;
        connection.read_exact(&mut back)?;
        times.push(started.elapsed());
        report.exact &= sent == back;
        report.sent += sent.len() as u64;
        report.received += back.len() as u64;
    }
    report.elapsed_s = begin.elapsed().as_secs_f64();
    report.cpu_s = own_cpu_seconds() - cpu;
    report.round_trip = Latency::of(&mut times);
    Ok(report)
}

/// Writes until the time is over; the other end counts. Every connection has a thread, and all begin when the last is open.
pub(crate) fn throughput(args: &Stream) -> io::Result<Report> {
    let opened: Vec<_> =
        (0..args.connections.max(1)).map(|_| open(args, "sink\n")).collect::<io::Result<_>>()?;
    let (begin, cpu) = (Instant::now(), own_cpu_seconds());
    let reports = std::thread::scope(|scope| {
        let flood = |(connection, report)| scope.spawn(move || flood(args, connection, report, begin));
        let threads: Vec<_> = opened.into_iter().map(flood).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_panic| Err(io::Error::other("a writer panicked"))));
        joined.collect::<io::Result<Vec<_>>>()
    })?;
    let cpu_s = own_cpu_seconds() - cpu;
    let all = Report { exact: true, cpu_s, ..Report::default() };
    Ok(reports.into_iter().fold(all, |all, one| Report {
        sent: all.sent + one.sent,
        received: all.received + one.received,
        exact: all.exact && one.exact,
        elapsed_s: all.elapsed_s.max(one.elapsed_s),
        cpu_s,
        ..one
    }))
}

fn flood(args: &Stream, mut connection: TcpStream, mut report: Report, begin: Instant) -> io::Result<Report> {
    let mut chunk = vec![0; args.size];
    Bytes::new(args.seed).fill(&mut chunk);
    while begin.elapsed() < Duration::from_millis(args.duration_ms) {
        connection.write_all(&chunk)?;
        report.sent += chunk.len() as u64;
    }
    connection.shutdown(Shutdown::Write)?;
    let mut counted = String::new();
    connection.read_to_string(&mut counted)?;
    report.elapsed_s = begin.elapsed().as_secs_f64();
    report.received = counted.trim().parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    report.exact = report.received == report.sent;
    Ok(report)
}

/// Sends bytes in writes of odd sizes, half-closes, and compares what comes back with what was sent.
pub(crate) fn transfer(args: &Stream) -> io::Result<Report> {
    let (connection, mut report) = open(args, "echo\n")?;
    let (begin, cpu) = (Instant::now(), own_cpu_seconds());
    std::thread::scope(|scope| -> io::Result<()> {
        let sender = scope.spawn(|| send_exactly(&connection, args));
        let (mut expected, mut back) = (Bytes::new(args.seed), vec![0; 32 << 10]);
        let mut reader = &connection;
        loop {
            let length = reader.read(&mut back)?;
            if length == 0 {
                break;
            }
            report.received += length as u64;
            let mut want = vec![0; length];
            expected.fill(&mut want);
            report.exact &= want == back[..length];
        }
        report.sent = sender.join().map_err(|_panic| io::Error::other("the sender panicked"))??;
        Ok(())
    })?;
    report.exact &= report.sent == report.received && report.sent == args.bytes;
    report.elapsed_s = begin.elapsed().as_secs_f64();
    report.cpu_s = own_cpu_seconds() - cpu;
    Ok(report)
}

fn send_exactly(mut connection: &TcpStream, args: &Stream) -> io::Result<u64> {
    let (mut bytes, mut sizes, mut sent) = (Bytes::new(args.seed), Bytes::new(!args.seed), 0_u64);
    while sent < args.bytes {
        let size = (sizes.next_u64() % 20_000 + 1).min(args.bytes - sent);
        let mut chunk = vec![0; size as usize];
        bytes.fill(&mut chunk);
        connection.write_all(&chunk)?;
        sent += size;
    }
    connection.shutdown(Shutdown::Write)?;
    Ok(sent)
}

/// A reproducible stream of bytes (xorshift64*): the same however it is cut.
struct Bytes {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Bytes {
    fn new(seed: u64) -> Self {
        Self { state: seed.max(1), word: [0; 8], used: 8 }
    }

    fn next_u64(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn fill(&mut self, into: &mut [u8]) {
        for byte in into {
            if self.used == self.word.len() {
                self.word = self.next_u64().to_le_bytes();
                self.used = 0;
            }
            *byte = self.word[self.used];
            self.used += 1;
        }
    }
}
