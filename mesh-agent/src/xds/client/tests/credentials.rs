//! Who is who, and what becomes of a control plane that is nobody.

use super::*;
use crate::identity::testing::{answer, own_certificate};

/// Long enough for what must not happen.
const MEANWHILE: Duration = Duration::from_secs(1);

/// What ends the first stream, or attempt at one, of an agent at that address.
async fn first_reason(address: SocketAddr) -> String {
    let (client, mut events) = agent(address);
    let reason = loop {
        match events.recv().await.unwrap() {
            XdsEvent::Versions { reply } => reply.send(Versions::default()).unwrap(),
            XdsEvent::Disconnected { reason } => break reason,
            event @ (XdsEvent::Connected | XdsEvent::Delta { .. } | XdsEvent::Policies { .. }) => {
                panic!("{event:?}")
            }
        }
    };
    client.abort();
    reason
}

#[tokio::test]
async fn an_agent_joins_by_token() {
    let mut world = World::new().await;
    let (talk, _) = world.stream().await;
    assert_eq!((talk.token.as_deref(), talk.by_certificate), (Some("Bearer join"), false));
}

#[tokio::test]
async fn a_node_with_a_certificate_needs_no_token() {
    let (authority, files) = known();
    let store = own_certificate(authority);
    let mut world = World::with(authority, authority, files, &store).await;
    let (talk, _) = world.stream().await;
    assert_eq!((&talk.token, talk.by_certificate), (&None, true));
    // Without one, as when it has expired, the next stream goes by token again.
    store.put_node(None);
    talk.responses.send(Err(Status::unavailable("going away"))).await.unwrap();
    world.disconnected().await;
    let (talk, _) = world.stream().await;
    assert_eq!((talk.token.as_deref(), talk.by_certificate), (Some("Bearer join"), false));
}

/// Another certificate of this node.
fn certify(store: &Store, authority: &Authority) {
    let uri = "spiffe://cluster.local/mesh.dev/node/node-a";
    store.put_node(Some(&answer(authority, uri, Duration::from_secs(3_600))));
}

