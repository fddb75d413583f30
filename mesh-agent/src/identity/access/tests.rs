use rustls::version::{TLS12, TLS13};
use tokio::net::TcpListener;

use super::*;
use crate::identity::testing::{Authority, Files};

/// Why no connection comes about with a server of that kind.
async fn refused(config: Arc<rustls::ServerConfig>, files: &Files, name: &'static str) -> AccessError {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut server = files.server(listener.local_addr().unwrap());
    server.name = name.try_into().unwrap();
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        // Whatever comes of it: what counts is what the agent makes of it.
        drop(tokio_rustls::TlsAcceptor::from(config).accept(stream).await);
    });
    let access = Arc::new(Access::new(server, &crate::identity::testing::node(), Arc::default()));
    let error = access.connect(None).await.unwrap_err();
    serving.await.unwrap();
    error
}

#[tokio::test]
async fn only_tls_1_3_and_http_2_will_do() {
    let authority = Authority::new("root");
    let files = Files::new(&authority.pem(), "t");
    let error = refused(authority.server_config(&TLS12, &[b"h2"]), &files, "mesh-control").await;
    assert!(matches!(error, AccessError::Tls(_)), "{error}");
    for protocols in [&[][..], &[b"http/1.1".as_slice()]] {
        let error = refused(authority.server_config(&TLS13, protocols), &files, "mesh-control").await;
        assert!(matches!(error, AccessError::Tls(_) | AccessError::Http(_)), "{error}");
    }
}

#[tokio::test]
async fn a_server_has_to_be_for_the_name() {
    let authority = Authority::new("root");
    let files = Files::new(&authority.pem(), "t");
    let config = || authority.server_config(&TLS13, &[b"h2"]);
    for other in ["istiod.istio-system.svc", "127.0.0.2"] {
        let error = refused(config(), &files, other).await.to_string();
        assert!(error.contains("not valid for name"), "{error}");
    }
}

#[test]
fn a_certificate_is_used_until_it_is_refused() {
    let mut choice = Choice::default();
    assert!(choice.trusts(1));
    assert!(!choice.succeeded(Some(1)));
    choice.failed(Some(1));
    assert!(!choice.trusts(1), "the token's turn");
    assert!(choice.succeeded(None), "so it was the certificate");
    assert!(!choice.trusts(1));
    assert!(!choice.succeeded(None));
    assert!(choice.trusts(2), "another certificate");
}

#[test]
fn where_neither_works_they_take_turns() {
    let mut choice = Choice::default();
    let used: Vec<bool> = (0..6)
        .map(|_| {
            let certificate = choice.trusts(7);
            choice.failed(certificate.then_some(7));
            certificate
        })
        .collect();
    assert_eq!(used, [true, false, true, false, true, false]);
}

#[test]
fn a_token_that_stops_working_gives_a_refused_certificate_another_chance() {
    let mut choice = Choice::default();
    choice.failed(Some(1));
    choice.succeeded(None);
    choice.failed(None);
    assert!(choice.trusts(1));
}
