//! What applications see.

use super::*;

#[tokio::test]
async fn applications_see_each_other_as_if_nothing_was_between_them() {
    let Some(world) = World::new().await else { return };
    for six in [false, true] {
        let (mut near, mut far) = world.joined(six, 8080).await;
        assert_eq!(near.local_addr().unwrap().ip(), world.client_pod.addresses[usize::from(six)]);
        assert_eq!(world.seen(&far), near.local_addr().unwrap());
        assert_eq!(far.local_addr().unwrap(), world.server_pod.at(six, 8080));
        // The server first; then each direction ends on its own.
        passes(&mut far, &mut near, b"220 ready").await;
        passes(&mut near, &mut far, b"HELO").await;
        near.shutdown().await.unwrap();
        assert_eq!(timeout(LONG, far.read(&mut [0; 16])).await.unwrap().unwrap(), 0);
        passes(&mut far, &mut near, b"still here").await;
        far.shutdown().await.unwrap();
        assert_eq!(timeout(LONG, near.read(&mut [0; 16])).await.unwrap().unwrap(), 0);
    }
    until("all clients are forgotten", || world.server.kernel.clients.lock().unwrap().is_empty()).await;
    until("both nodes count them", || {
        world.client.outcome(|all| &all.outbound, "ended") == 2
            && world.server.outcome(|all| &all.inbound, "ended") == 2
    })
    .await;
}

#[tokio::test]
async fn another_backend_of_a_service_takes_what_the_chosen_one_refuses() {
    let Some(mut world) = World::new().await else { return };
    let web = service("shop/web.shop.svc", &["10.96.0.1"], &[(80, 8080)]);
    let mut backend = announced(SERVER, &world.server_pod);
    backend.services = HashMap::from([("shop/web.shop.svc".to_owned(), wire::PortList::default())]);
    // The chosen one: a neighbour where nobody listens any more.
    let mut gone = workload("c//Pod/shop/gone", "10.99.0.2", "node", &[]);
    gone.tunnel_protocol = wire::TunnelProtocol::Hbone as i32;
    gone.addresses = vec![vec![10, 99, 0, 77]];
    world.server_pod.net.ip(&["addr", "add", "10.99.0.77/24", "dev", "eth0"]);
    world.client.apply(update(&[of_service(web, "1"), of_workload(backend, "2"), of_workload(gone, "1")]));
    let listener = world.server_pod.inside.listen(world.server_pod.at(false, 8080)).await.unwrap();
    for chosen in [Some("10.99.0.77:8080".parse().unwrap()), None] {
        let dialled = "10.96.0.1:80".parse().unwrap();
        let original = Original { dialled, chosen, is_service: true };
        let mut near = world.connect(original).await.unwrap();
        let (mut far, _peer) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        passes(&mut near, &mut far, b"hello").await;
    }
    assert_eq!(world.client.pods.figures().outbound.counts.retried.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn what_is_not_meshed_is_reached_as_it_is_and_what_is_unknown_not_at_all() {
    let Some(mut world) = World::new().await else { return };
    let mut plain = workload("c//Pod/shop/plain", "10.99.0.77", "node", &[]);
    plain.service_account = "server".to_owned();
    world.server_pod.net.ip(&["addr", "add", "10.99.0.77/24", "dev", "eth0"]);
    world.client.apply(update(&[of_workload(plain, "1")]));
    let address = "10.99.0.77:8080".parse().unwrap();
    let listener = world.server_pod.inside.listen(address).await.unwrap();
    let mut near = world.connect(Original::to(address)).await.unwrap();
    let (mut far, peer) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
    assert_eq!(peer.ip(), world.client_pod.addresses[0]);
    passes(&mut near, &mut far, b"hello").await;
    let unknown = "10.99.0.78:8080".parse().unwrap();
    is_reset_at_once(world.connect(Original::to(unknown)).await).await;
    // The one that was there goes: after the grace time, so do its connections.
    world.client.apply(removal(&["c//Pod/shop/plain"]));
    sleep(GRACE).await;
    world.client.mesh.tick(Instant::now());
    is_reset(&mut near).await;
}

#[tokio::test]
async fn a_refusal_by_the_application_is_a_reset() {
    let Some(world) = World::new().await else { return };
    let nobody = Original::to(world.server_pod.at(false, 9));
    is_reset_at_once(world.connect(nobody).await).await;
    until("it is counted", || world.client.outcome(|all| &all.outbound, "upstream") == 1).await;
    assert_eq!(world.server.outcome(|all| &all.inbound, "upstream"), 1);
    assert!(world.server.kernel.clients.lock().unwrap().is_empty());
}

#[tokio::test]
async fn policy_is_asked_at_both_ends_and_again_when_it_changes() {
    let Some(world) = World::new().await else { return };
    for (refuses, side) in [(&world.client, host::Side::Outbound), (&world.server, host::Side::Inbound)] {
        let (mut near, mut far) = world.joined(false, 8080).await;
        passes(&mut near, &mut far, b"hello").await;
        refuses.judge.set(vec![client()]);
        is_reset(&mut near).await;
        is_reset(&mut far).await;
        let late = Original::to(world.server_pod.at(false, 8080));
        is_reset_at_once(world.connect(late).await).await;
        let denials = std::mem::take(&mut *refuses.denials.lock().unwrap());
        assert_eq!(denials.len(), 2);
        for denial in denials {
            assert_eq!((denial.side, denial.source), (side, Some(client())));
            assert_eq!(denial.source_ip, world.client_pod.addresses[0]);
            assert_eq!(denial.address, world.server_pod.at(false, 8080));
            assert_eq!((&*denial.destination.uid(), denial.judged.rule), (SERVER, Some(0)));
        }
        refuses.judge.set(vec![]);
    }
}

#[tokio::test]
async fn what_a_dry_run_would_refuse_is_told_once_and_goes_on() {
    let Some(world) = World::new().await else { return };
    world.server.judge.trial.store(true, Ordering::Relaxed);
    let (mut near, mut far) = world.joined(false, 8080).await;
    passes(&mut near, &mut far, b"hello").await;
    let asked = world.server.judge.asked.load(Ordering::Relaxed);
    world.server.judge.set(vec![]);
    until("it is asked again", || world.server.judge.asked.load(Ordering::Relaxed) > asked).await;
    passes(&mut near, &mut far, b"hello").await;
    let denials = std::mem::take(&mut *world.server.denials.lock().unwrap());
    assert_eq!(denials.len(), 1, "{denials:?}");
    assert!(denials[0].judged.allowed && denials[0].judged.would_deny.is_some());
}

/// Policies come before the workloads that name them, and revocation lists without any policy.
#[tokio::test]
async fn what_is_open_is_judged_anew_whatever_has_changed() {
    let Some(mut world) = World::new().await else { return };
    let (mut near, mut far) = world.joined(false, 8080).await;
    passes(&mut near, &mut far, b"hello").await;
    // Only the server's node hears of it.
    let mut named = announced(SERVER, &world.server_pod);
    named.authorization_policies.push("shop/nobody".into());
    world.server.apply(update(&[of_workload(named, "2")]));
    world.server.enroll(SERVER);
    is_reset(&mut near).await;
    is_reset(&mut far).await;
}
