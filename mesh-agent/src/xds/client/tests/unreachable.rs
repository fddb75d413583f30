//! Where no control plane is.

use super::*;

#[tokio::test]
async fn a_plane_that_is_away_is_found_when_it_comes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (client, mut events) = agent(address);
    for _ in 0..3 {
        let event = tokio::time::timeout(SOON, events.recv()).await.unwrap().unwrap();
        let XdsEvent::Disconnected { reason } = event else { panic!("{event:?}") };
        assert!(reason.contains("refused"), "{reason}");
    }
    let (talks, mut received) = mpsc::channel(1);
    let listener = TcpListener::bind(address).await.unwrap();
    let server = serve(listener, Plane { talks, refuse: Arc::default() });
    let answer = tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if let XdsEvent::Versions { reply } = event {
                reply.send(Versions::default()).unwrap();
            }
        }
    });
    tokio::time::timeout(SOON, received.recv()).await.unwrap().unwrap();
    client.abort();
    server.abort();
    answer.abort();
}

#[tokio::test]
async fn what_is_no_control_plane_at_all_is_survived() {
    use tokio::io::AsyncWriteExt;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\nwhat?").await);
        }
    });
    let (client, mut events) = agent(address);
    let mut failures = 0;
    while failures < 2 {
        match tokio::time::timeout(SOON, events.recv()).await.unwrap().unwrap() {
            XdsEvent::Versions { reply } => reply.send(Versions::default()).unwrap(),
            XdsEvent::Disconnected { .. } => failures += 1,
            event @ (XdsEvent::Connected | XdsEvent::Delta { .. } | XdsEvent::Policies { .. }) => {
                panic!("{event:?}")
            }
        }
    }
    assert!(!client.is_finished());
    server.abort();
    client.abort();
}

#[tokio::test(start_paused = true)]
async fn attempts_become_rare() {
    // A port that nobody listens on; the paused clock skips the waits, and counts them.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let begun = Instant::now();
    let (client, mut events) = agent(address);
    for _ in 0..12 {
        let event = events.recv().await.unwrap();
        assert!(matches!(event, XdsEvent::Disconnected { .. }), "{event:?}");
    }
    // Eleven waits: 0.1 s doubled up to 15 s, each between half and all of it.
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(35) && waited <= Duration::from_secs(75), "{waited:?}");
    client.abort();
}
