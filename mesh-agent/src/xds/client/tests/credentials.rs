//! Who is who, and what becomes of a control plane that is nobody.

use super::*;
use crate::identity::testing::own_certificate;

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

#[tokio::test]
async fn a_certificate_that_the_handshake_refuses_gives_way_to_the_token() {
    let (authority, files) = known();
    // The plane knows nothing of who certified this node.
    let store = own_certificate(&Authority::new("former"));
    let mut world = World::with(authority, authority, files, &store).await;
    assert!(!world.disconnected().await.is_empty());
    let (talk, _) = world.stream().await;
    assert_eq!((talk.token.as_deref(), talk.by_certificate), (Some("Bearer join"), false));
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
