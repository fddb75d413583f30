//! HTTP GET, small enough to need no client: the agent's admin socket and the metrics ports.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

const LIMIT: Duration = Duration::from_secs(20);

/// The status and the body at `path` of a server on a unix socket.
pub fn get_unix(socket: &Path, path: &str) -> anyhow::Result<(u16, String)> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(LIMIT))?;
    get(stream, path)
}

/// The status and the body at `path` of a server on a port of this thread's network.
pub fn get_tcp(server: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let stream = TcpStream::connect_timeout(&server, LIMIT).with_context(|| server.to_string())?;
    stream.set_read_timeout(Some(LIMIT))?;
    get(stream, path)
}

fn get(mut stream: impl Read + Write, path: &str) -> anyhow::Result<(u16, String)> {
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse(&answer)
}

fn parse(answer: &[u8]) -> anyhow::Result<(u16, String)> {
    let end =
        answer.windows(4).position(|four| four == b"\r\n\r\n").context("an HTTP answer without a head")?;
    let (head, mut body) = (String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase(), &answer[end + 4..]);
    let status = head.split(' ').nth(1).context("an HTTP answer without a status")?.parse()?;
    if !head.contains("transfer-encoding: chunked") {
        return Ok((status, String::from_utf8(body.to_vec())?));
    }
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|two| two == b"\r\n").context("a chunk without a size")?;
        let size = usize::from_str_radix(std::str::from_utf8(&body[..line])?.trim(), 16)?;
        let (from, to) = (line + 2, line + 2 + size);
        if size == 0 {
            return Ok((status, String::from_utf8(whole)?));
        }
        if body.len() < to + 2 {
            bail!("a chunk is cut short");
        }
        whole.extend_from_slice(&body[from..to]);
        body = &body[to + 2..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_and_a_chunked_answer() -> anyhow::Result<()> {
        let plain = parse(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")?;
        assert_eq!(plain, (200, "hi".into()));
        let chunked =
            parse(b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n")?;
        assert_eq!(chunked, (503, "hi!".into()));
        Ok(())
    }

    #[test]
    fn a_cut_chunk_is_an_error() {
        assert!(parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhi").is_err());
    }
}
