//! Driving `mesh-peer`: servers that say who they are, clients that report what they saw.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use serde::de::DeserializeOwned;

use crate::pod::{Pod, PodPlan};
use crate::process::Process;
use crate::report::{Attempts, Change, Held, Listening, Raw, Stream};

impl PodPlan {
    /// Its IPv4 address with a port.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses()[0], port)
    }

    /// Its IPv6 address with a port.
    pub fn address6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.addresses()[1], port)
    }
}

/// A server in a pod, listening on IPv4 and IPv6.
pub fn tcp_echo(pod: &Pod, name: &str, port: u16) -> anyhow::Result<Process> {
    serve(pod, "tcp-echo", name, &both(port), 0)
}

/// A server of `threads` threads that each serve one connection at a time: the least work per connection.
pub fn tcp_echo_serial(pod: &Pod, name: &str, port: u16, threads: usize) -> anyhow::Result<Process> {
    serve(pod, "tcp-echo", name, &both(port), threads)
}

/// A UDP server in a pod. It listens on the pod's own addresses, so that answers come from where they are expected.
pub fn udp_echo(pod: &Pod, name: &str, port: u16) -> anyhow::Result<Process> {
    serve(pod, "udp-echo", name, &pod.addresses().map(|ip| SocketAddr::new(ip, port)), 0)
}

/// A TCP server on addresses of choice. The name `@local` makes it answer with the address that was called.
pub fn tcp_echo_on(pod: &Pod, name: &str, listen: &[SocketAddr]) -> anyhow::Result<Process> {
    serve(pod, "tcp-echo", name, listen, 0)
}

/// A TCP server that speaks first.
pub fn tcp_greeter(pod: &Pod, name: &str, port: u16) -> anyhow::Result<Process> {
    let mut arguments = vec!["tcp-echo".into(), "--greet".into(), "--name".into(), name.into()];
    for address in both(port) {
        arguments.extend(["--listen".into(), address.to_string()]);
    }
    let mut process = pod.peer(&arguments)?;
    let _bound: Listening = report(&mut process)?;
    Ok(process)
}

/// Connections that say what no good client would: `how` are arguments of `mesh-peer raw`.
pub fn raw(pod: &Pod, to: &SocketAddr, how: &[&str]) -> anyhow::Result<Raw> {
    report(&mut start_raw(pod, to, how)?)
}

/// The same, for connections that are held.
pub fn raw_held(pod: &Pod, to: &SocketAddr, how: &[&str]) -> anyhow::Result<(RawHolder, Raw)> {
    let mut process = start_raw(pod, to, &[how, &["--then", "hold"]].concat())?;
    let begun = report(&mut process)?;
    Ok((RawHolder { process }, begun))
}

fn start_raw(pod: &Pod, to: &SocketAddr, how: &[&str]) -> anyhow::Result<Process> {
    let mut arguments = vec!["raw".to_owned(), "--to".into(), to.to_string()];
    arguments.extend(how.iter().map(|&argument| argument.to_owned()));
    pod.peer(&arguments)
}

/// Connections of [`raw_held`].
#[derive(Debug)]
pub struct RawHolder {
    process: Process,
}

impl RawHolder {
    /// Hears what has come of them.
    pub fn finish(mut self) -> anyhow::Result<Raw> {
        self.process.say("now")?;
        report(&mut self.process)
    }
}

fn both(port: u16) -> [SocketAddr; 1] {
    // Dual stack: IPv4 arrives as a mapped address.
    [SocketAddr::new(IpAddr::from([0_u16; 8]), port)]
}

fn serve(pod: &Pod, kind: &str, name: &str, on: &[SocketAddr], threads: usize) -> anyhow::Result<Process> {
    let mut arguments =
        vec![kind.into(), "--name".into(), name.into(), "--threads".into(), threads.to_string()];
    for address in on {
        arguments.extend(["--listen".into(), address.to_string()]);
    }
    let mut process = pod.peer(&arguments)?;
    let line = process.line().with_context(|| format!("server {name}"))?;
    let _bound: Listening = serde_json::from_str(&line).with_context(|| format!("server {name}: {line}"))?;
    Ok(process)
}

