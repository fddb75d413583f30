//! How many connections there may be, and for how long they may do nothing.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use mesh_control::Config;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{
    client::{Shows, TOKEN, Wanted},
    management::scrape,
    manifests::*,
    subscriber::Subscriber,
    world::{PATIENCE, World, config},
};

const SECOND: Duration = Duration::from_secs(1);

async fn world(change: impl FnOnce(&mut Config)) -> World {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("web.yaml"), web()).unwrap();
    let (mut config, state) = config(dir.path());
    change(&mut config);
    World::with(dir, config, state).await
}

/// Waits until it is counted so.
async fn counted(world: &World, line: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = scrape(world, "/metrics").await;
        if metrics.lines().any(|one| one == line) {
            return;
        }
        assert!(Instant::now() < deadline, "no {line} in {metrics}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Whether the other end closes the connection within this time.
async fn ends(stream: &mut TcpStream, within: Duration) -> bool {
    let mut bytes = [0; 64];
    let read = async { while !matches!(stream.read(&mut bytes).await, Ok(0) | Err(_)) {} };
    timeout(within, read).await.is_ok()
}

#[tokio::test]
async fn who_is_silent_is_not_waited_for() {
    let world = world(|config| config.authentication_timeout = SECOND).await;
    let mut silent = TcpStream::connect(world.control.xds_address()).await.unwrap();
    let mut asking = TcpStream::connect(world.control.management_address()).await.unwrap();
    // This one has shaken hands, and then says nothing.
    let shaken = Shows::token().connect(&world).await.unwrap();
    assert!(ends(&mut silent, 3 * SECOND).await && ends(&mut asking, 3 * SECOND).await);
    counted(&world, r#"mesh_control_handshakes_failed_total{reason="timeout"} 1"#).await;
    counted(&world, r#"mesh_control_connections_ended_total{reason="unauthenticated"} 2"#).await;
    counted(&world, "mesh_control_connections 0").await;
    drop(shaken);
}

#[tokio::test]
async fn a_refused_request_makes_nobody_known() {
    let world = world(|config| config.authentication_timeout = SECOND).await;
    let shows = Shows::token_of("a token that nobody has given");
    let channel = shows.connect(&world).await.unwrap();
    assert!(shows.ask_on(channel.clone(), &Wanted::own()).await.is_err());
    counted(&world, r#"mesh_control_connections_ended_total{reason="unauthenticated"} 1"#).await;
    counted(&world, "mesh_control_connections 0").await;
    drop(channel);
}

#[tokio::test]
async fn an_address_may_have_few_strangers_and_many_agents() {
    let world = world(|config| config.max_unauthenticated_per_address = 2).await;
    // All behind one address, as by NAT.
    let mut agents = Vec::new();
    for _ in 0..5 {
        agents.push(world.subscriber().await);
    }
    let connect = async || TcpStream::connect(world.control.xds_address()).await.unwrap();
    let (mut first, mut second) = (connect().await, connect().await);
    // The oldest makes room, and an agent at the same address is not shut out by the others.
    let mut third = connect().await;
    assert!(ends(&mut first, 3 * SECOND).await);
    counted(&world, r#"mesh_control_handshakes_failed_total{reason="crowded"} 1"#).await;
    assert!(!ends(&mut second, SECOND / 4).await && !ends(&mut third, SECOND / 4).await);
    Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    assert!(ends(&mut second, 3 * SECOND).await);
    // Nor is one that has shaken hands and says nothing more kept before others.
    let shaken = Shows::token().connect(&world).await.unwrap();
    let _more = [connect().await, connect().await];
    counted(&world, r#"mesh_control_connections_ended_total{reason="crowded"} 1"#).await;
    drop(shaken);
    // Who has authenticated was not disturbed.
    world.write("web.yaml", &web().replace("10.96.0.1", "10.96.0.7"));
    for agent in &mut agents {
        assert_eq!(agent.next().await.put, [WEB]);
    }
}

#[tokio::test]
async fn who_has_shown_a_certificate_is_no_stranger() {
    let world = world(|config| config.max_unauthenticated_per_address = 1).await;
    let shown = Shows::token().ask(&world, &Wanted::own()).await.unwrap().shown();
    let channel = shown.connect(&world).await.unwrap();
    let mut strangers = Vec::new();
    for _ in 0..3 {
        strangers.push(TcpStream::connect(world.control.xds_address()).await.unwrap());
    }
    counted(&world, r#"mesh_control_handshakes_failed_total{reason="crowded"} 2"#).await;
    // It has asked for nothing so far, and its connection is still there.
    shown.ask_on(channel, &Wanted::own()).await.unwrap();
    let metrics = scrape(&world, "/metrics").await;
    assert!(!metrics.contains(r#"connections_ended_total{reason="crowded"}"#), "{metrics}");
}

/// The command, killed when the test is over.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Runs the command with so few descriptors; where agents connect, and how many it says it may have.
fn run_with(limits: &str, dir: &std::path::Path) -> (Running, SocketAddr, u64) {
    std::fs::write(dir.join("join-tokens"), format!("* {TOKEN}\n")).unwrap();
    let mut child = Command::new("sh")
        .args(["-c", &format!("{limits} && exec \"$0\" \"$@\"")])
        .args([env!("CARGO_BIN_EXE_mesh-control"), "run", "--log-format", "json"])
        .args(["--xds-address", "127.0.0.1:0", "--management-address", "127.0.0.1:0"])
        .args(["--metrics-address", "127.0.0.1:0", "--authentication-timeout", "10m"])
        .args(
            ["--manifests", "--state-dir", "--ca-dir"]
                .map(|option| [option.as_ref(), dir.as_os_str()])
                .as_flattened(),
        )
        .arg("--join-tokens")
        .arg(dir.join("join-tokens"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let running = Running(child);
    let mut field = |name: &str| {
        let value = log.find_map(|line| {
            let (_, rest) = line.split_once(&format!("\"{name}\":"))?;
            rest.split([',', '}']).next().map(|value| value.trim_matches('"').to_owned())
        });
        value.unwrap()
    };
    let descriptors = field("descriptors").parse().unwrap();
    let address = field("xds").parse().unwrap();
    // Nothing blocks for want of a reader.
    std::thread::spawn(move || log.for_each(drop));
    (running, address, descriptors)
}

#[tokio::test]
async fn strangers_make_room_when_descriptors_run_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let run = move || run_with("ulimit -Sn 48 && ulimit -Hn 64", &path);
    let (_running, address, descriptors) = tokio::task::spawn_blocking(run).await.unwrap();
    assert_eq!(descriptors, 64);
    let mut strangers = Vec::new();
    for _ in 0..70 {
        strangers.push(TcpStream::connect(address).await.unwrap());
    }
    let roots = std::fs::read_to_string(dir.path().join("root-cert.pem")).unwrap();
    let channel = timeout(PATIENCE, Shows::token().connect_to(address, &roots)).await.unwrap().unwrap();
    Shows::token().ask_on(channel, &Wanted::own()).await.unwrap();
    assert!(ends(&mut strangers[0], SECOND).await);
}

#[tokio::test]
async fn there_are_so_many_connections_and_no_more() {
    let world = world(|config| config.max_connections = 2).await;
    let one = world.subscriber().await;
    let _two = world.subscriber().await;
    let mut third = TcpStream::connect(world.control.xds_address()).await.unwrap();
    assert!(ends(&mut third, 3 * SECOND).await);
    counted(&world, r#"mesh_control_connections_refused_total{port="xds"} 1"#).await;
    counted(&world, "mesh_control_connections 2").await;
    drop(one);
    counted(&world, "mesh_control_connections 1").await;
    world.subscriber().await;
}

#[tokio::test]
async fn a_connection_without_a_request_ends_and_one_with_a_stream_does_not() {
    let world = world(|config| config.idle_timeout = SECOND).await;
    let mut agent = world.subscriber().await;
    let channel = Shows::token().connect(&world).await.unwrap();
    Shows::token().ask_on(channel.clone(), &Wanted::own()).await.unwrap();
    counted(&world, r#"mesh_control_connections_ended_total{reason="idle"} 1"#).await;
    counted(&world, "mesh_control_connections 1").await;
    sleep(2 * SECOND).await;
    world.write("web.yaml", &web().replace("10.96.0.1", "10.96.0.7"));
    assert_eq!(agent.next().await.put, [WEB]);
    // Who comes again is served.
    Shows::token().ask_on(channel, &Wanted::own()).await.unwrap();
}

/// Carries connections to the control plane until it is told to let go: then it carries nothing, and closes nothing.
async fn relay(world: &World, silent: watch::Receiver<bool>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, to) = (listener.local_addr().unwrap(), world.control.xds_address());
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let (mut client, mut server) = (client, TcpStream::connect(to).await.unwrap());
        let (mut up, mut down, mut silent) = ([0; 4096], [0; 4096], silent);
        loop {
            tokio::select! {
                true = async { silent.wait_for(|silent| *silent).await.is_ok() } => std::future::pending().await,
                Ok(length @ 1..) = client.read(&mut up) => server.write_all(&up[..length]).await.unwrap(),
                Ok(length @ 1..) = server.read(&mut down) => client.write_all(&down[..length]).await.unwrap(),
                else => return,
            }
        }
    });
    address
}

#[tokio::test]
async fn an_agent_that_has_vanished_is_noticed() {
    let world = world(|_| {}).await;
    let (vanish, silent) = watch::channel(false);
    let through = relay(&world, silent).await;
    let channel = Shows::token().connect_to(through, &world.roots()).await.unwrap();
    let mut agent = Subscriber::open_on(channel, &Shows::token(), Default::default(), None).await.unwrap();
    agent.next().await;
    counted(&world, "mesh_control_agents_connected 1").await;
    vanish.send_replace(true);
    let start = Instant::now();
    // A ping after half a minute, and ten seconds for its answer.
    while !scrape(&world, "/metrics").await.contains("mesh_control_agents_connected 0\n") {
        assert!(start.elapsed() < 60 * SECOND, "it still counts as connected");
        sleep(SECOND).await;
    }
    counted(&world, "mesh_control_connections 0").await;
}
