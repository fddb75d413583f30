//! What crosses a network: the payload of TCP segments, as a tap on the cable sees it.

use std::io::Read;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

const ETH_P_ALL: u16 = 3;
const TCP: u8 = 6;
/// Room for what the kernel has not cut into packets yet.
const LARGEST: usize = 1 << 17;

/// A segment with data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// The data.
    pub payload: Vec<u8>,
}

/// A tap on every device of a network namespace, until it is finished or dropped.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<Segment>>>>,
}

impl Capture {
    /// Begins now.
    pub fn start(netns: &Netns) -> Result<Self> {
        // Without the link layer's header: what is read begins with that of IP.
        let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
        let open = || Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)).context("opening a tap");
        let mut socket = netns.run(open)?;
        socket.set_recv_buffer_size(8 << 20)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut segments, mut packet) = (Vec::new(), vec![0; LARGEST]);
            loop {
                match socket.read(&mut packet) {
                    Ok(length) => segments.extend(packet.get(..length).and_then(segment)),
                    Err(error) if would_block(&error) && stopped.load(Ordering::Relaxed) => {
                        return Ok(segments);
                    }
                    Err(error) if would_block(&error) => {}
                    Err(error) => return Err(error).context("reading a tap"),
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// What was seen; a forwarded segment once on each device.
    pub fn finish(mut self) -> Result<Vec<Segment>> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a tap was finished twice")?;
        thread.join().map_err(|_panic| anyhow::anyhow!("the thread of a tap panicked"))?
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn would_block(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

/// The data of an IP packet, if it is TCP and has some.
fn segment(packet: &[u8]) -> Option<Segment> {
    let (source, destination, rest): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            let address = |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
            // Longer ones than the field can say have a zero there.
            let end = if length == 0 { packet.len() } else { length };
            (*packet.get(9)? == TCP).then_some((address(12)?, address(16)?, packet.get(header..end)?))?
        }
        6 => {
            let address =
                |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?).into());
            (*packet.get(6)? == TCP).then_some((address(8)?, address(24)?, packet.get(40..)?))?
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*rest.get(at)?, *rest.get(at + 1)?]));
    let header = usize::from(rest.get(12)? >> 4) * 4;
    let payload = rest.get(header..).filter(|payload| !payload.is_empty())?.to_vec();
    let (source, destination) = (SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?));
    Some(Segment { source, destination, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_read_whatever_the_length_of_its_headers() {
        let tcp =
            [&[0x30, 0x39, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x60, 0, 0, 0, 0, 0, 0, 0][..], &[1; 4], b"hi"]
                .concat();
        let mut v4 = vec![0x46, 0, 0, 50, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 0, 0, 0];
        v4.extend(&tcp);
        // What pads a short frame is not part of it.
        v4.extend([0; 6]);
        let seen = segment(&v4).unwrap();
        assert_eq!(
            (seen.source, seen.destination),
            ("10.0.0.1:12345".parse().unwrap(), "10.0.0.2:80".parse().unwrap())
        );
        assert_eq!(seen.payload, b"hi");
        for end in 0..v4.len() - 8 {
            assert_eq!(segment(&v4[..end]), None, "{end}");
        }
        let mut v6 = vec![0x60, 0, 0, 0, 0, 0, 6, 64];
        v6.extend([0; 15]);
        v6.push(1);
        v6.extend([0; 15]);
        v6.push(2);
        v6.extend(&tcp);
        assert_eq!(segment(&v6).unwrap().source, "[::1]:12345".parse().unwrap());
        v6[6] = 17;
        assert_eq!(segment(&v6), None);
    }
}
