//! Connections that say what no good client would say, and end as no good client would.

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context;
use mesh_harness::report::{Raw as Report, error_name};
use mesh_harness::sys::reset_on_close;

/// What the connections do.
#[derive(clap::Args, Clone)]
pub(crate) struct Raw {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Hear a line before saying anything.
    #[arg(long)]
    hear_first: bool,
    /// Say this, and hear a line.
    #[arg(long)]
    ask: Option<String>,
    /// Then say these bytes, in hexadecimal.
    #[arg(long, default_value = "")]
    hex: String,
    /// Then say the last of that again and again, for so many bytes in all, or until nobody takes them.
    #[arg(long, default_value_t = 0)]
    flood: u64,
    /// Then say one byte out of band (`MSG_OOB`), and the bytes in hexadecimal once more.
    #[arg(long)]
    urgent: bool,
    #[arg(long, value_enum, default_value_t = Then::Hear)]
    then: Then,
    /// How long to wait for whatever is to come.
    #[arg(long, default_value_t = 3000)]
    timeout_ms: u64,
}

/// How a connection goes on once all has been said.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Hear all there is.
    Hear,
    /// Say that there is no more, and hear all there is.
    End,
    /// Reset it.
    Reset,
    /// Close it.
    Close,
    /// Close it once something has come that nobody has read: the kernel resets it then.
    Leave,
    /// Shut it down in both directions, and hear all there is.
    Shut,
    /// Keep all of them until a line comes on stdin, then hear.
    Hold,
}

/// Does that, and reports.
pub(crate) fn run(raw: &Raw) -> anyhow::Result<()> {
    let bytes = bytes(&raw.hex)?;
    let mut report = Report::default();
    let (mut held, mut kept) = (Vec::new(), Vec::new());
    for _ in 0..raw.count {
        match begin(raw, &bytes, &mut report) {
            Ok(connection) if raw.then == Then::Hold => held.push(connection),
            Ok(connection) => {
                finish(raw, &connection, &mut report);
                if raw.then == Then::Shut {
                    // Open to the end of the program, so that it is not close() that the peer sees.
                    kept.push(connection);
                }
            }
            Err(error) => report.ended(&error_name(&error)),
        }
    }
    crate::print(&report)?;
    if raw.then == Then::Hold {
        // An ended stdin says the same.
        io::stdin().lock().read_line(&mut String::new())?;
        held.iter().for_each(|connection| finish(raw, connection, &mut report));
        crate::print(&report)?;
    }
    Ok(())
}

fn begin(raw: &Raw, bytes: &[u8], report: &mut Report) -> io::Result<TcpStream> {
    let patience = Duration::from_millis(raw.timeout_ms);
    let mut connection = TcpStream::connect_timeout(&raw.to, patience)?;
    report.opened += 1;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    if raw.hear_first {
        hear_line(&connection, report)?;
    }
    if let Some(ask) = &raw.ask {
        connection.write_all(format!("{ask}\n").as_bytes())?;
        hear_line(&connection, report)?;
    }
    connection.write_all(bytes)?;
    report.said += bytes.len() as u64;
    let chunk: Vec<u8> =
        if bytes.is_empty() { vec![b'x'; 1 << 16] } else { bytes.repeat((1 << 16) / bytes.len() + 1) };
    let mut left = raw.flood;
    while left > 0 {
        let part = &chunk[..chunk.len().min(left as usize)];
        match connection.write(part) {
            Ok(said) => {
                left -= said as u64;
                report.said += said as u64;
            }
            // Nobody takes any more.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                report.blocked += 1;
                break;
            }
            Err(error) => return Err(error),
        }
    }
    if raw.urgent {
        socket2::SockRef::from(&connection).send_out_of_band(b"!")?;
        connection.write_all(bytes)?;
        report.said += bytes.len() as u64;
    }
    Ok(connection)
}

/// A line, byte by byte, so that nothing after it is lost.
fn hear_line(mut connection: &TcpStream, report: &mut Report) -> io::Result<()> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.last() != Some(&b'\n') {
        connection.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    report.heard += line.len() as u64;
    report.lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
    Ok(())
}

fn finish(raw: &Raw, connection: &TcpStream, report: &mut Report) {
    let ended = match raw.then {
        Then::Hear | Then::Hold => hear(connection, report),
        Then::End => shut(connection, Shutdown::Write, report),
        Then::Shut => shut(connection, Shutdown::Both, report),
        Then::Close => "closed".to_owned(),
        Then::Leave => {
            connection.peek(&mut [0]).map_or_else(|error| error_name(&error), |_some| "left".into())
        }
        Then::Reset => {
            reset_on_close(connection).map_or_else(|error| error_name(&error), |()| "reset".into())
        }
    };
    report.ended(&ended);
}

fn shut(connection: &TcpStream, how: Shutdown, report: &mut Report) -> String {
    match connection.shutdown(how) {
        Ok(()) => hear(connection, report),
        Err(error) => error_name(&error),
    }
}

/// Reads to the end, and says which that was.
fn hear(mut connection: &TcpStream, report: &mut Report) -> String {
    let (mut last, mut chunk) = (Vec::new(), [0; 4096]);
    let ended = loop {
        match connection.read(&mut chunk) {
            Ok(0) => break "end".to_owned(),
            Ok(n) => {
                report.heard += n as u64;
                if last.len() < chunk.len() {
                    last.extend_from_slice(&chunk[..n]);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break "silence".to_owned(),
            Err(error) => break error_name(&error),
        }
    };
    report.lines.extend(String::from_utf8_lossy(&last).lines().take(10).map(str::to_owned));
    ended
}

fn bytes(hex: &str) -> anyhow::Result<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair)?, 16).map_err(anyhow::Error::from);
    digits.map(byte).collect::<Result<_, _>>().context("--hex")
}
