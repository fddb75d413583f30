//! Watching the world change: over connections that stay open, and by ever new ones.

use std::io::{self, BufRead};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mesh_harness::report::{Change, Held, error_name};
use mesh_harness::sys::monotonic_nanoseconds;

use crate::tcp::ask;

/// Opens `count` connections, reports, and asks all of them again for every line on stdin.
pub(crate) fn run(to: SocketAddr, count: usize, in_turn: bool) -> anyhow::Result<()> {
    let open = || -> io::Result<TcpStream> {
        let connection = TcpStream::connect(to)?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        if in_turn {
            ask(&connection, "who\n")?;
        }
        Ok(connection)
    };
    let connections: Vec<_> = (0..count).map(|_| open()).collect();
    crate::print(&ask_all(&connections))?;
    for line in io::stdin().lock().lines() {
        line?;
        crate::print(&ask_all(&connections))?;
    }
    Ok(())
}

/// Connects every fraction of a millisecond until it is killed.
pub(crate) fn watch(to: SocketAddr) -> anyhow::Result<()> {
    let mut last = String::new();
    loop {
        let answer = TcpStream::connect(to).and_then(|connection| ask(&connection, "who\n"));
        let name = match answer {
            Ok(line) => line.split(' ').next().unwrap_or("").to_owned(),
            Err(error) => error_name(&error),
        };
        if name != last {
            crate::print(&Change { at_ns: monotonic_nanoseconds(), name: name.clone() })?;
            last = name;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn ask_all(connections: &[io::Result<TcpStream>]) -> Held {
    let mut held = Held::default();
    for connection in connections {
        let answer = match connection {
            Ok(connection) => ask(connection, "who\n").map_err(|e| error_name(&e)),
            Err(error) => Err(error_name(error)),
        };
        match answer {
            Ok(line) => {
                held.alive += 1;
                let name = line.split(' ').next().unwrap_or("").to_owned();
                *held.by_name.entry(name).or_default() += 1;
            }
            Err(error) => *held.dead.entry(error).or_default() += 1,
        }
    }
    held
}
