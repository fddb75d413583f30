use std::net::SocketAddr;

use rustls::version::TLS13;
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::super::access::{CONNECT_TIMEOUT, PING_INTERVAL};
use super::*;
use crate::identity::testing::{Authority, Files};

async fn fetch(address: SocketAddr, files: &Files) -> (FetchError, Duration) {
    let burst = Burst::new(&files.access(address, &Arc::default()), None);
    let begun = Instant::now();
    let error = burst.fetch(&Subject::Node, "node-a").await.unwrap_err();
    (error, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_says_a_word_is_away() {
    let authority = Authority::new("root");
    let files = Files::new(&authority.pem(), "t");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // The kernel takes the connection.
    let (error, took) = fetch(address, &files).await;
    assert_eq!((error.outcome(), error.was_asked()), ("unreachable", false), "{error}");
    assert!(took >= CONNECT_TIMEOUT && took < CONNECT_TIMEOUT * 2, "{took:?}");
    drop(listener);
    let (error, _) = fetch(address, &files).await;
    assert!(error.to_string().starts_with("connect: ") && !error.blames_credential(), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up() {
    let authority = Authority::new("root");
    let files = Files::new(&authority.pem(), "t");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(authority.server_config(&TLS13, &[b"h2"]));
    let server = tokio::spawn(async move {
        let _open = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
        std::future::pending::<()>().await;
    });
    let (error, took) = fetch(address, &files).await;
    assert!(matches!(error, FetchError::Silent) && error.ends_connection(), "{error}");
    assert!(took >= ANSWER_TIMEOUT && took < PING_INTERVAL, "{took:?}");
    server.abort();
}