/// A client loop that is being put together.
#[derive(Debug)]
#[must_use]
pub struct Client<'a> {
    pod: &'a Pod,
    arguments: Vec<String>,
}

/// A loop of TCP connections from `pod`: one, unless told otherwise.
pub fn connect<'a>(pod: &'a Pod, to: &SocketAddr) -> Client<'a> {
    Client { pod, arguments: vec!["connect".into()] }.to(to)
}

/// A loop of datagrams over sockets that are not connected.
pub fn udp<'a>(pod: &'a Pod, to: &SocketAddr) -> Client<'a> {
    Client { pod, arguments: vec!["udp".into()] }.to(to)
}

/// A loop of datagrams over connected sockets.
pub fn udp_connected<'a>(pod: &'a Pod, to: &SocketAddr) -> Client<'a> {
    udp(pod, to).flag("--connected")
}

impl Client<'_> {
    /// One more destination, taken in turn.
    pub fn to(self, to: &SocketAddr) -> Self {
        self.option("--to", to)
    }

    /// How many attempts.
    pub fn count(self, count: u64) -> Self {
        self.option("--count", count)
    }

    /// For how long, however many attempts that are.
    pub fn duration(self, duration: Duration) -> Self {
        self.option("--count", 0).option("--duration-ms", duration.as_millis())
    }

    /// How many at a time.
    pub fn concurrency(self, threads: usize) -> Self {
        self.option("--concurrency", threads)
    }

    /// Pause between the attempts of a thread.
    pub fn interval(self, pause: Duration) -> Self {
        self.option("--interval-us", pause.as_micros())
    }

    /// How long one attempt may take.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.option("--timeout-ms", timeout.as_millis())
    }

    /// Plain blocking calls without a limit.
    pub fn blocking(self) -> Self {
        self.option("--timeout-ms", 0)
    }

    /// IPv4 through IPv6 sockets.
    pub fn mapped(self) -> Self {
        self.flag("--mapped")
    }

    /// One UDP socket for all datagrams of a thread.
    pub fn one_socket(self) -> Self {
        self.flag("--one-socket")
    }

    /// Runs to the end.
    pub fn run(self) -> anyhow::Result<Attempts> {
        report(&mut self.pod.peer(&self.arguments)?)
    }

    /// Runs until [`Running::finish`], or until the count is reached.
    pub fn start(self) -> anyhow::Result<Running> {
        let client = self.flag("--until-eof");
        Ok(Running { process: client.pod.peer(&client.arguments)? })
    }

    fn option(mut self, name: &str, value: impl ToString) -> Self {
        // The last count wins, so that later calls overrule earlier ones; destinations add up.
        if name != "--to"
            && let Some(at) = self.arguments.iter().position(|argument| argument == name)
        {
            self.arguments.drain(at..at + 2);
        }
        self.arguments.extend([name.into(), value.to_string()]);
        self
    }

    fn flag(mut self, name: &str) -> Self {
        self.arguments.push(name.into());
        self
    }
}

/// A client loop in the background.
#[derive(Debug)]
pub struct Running {
    process: Process,
}

impl Running {
    /// Ends the loop, and returns what it saw.
    pub fn finish(mut self) -> anyhow::Result<Attempts> {
        self.process.end_input();
        report(&mut self.process)
    }

    /// Waits for the loop to reach its count.
    pub fn wait(mut self) -> anyhow::Result<Attempts> {
        report(&mut self.process)
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.process.ended()?.is_some())
    }
}

/// Round trips of `size` bytes on one connection.
pub fn request(pod: &Pod, to: &SocketAddr, size: usize, duration: Duration) -> anyhow::Result<Stream> {
    stream(pod, "request", to, &[("--size", size as u64), ("--duration-ms", duration.as_millis() as u64)])
}

/// As many bytes as one connection takes, in writes of `size`.
pub fn throughput(pod: &Pod, to: &SocketAddr, size: usize, duration: Duration) -> anyhow::Result<Stream> {
    stream(pod, "throughput", to, &[("--size", size as u64), ("--duration-ms", duration.as_millis() as u64)])
}

