//! The applications of the tests: servers that say who they are, and clients that report what they saw.
//!
//! A separate program, since membership of a cgroup belongs to a process. Every report is one JSON line.

mod attempts;
mod enter;
mod hold;
mod raw;
mod relay;
mod stream;
mod tcp;
mod udp;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Servers and clients for the tests of the mesh")]
struct Cli {
    #[command(subcommand)]
    command: Peer,
}

#[derive(Subcommand)]
enum Peer {
    /// A TCP server that answers `who`, `echo`, `inline`, `sink`, `deaf`, `attend`, `attended` and `pump`, and ends by `close`, `reset`, `leave`,
    /// `gush`, `shut`, `insist` and `finish`.
    TcpEcho(Serve),
    /// A UDP server that answers with its name, the source it saw, and the payload.
    UdpEcho(Serve),
    /// Connects, asks who answers, closes; again and again.
    Connect(Loop),
    /// Sends datagrams and waits for each answer.
    Udp {
        #[command(flatten)]
        run: Loop,
        /// connect() the socket, and send() instead of sendto().
        #[arg(long)]
        connected: bool,
        /// One socket for all datagrams of a thread instead of one each.
        #[arg(long)]
        one_socket: bool,
    },
    /// Round trips on one established connection.
    Request(Stream),
    /// Sends as much as one connection takes.
    Throughput(Stream),
    /// Sends bytes, half-closes, and checks every byte that comes back.
    Transfer(Stream),
    /// Holds connections open; each line on stdin asks all of them who is there.
    Hold {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value_t = 1)]
        count: usize,
        /// Each is asked before the next is opened, instead of all at once.
        #[arg(long)]
        in_turn: bool,
    },
    /// Connects all the time, and reports whenever another server answers.
    Watch {
        #[arg(long)]
        to: SocketAddr,
    },
    /// Says what no good client would say, and ends as none would.
    Raw(raw::Raw),
    /// Carries TCP connections, slowly or wrongly.
    Relay(relay::Relay),
    /// Starts a command in a network namespace and a cgroup.
    In {
        #[arg(long)]
        netns: PathBuf,
        #[arg(long)]
        cgroup: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

#[derive(Args, Clone)]
struct Serve {
    /// What the server calls itself.
    #[arg(long)]
    name: String,
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
    /// Speak first: a line as for `who`.
    #[arg(long)]
    greet: bool,
    /// Threads that each serve one connection at a time; 0: a thread for every connection.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Args, Clone)]
struct Loop {
    /// Destinations, taken in turn.
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    /// Attempts in all; 0: until the duration is over or stdin ends.
    #[arg(long, default_value_t = 1)]
    count: u64,
    #[arg(long, default_value_t = 0)]
    duration_ms: u64,
    /// Stop when stdin ends.
    #[arg(long)]
    until_eof: bool,
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Pause between attempts of a thread.
    #[arg(long, default_value_t = 0)]
    interval_us: u64,
    /// Give up connecting or waiting after this long; 0: blocking calls without a limit.
    #[arg(long, default_value_t = 5000)]
    timeout_ms: u64,
    /// Dial IPv4 destinations through IPv6 sockets (::ffff:a.b.c.d).
    #[arg(long)]
    mapped: bool,
}

#[derive(Args, Clone)]
struct Stream {
    #[arg(long)]
    to: SocketAddr,
    /// Bytes of one request, or of one write.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Connections at a time, for `throughput`.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Bytes in all, for `transfer`.
    #[arg(long, default_value_t = 1 << 20)]
    bytes: u64,
    #[arg(long, default_value_t = 1000)]
    duration_ms: u64,
    /// Seeds the bytes that are sent.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    mesh_harness::sys::raise_open_files()?;
    match Cli::parse().command {
        Peer::TcpEcho(serve) => tcp::serve(&serve),
        Peer::UdpEcho(serve) => udp::serve(&serve),
        Peer::Connect(run) => print(&attempts::run(&run, || tcp::Dialler::new(&run))),
        Peer::Udp { run, connected, one_socket } => {
            print(&attempts::run(&run, || udp::Caller::new(&run, connected, one_socket)))
        }
        Peer::Request(args) => print(&stream::request(&args)?),
        Peer::Throughput(args) => print(&stream::throughput(&args)?),
        Peer::Transfer(args) => print(&stream::transfer(&args)?),
        Peer::Hold { to, count, in_turn } => hold::run(to, count, in_turn),
        Peer::Watch { to } => hold::watch(to),
        Peer::Raw(args) => raw::run(&args),
        Peer::Relay(line) => relay::run(&line),
        Peer::In { netns, cgroup, command } => enter::run(&netns, &cgroup, &command),
    }
}

/// Writes one report as a line.
fn print(report: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

/// `to` as an IPv6 socket dials it.
fn mapped(to: SocketAddr, mapped: bool) -> SocketAddr {
    match to {
        SocketAddr::V4(v4) if mapped => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        SocketAddr::V4(_) | SocketAddr::V6(_) => to,
    }
}
