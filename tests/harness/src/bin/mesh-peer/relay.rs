//! A line between agent and control plane that is slow, dead, or wrong.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use mesh_harness::report::Listening;

/// What the line does to what it carries.
#[derive(clap::Args, Clone)]
pub(crate) struct Relay {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    to: SocketAddr,
    /// Hold every chunk back for this long, in both directions.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Answer with noise instead of the other end's words.
    #[arg(long)]
    garbage: bool,
    /// Change some of the bytes that come back.
    #[arg(long)]
    corrupt: bool,
    /// Accept, and never say anything.
    #[arg(long)]
    hang: bool,
}

/// Listens, says so, and relays until it is killed.
pub(crate) fn run(relay: &Relay) -> anyhow::Result<()> {
    let listener = TcpListener::bind(relay.listen)?;
    crate::print(&Listening { listening: vec![listener.local_addr()?] })?;
    for client in listener.incoming().flatten() {
        let relay = relay.clone();
        std::thread::spawn(move || {
            // Either end may go away whenever it likes.
            drop(carry(&client, &relay));
        });
    }
    Ok(())
}

fn carry(mut client: &TcpStream, relay: &Relay) -> io::Result<()> {
    if relay.hang {
        return io::copy(&mut client, &mut io::sink()).map(drop);
    }
    if relay.garbage {
        let noise: Vec<u8> = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        client.write_all(&noise)?;
        return client.shutdown(Shutdown::Both);
    }
    let server = TcpStream::connect(relay.to)?;
    let delay = Duration::from_millis(relay.delay_ms);
    std::thread::scope(|scope| {
        let up = scope.spawn(|| copy(client, &server, delay, false));
        let down = copy(&server, client, delay, relay.corrupt);
        drop(up.join());
        down
    })
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, delay: Duration, corrupt: bool) -> io::Result<()> {
    let (mut chunk, mut carried) = (vec![0; 16 << 10], 0_usize);
    loop {
        let length = from.read(&mut chunk)?;
        if length == 0 {
            return to.shutdown(Shutdown::Write);
        }
        std::thread::sleep(delay);
        // The preface passes, so that a connection comes about; then one byte in 97 is wrong.
        if corrupt {
            let wrong = (0..length).filter(|i| carried + i > 120 && (carried + i).is_multiple_of(97));
            wrong.for_each(|i| chunk[i] ^= 0x55);
        }
        carried += length;
        to.write_all(&chunk[..length])?;
    }
}