impl World {
    /// The stream that follows without that the one before has failed, and its first request for addresses.
    async fn exchanged(&mut self) -> (Talk, DeltaDiscoveryRequest) {
        loop {
            match self.event().await {
                XdsEvent::Connected => return self.begun().await,
                // Silence is the end of the first answer.
                XdsEvent::Delta { applied, .. } => applied.send(Applied::default()).unwrap(),
                event @ (XdsEvent::Versions { .. }
                | XdsEvent::Disconnected { .. }
                | XdsEvent::Policies { .. }) => panic!("{event:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_stream_gives_way_to_one_by_a_newer_certificate() {
    let (authority, files) = known();
    let store = Arc::default();
    let mut world = World::with(authority, authority, files, &store).await;
    let (mut first, _) = world.stream().await;
    assert!(!first.by_certificate);
    first.send(response("n1", vec![web("v1")])).await;
    world.apply(&[]).await;
    assert_eq!(first.request().await.response_nonce, "n1");
    certify(&store, authority);
    let (second, request) = world.exchanged().await;
    assert_eq!((&second.token, second.by_certificate), (&None, true));
    assert_eq!(request.initial_resource_versions, [(WEB.to_owned(), "v1".to_owned())].into());
    assert!(!matches!(first.requests.message().await, Ok(Some(_))), "two streams");
    // Renewed while a change is under way: that is put in force first, and what is refused is not claimed.
    let full = of_service(service("shop/full", &["10.96.0.3"], &[(80, 80)]), "1");
    second.send(response("n2", vec![full])).await;
    let XdsEvent::Delta { delta, applied, .. } = world.event().await else { panic!("no delta") };
    certify(&store, authority);
    let early = tokio::time::timeout(MEANWHILE, world.events.recv()).await;
    assert!(early.is_err(), "{early:?}");
    world.snapshot.apply(delta);
    let refused = vec![Rejected { name: "shop/full".to_owned(), reason: "no room".to_owned() }];
    applied.send(Applied { refused, saved: None }).unwrap();
    let (third, request) = world.exchanged().await;
    assert!(third.by_certificate);
    let wanted = [(WEB.to_owned(), "v1".to_owned()), ("shop/full".to_owned(), String::new())].into();
    assert_eq!(request.initial_resource_versions, wanted);
    // And there it stays.
    let more = tokio::time::timeout(MEANWHILE, world.events.recv()).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test(start_paused = true)]
async fn another_certificate_is_noticed_in_no_time() {
    let (authority, files) = known();
    let store = Arc::default();
    let access = files.access("127.0.0.1:1".parse().unwrap(), &store);
    let hour = Duration::from_secs(3_600);
    let mut choice = Choice::default();
    for used in [None, Some(())] {
        let used = used.and_then(|()| access.credential(&choice)).map(|own| own.serial);
        let mut waiting = Box::pin(outdated(&access, &choice, used));
        assert!(tokio::time::timeout(hour, &mut waiting).await.is_err(), "there is no other one");
        if used.is_some() {
            // That it is no more is no reason to go.
            store.put_node(None);
            assert!(tokio::time::timeout(hour, &mut waiting).await.is_err());
        }
        let before = Instant::now();
        certify(&store, authority);
        tokio::time::timeout(hour, waiting).await.expect("it is told");
        assert_eq!(before.elapsed(), Duration::ZERO);
        // There already.
        outdated(&access, &choice, used).await;
    }
    // One that the server has refused is none.
    let refused = access.credential(&choice).map(|own| own.serial);
    choice.failed(refused);
    assert!(tokio::time::timeout(hour, outdated(&access, &choice, None)).await.is_err());
}

#[tokio::test]
async fn a_certificate_that_the_handshake_refuses_gives_way_to_the_token() {
    let (authority, files) = known();
    // The plane knows nothing of who certified this node.
    let former = Authority::new("former");
    let store = own_certificate(&former);
    let mut world = World::with(authority, authority, files, &store).await;
    assert!(!world.disconnected().await.is_empty());
    let (talk, _) = world.stream().await;
    assert_eq!((talk.token.as_deref(), talk.by_certificate), (Some("Bearer join"), false));
    let more = tokio::time::timeout(MEANWHILE, world.events.recv()).await;
    assert!(more.is_err(), "it is not tried again: {more:?}");
    // Its successor is, once.
    certify(&store, &former);
    assert!(!world.disconnected().await.is_empty());
    let (talk, _) = world.stream().await;
    assert_eq!((talk.token.as_deref(), talk.by_certificate), (Some("Bearer join"), false));
    let more = tokio::time::timeout(MEANWHILE, world.events.recv()).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test]
async fn a_refused_token_is_told_in_the_planes_words_and_counted() {
    let (authority, _) = known();
    let files = Files::new(&authority.pem(), "join");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (talks, mut received) = mpsc::channel(1);
    let refuse = Arc::new(Mutex::new(Some(Status::unauthenticated("token of node-b, asked by node-a"))));
    let server = serve(listener, Plane { talks, refuse: Arc::clone(&refuse) });
    let access = files.access(address, &Arc::default());
    let (client, mut events) = agent_with(Arc::clone(&access));
    let mut refused = 0;
    while refused < 3 {
        match tokio::time::timeout(SOON, events.recv()).await.unwrap().unwrap() {
            XdsEvent::Versions { reply } => reply.send(Versions::default()).unwrap(),
            XdsEvent::Disconnected { reason } => {
                assert!(reason.contains("token of node-b, asked by node-a"), "{reason}");
                refused += 1;
            }
            event @ (XdsEvent::Connected | XdsEvent::Delta { .. } | XdsEvent::Policies { .. }) => {
                panic!("{event:?}")
            }
        }
    }
    assert_eq!(access.refusals(), 3);
    *refuse.lock().unwrap() = None;
    files.write_token("other\n");
    let answer = tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if let XdsEvent::Versions { reply } = event {
                reply.send(Versions::default()).unwrap();
            }
        }
    });
    // Read anew.
    let talk = tokio::time::timeout(SOON, received.recv()).await.unwrap().unwrap();
    assert_eq!(talk.token.as_deref(), Some("Bearer other"));
    [client, server, answer].iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn a_plane_of_another_root_is_refused_until_the_file_says_so() {
    let (authority, _) = known();
    let files = Files::new(&Authority::new("other").pem(), "join");
    let mut world = World::with(authority, authority, &files, &Arc::default()).await;
    let reason = world.disconnected().await;
    assert!(reason.starts_with("TLS: ") && reason.contains("UnknownIssuer"), "{reason}");
    files.write_root(&authority.pem());
    world.stream().await;
}

#[tokio::test(start_paused = true)]
async fn a_plane_that_never_says_a_word_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let mut silent = Vec::new();
        loop {
            silent.push(listener.accept().await.unwrap());
        }
    });
    let begun = Instant::now();
    let reason = first_reason(address).await;
    let took = begun.elapsed();
    assert!(took >= CONNECT_TIMEOUT && took <= CONNECT_TIMEOUT * 2, "{took:?} {reason}");
    server.abort();
}

#[tokio::test(start_paused = true)]
async fn a_plane_that_never_says_a_word_after_the_handshake_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = known().0.server_config(&rustls::version::TLS13, &[b"h2"]);
    let server = tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        let mut silent = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            silent.push(acceptor.accept(stream).await.unwrap());
        }
    });
    let begun = Instant::now();
    let reason = first_reason(address).await;
    let took = begun.elapsed();
    assert!(took >= PING_INTERVAL && took <= (PING_INTERVAL + PING_TIMEOUT) * 2, "{took:?} {reason}");
    server.abort();
}
