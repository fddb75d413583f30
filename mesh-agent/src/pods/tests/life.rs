//! From a pod's first process to its last.

use super::*;

#[tokio::test]
async fn a_pod_is_ready_when_it_has_listeners_and_a_certificate() {
    let Some(mut world) = World::unready(Limits::default()) else { return };
    let cookie = world.server_pod.inside.cookie();
    world.server.enroll(SERVER);
    let figures = world.server.pods.figures();
    until("it waits", || figures.pods().iter().any(|pod| pod.state == figures::State::NoProcess)).await;
    assert!(world.server.kernel.guarded.lock().unwrap().is_empty());
    // It may come to any namespace.
    assert_eq!(world.server.pods.with_namespaces(HashSet::len), None);
    world.server.processes(&[world.server_pod.process.id()]);
    // Once the namespace is known, and once it listens.
    for _ in 0..2 {
        let Event::Proxy { proxy, .. } = world.server.event().await else { panic!() };
        assert_eq!((proxy.netns, proxy.flags), (cookie, 0));
        assert_eq!(*world.server.kernel.guarded.lock().unwrap(), [cookie]);
    }
    assert_eq!(world.server.pods.with_namespaces(HashSet::clone), Some(HashSet::from([cookie])));
    world.certify();
    world.server.ready().await;
    let proxy = world.server.proxy.unwrap();
    assert_eq!(proxy.v4, abi::Address::from_v4([10, 99, 0, 2]));
    assert!(proxy.v6.is_set());
    world.server.certificates.remove(&server());
    while world.server.is_ready() {
        world.server.event().await;
    }
    world.certify();
    world.server.ready().await;
}

#[tokio::test]
async fn what_was_open_is_reset_when_the_last_process_ends() {
    let Some(mut world) = World::new().await else { return };
    let (mut near, mut far) = world.joined(false, 8080).await;
    passes(&mut near, &mut far, b"hello").await;
    world.server.processes(&[]);
    world.server_pod.kill();
    world.server.gone().await;
    is_reset(&mut near).await;
    is_reset(&mut far).await;
    // Whoever listens there next may be the workload again, before anybody has looked.
    assert_eq!(world.server.pods.with_namespaces(HashSet::len), None);
    assert!(world.server.kernel.unguarded.lock().unwrap().is_empty());
    assert!(world.server.kernel.clients.lock().unwrap().is_empty());
    assert_eq!(world.server.pods.figures().inbound.counts.stopped.load(Ordering::Relaxed), 1);
    let closed = world.server_pod.inside.connect(world.server_pod.at(false, 15008)).await;
    assert_eq!(closed.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    // A process again, in the same namespace.
    world.server_pod.process = process(&world.server_pod.net);
    world.server.processes(&[world.server_pod.process.id()]);
    world.server.ready().await;
    let (mut near, mut far) = world.joined(false, 8080).await;
    passes(&mut near, &mut far, b"hello").await;
}

#[tokio::test]
async fn a_sandbox_that_begins_anew_is_served_in_its_new_namespace() {
    let Some(mut world) = World::new().await else { return };
    let Some(next) = Pod::new(2) else { return };
    let address = format!("{}/24", next.addresses[0]);
    next.net.ip(&["addr", "add", &address, "dev", "lo"]);
    next.net.ip(&["addr", "add", &format!("{}/128", next.addresses[1]), "dev", "lo", "nodad"]);
    world.server.processes(&[next.process.id()]);
    world.server_pod.kill();
    world.server.gone().await;
    // The old namespace stays guarded for as long as it is there.
    assert!(world.server.kernel.unguarded.lock().unwrap().is_empty());
    world.server.ready().await;
    assert_eq!(world.server.proxy.unwrap().netns, next.inside.cookie());
    next.inside.connect(next.at(false, 15008)).await.unwrap();
    world.server_pod.process = process(&world.server_pod.net);
}

#[tokio::test]
async fn a_workload_that_is_removed_and_announced_again_ends_as_the_last_word_says() {
    let Some(mut world) = World::new().await else { return };
    for _ in 0..10 {
        world.server.pods.sync(Vec::new());
        world.server.enroll(SERVER);
    }
    // Each round ends with its own, in order: the last word is that it is ready.
    for _ in 0..10 {
        world.server.gone().await;
    }
    world.server.ready().await;
    world.server.pods.sync(Vec::new());
    world.server.gone().await;
    until("nothing is left", || world.server.pods.figures().pods().is_empty()).await;
}

#[tokio::test]
async fn processes_in_the_nodes_own_network_get_no_proxy() {
    let Some(mut world) = World::unready(Limits::default()) else { return };
    world.certify();
    world.server.processes(&[std::process::id()]);
    world.server.enroll(SERVER);
    let figures = world.server.pods.figures();
    until("it is told", || figures.pods().iter().any(|pod| pod.state == figures::State::Host)).await;
    assert!(world.server.events.try_recv().is_err());
    assert!(world.server.kernel.guarded.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_stop_lets_connections_end_and_then_resets_them() {
    let Some(mut world) = World::new().await else { return };
    let (mut near, mut far) = world.joined(false, 8080).await;
    let (mut other, mut other_far) = world.joined(false, 8081).await;
    let World { server, .. } = &mut world;
    let kernel = Arc::clone(&server.kernel);
    let pods = std::mem::replace(&mut server.pods, Node::new(Limits::default()).pods);
    let figures = pods.figures();
    let stopping = tokio::spawn(pods.stop(Duration::from_secs(2)));
    while server.is_ready() {
        server.event().await;
    }
    passes(&mut near, &mut far, b"hello").await;
    near.shutdown().await.unwrap();
    assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    far.shutdown().await.unwrap();
    assert_eq!(timeout(LONG, near.read(&mut [0])).await.unwrap().unwrap(), 0);
    passes(&mut other, &mut other_far, b"hello").await;
    timeout(LONG, stopping).await.unwrap().unwrap();
    is_reset(&mut other).await;
    assert_eq!(figures.inbound.counts.stopped.load(Ordering::Relaxed), 1);
    // Who stops the agent says what becomes of the guard.
    assert!(kernel.unguarded.lock().unwrap().is_empty());
}

/// Descriptors and threads of the process: other tests have theirs, so this runs in a process of its own.
#[test]
fn many_pods_leave_nothing_behind() {
    let this = std::env::current_exe().unwrap();
    let alone = ["--ignored", "--exact", "pods::tests::life::many_pods", "--nocapture"];
    let output = Command::new(this).args(alone).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "run by `many_pods_leave_nothing_behind`"]
fn many_pods() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let counts = || {
        let entries = |of: &str| std::fs::read_dir(of).unwrap().count();
        (entries("/proc/self/fd"), entries("/proc/self/task"))
    };
    let mut before = (0, 0);
    for round in 0..8 {
        let Some(mut world) = runtime.block_on(World::new()) else { return };
        runtime.block_on(async {
            let joined = [world.joined(false, 8080).await, world.joined(true, 8080).await];
            world.server.pods.sync(Vec::new());
            world.server.gone().await;
            world.client.processes(&[]);
            world.client_pod.kill();
            world.client.gone().await;
            drop(joined);
        });
        drop(world);
        // Threads of namespaces end by themselves a moment after their last user.
        if round == 1 {
            runtime.block_on(async { sleep(Duration::from_secs(1)).await });
            before = counts();
        }
    }
    let as_before = || {
        let now = counts();
        now.0 <= before.0 && now.1 <= before.1
    };
    runtime.block_on(until("it is as before", as_before));
}