/// As many bytes as `connections` connections take together, in writes of `size`.
pub fn throughput_of(
    pod: &Pod,
    to: &SocketAddr,
    connections: usize,
    size: usize,
    duration: Duration,
) -> anyhow::Result<Stream> {
    let options = [
        ("--size", size as u64),
        ("--connections", connections as u64),
        ("--duration-ms", duration.as_millis() as u64),
    ];
    stream(pod, "throughput", to, &options)
}

/// `bytes` bytes there and back over a connection that the client half-closes, every one compared.
pub fn transfer(pod: &Pod, to: &SocketAddr, bytes: u64, seed: u64) -> anyhow::Result<Stream> {
    stream(pod, "transfer", to, &[("--bytes", bytes), ("--seed", seed)])
}

fn stream(pod: &Pod, kind: &str, to: &SocketAddr, options: &[(&str, u64)]) -> anyhow::Result<Stream> {
    let mut arguments = vec![kind.to_owned(), "--to".into(), to.to_string()];
    for (name, value) in options {
        arguments.extend([(*name).to_owned(), value.to_string()]);
    }
    report(&mut pod.peer(&arguments)?)
}

/// A long stream that goes on beside others; see [`transfer`].
pub fn start_transfer(pod: &Pod, to: &SocketAddr, bytes: u64, seed: u64) -> anyhow::Result<Transfer> {
    let arguments =
        ["transfer", "--to", &to.to_string(), "--bytes", &bytes.to_string(), "--seed", &seed.to_string()];
    Ok(Transfer { process: pod.peer(&arguments.map(str::to_owned))? })
}

/// A transfer in the background.
#[derive(Debug)]
pub struct Transfer {
    process: Process,
}

impl Transfer {
    /// Waits for its end.
    pub fn wait(mut self) -> anyhow::Result<Stream> {
        report(&mut self.process)
    }
}

/// Connections that stay open.
#[derive(Debug)]
pub struct Holder {
    process: Process,
}

/// Opens `count` connections at once and keeps them; the report says who accepted them.
pub fn hold(pod: &Pod, to: &SocketAddr, count: usize) -> anyhow::Result<(Holder, Held)> {
    hold_with(pod, to, count, &[])
}

/// As [`hold`], but each connection is answered before the next is opened.
pub fn hold_in_turn(pod: &Pod, to: &SocketAddr, count: usize) -> anyhow::Result<(Holder, Held)> {
    hold_with(pod, to, count, &["--in-turn".to_owned()])
}

fn hold_with(pod: &Pod, to: &SocketAddr, count: usize, how: &[String]) -> anyhow::Result<(Holder, Held)> {
    let arguments = ["hold".to_owned(), "--to".into(), to.to_string(), "--count".into(), count.to_string()];
    let mut process = pod.peer(&[&arguments, how].concat())?;
    let held = report(&mut process)?;
    Ok((Holder { process }, held))
}

impl Holder {
    /// Asks over every connection who is there.
    pub fn ask(&mut self) -> anyhow::Result<Held> {
        self.process.say("again")?;
        report(&mut self.process)
    }

    /// Closes them all.
    pub fn close(mut self) -> anyhow::Result<()> {
        self.process.end_input();
        self.process.wait(Duration::from_secs(10))?;
        Ok(())
    }
}

/// A client that connects all the time, and tells whenever another server answers.
#[derive(Debug)]
pub struct Watch {
    process: Process,
}

/// Starts watching who answers at `to`; the first [`Watch::change`] says who does now.
pub fn watch(pod: &Pod, to: &SocketAddr) -> anyhow::Result<Watch> {
    Ok(Watch { process: pod.peer(&["watch".to_owned(), "--to".into(), to.to_string()])? })
}

impl Watch {
    /// Waits for the next change.
    pub fn change(&mut self) -> anyhow::Result<Change> {
        report(&mut self.process)
    }
}

fn report<T: DeserializeOwned>(process: &mut Process) -> anyhow::Result<T> {
    let line = process.line()?;
    serde_json::from_str(&line).with_context(|| line.clone())
}
