//! Who gets which certificate.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    time::{Instant, sleep},
};
use tonic::Code;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{
    client::{Issued, Shows, TOKEN_B, Wanted},
    manifests::*,
    subscriber::Subscriber,
    world::{PATIENCE, World, config},
};

const WEB_ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

pub(crate) async fn shop() -> World {
    World::start(&[("a.yaml", &pod("a", "10.0.0.1"))]).await
}

pub(crate) fn ders(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
}

/// Verifies a certificate to `roots`; returns its names and its times from now.
pub(crate) fn verified(issued: &Issued, roots: &str) -> (Vec<String>, i64, i64) {
    let mut store = RootCertStore::empty();
    ders(roots).into_iter().for_each(|root| store.add(root).unwrap());
    let leaf = ders(&issued.chain[0]).remove(0);
    let intermediates: Vec<_> =
        issued.chain[1..issued.chain.len() - 1].iter().flat_map(|pem| ders(pem)).collect();
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    let parsed = ParsedCertificate::try_from(&leaf).unwrap();
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &store,
        &intermediates,
        UnixTime::now(),
        algorithms.all,
    )
    .unwrap();
    let (_, cert) = X509Certificate::from_der(&leaf).unwrap();
    assert_eq!(cert.public_key().raw, rcgen::PublicKeyData::subject_public_key_info(&issued.key));
    assert_eq!(cert.subject().iter().count(), 0);
    let san = cert.subject_alternative_name().unwrap().unwrap();
    let usage = cert.extended_key_usage().unwrap().unwrap().value;
    assert!(san.critical && usage.server_auth && usage.client_auth && !cert.is_ca());
    let names = san.value.general_names.iter().map(|name| {
        let GeneralName::URI(uri) = name else { panic!("{name}") };
        (*uri).to_owned()
    });
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let validity = cert.validity();
    (names.collect(), validity.not_before.timestamp() - now, validity.not_after.timestamp() - now)
}

#[tokio::test]
async fn a_node_gets_its_own_certificate_and_renews_it_with_it() {
    let world = shop().await;
    let own = Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    let (names, before, after) = verified(&own, own.chain.last().unwrap());
    assert_eq!(names, ["spiffe://cluster.local/mesh.dev/node/node-a"]);
    assert!((-130..=-119).contains(&before) && (86_380..=86_400).contains(&after), "{before} {after}");
    assert_eq!(own.chain.last().unwrap().trim(), world.roots().trim());
    let again = own.shown().ask(&world, &Wanted::own()).await.unwrap();
    assert_eq!(verified(&again, &world.roots()).0, names);
    assert_ne!(again.chain[0], own.chain[0]);
}

#[tokio::test]
async fn a_workload_of_the_node_is_certified_and_no_other() {
    let world = shop().await;
    let node = Shows::token().ask(&world, &Wanted::own()).await.unwrap().shown();
    let issued = node.ask(&world, &Wanted::of(WEB_ID)).await.unwrap();
    assert_eq!(verified(&issued, &world.roots()).0, [WEB_ID]);
    // A pod's certificate is no node's.
    let error = issued.shown().ask(&world, &Wanted::own()).await.err().unwrap();
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
    let other = Shows::token_of(TOKEN_B);
    for (shows, identity, code) in [
        (&other, WEB_ID, Code::PermissionDenied),
        (&node, "spiffe://cluster.local/ns/shop/sa/db", Code::PermissionDenied),
        (&node, "spiffe://cluster.local/ns/other/sa/web", Code::PermissionDenied),
        (&node, "spiffe://other.domain/ns/shop/sa/web", Code::PermissionDenied),
        (&node, "spiffe://cluster.local/mesh.dev/node/node-b", Code::InvalidArgument),
        (&node, "spiffe://cluster.local/ns/shop/sa/web/../web", Code::InvalidArgument),
        (&node, "web", Code::InvalidArgument),
    ] {
        let error = shows.ask(&world, &Wanted::of(identity)).await.err().unwrap();
        assert_eq!(error.code(), code, "{identity}: {error}");
    }
    let metrics = crate::management::scrape(&world, "/metrics").await;
    for line in [
        "mesh_control_certificates_issued_total 2",
        r#"mesh_control_certificates_refused_total{reason="not_placed"} 4"#,
        r#"mesh_control_certificates_refused_total{reason="identity"} 3"#,
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    // It is no longer there.
    world.remove("a.yaml");
    world.status_when(|status| status.workloads == 0).await;
    let error = node.ask(&world, &Wanted::of(WEB_ID)).await.err().unwrap();
    assert_eq!(error.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn an_endpoint_written_into_a_slice_gives_no_node_an_identity() {
    let endpoints = ["{addresses: ['10.0.0.1'], nodeName: node-a}".to_owned()];
    let documents = [web(), slice("web-1", "IPv4", &endpoints, "{name: http, port: 8080}")];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let wanted = Wanted::of("spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!(Shows::token().ask(&world, &wanted).await.err().unwrap().code(), Code::PermissionDenied);
    let plain = pod("b", "10.0.0.2").replace(", serviceAccountName: web", "");
    world.write("b.yaml", &plain);
    world.status_when(|status| status.workloads == 2).await;
    Shows::token().ask(&world, &wanted).await.unwrap();
}

#[tokio::test]
async fn who_does_not_authenticate_gets_nothing() {
    let world = shop().await;
    let wrong_node = Shows { node: Some("node-a".into()), ..Shows::token_of(TOKEN_B) };
    let nameless = Shows { node: None, ..Shows::token() };
    for shows in [Shows::default(), Shows::token_of("nobody-knows-this-one"), wrong_node, nameless] {
        let error = shows.ask(&world, &Wanted::own()).await.err().unwrap();
        assert_eq!(error.code(), Code::Unauthenticated, "{error}");
        assert!(!error.message().contains("nobody-knows"), "{error}");
    }
}

#[tokio::test]
async fn names_in_the_request_mean_nothing_and_lifetimes_are_capped() {
    let world = shop().await;
    let names = &["evil.example.com", "kubernetes.default.svc"];
    for (seconds, least, most) in [(0, 86_380, 86_400), (60, 40, 60), (i64::MAX, 86_380, 86_400)] {
        let issued = Shows::token().ask(&world, &Wanted { seconds, names, identity: None }).await.unwrap();
        let (found, _, after) = verified(&issued, &world.roots());
        assert_eq!(found, ["spiffe://cluster.local/mesh.dev/node/node-a"]);
        assert!((least..=most).contains(&after), "{after}");
    }
    let error = Shows::token().ask(&world, &Wanted { seconds: -1, ..Wanted::own() }).await.err().unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn the_authority_survives_a_restart() {
    let world = shop().await;
    let node = Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    let roots = world.roots();
    let key = world.config.ca_dir.join("ca-key.pem");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let World { dir, control, config, state } = world;
    control.stop().await.unwrap();
    let world = World::with(dir, config, state).await;
    assert_eq!(world.roots(), roots);
    node.shown().ask(&world, &Wanted::of(WEB_ID)).await.unwrap();
}

#[tokio::test]
async fn a_stream_belongs_to_its_node() {
    let world = shop().await;
    let error = Subscriber::try_open(&world, &Shows::default(), Default::default()).await.err().unwrap();
    assert_eq!(error.code(), Code::Unauthenticated);
    // The test's subscriber says that it is node-a.
    let mut foreign =
        Subscriber::try_open(&world, &Shows::token_of(TOKEN_B), Default::default()).await.unwrap();
    assert_eq!(foreign.receive().await.unwrap_err().code(), Code::PermissionDenied);
    let own = Shows::token().ask(&world, &Wanted::own()).await.unwrap().shown();
    let mut mine = Subscriber::try_open(&world, &own, Default::default()).await.unwrap();
    assert_eq!(mine.next().await.put, [pod_uid("a")]);
}

#[tokio::test]
async fn a_stream_ends_with_its_certificate_and_with_its_token() {
    let world = shop().await;
    let short = Wanted { seconds: 3, ..Wanted::own() };
    let own = Shows::token().ask(&world, &short).await.unwrap().shown();
    let channel = own.connect(&world).await.unwrap();
    let mut stream = Subscriber::try_open(&world, &own, Default::default()).await.unwrap();
    let mut joined = world.subscriber().await;
    stream.next().await;
    assert_eq!(stream.receive().await.unwrap_err().code(), Code::Unauthenticated);
    // The connection is still there, and of no more use.
    let error = own.ask_on(channel, &Wanted::own()).await.err().unwrap();
    assert_eq!(error.code(), Code::Unauthenticated);
    fs::write(world.state.path().join("join-tokens"), "# none\n").unwrap();
    assert_eq!(joined.receive().await.unwrap_err().code(), Code::Unauthenticated);
    let metrics = crate::management::scrape(&world, "/metrics").await;
    for reason in ["certificate", "token_unknown"] {
        let line = format!(r#"mesh_control_xds_streams_ended_total{{reason="{reason}"}} 1"#);
        assert!(metrics.contains(&line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn plaintext_and_silence_get_nowhere_and_are_in_nobodys_way() {
    let world = shop().await;
    let mut silent = Vec::new();
    for _ in 0..1_100 {
        silent.push(TcpStream::connect(world.control.xds_address()).await.unwrap());
    }
    Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    // More than may be in flight: the oldest are given up.
    let mut byte = [0];
    assert!(matches!(silent[0].read(&mut byte).await, Ok(0) | Err(_)));
    let plain =
        tonic::transport::Endpoint::from_shared(format!("http://{}", world.control.xds_address())).unwrap();
    let outcome = match plain.connect().await {
        Ok(channel) => Shows::token().ask_on(channel, &Wanted::own()).await.err().map(|status| status.code()),
        Err(_) => Some(Code::Unavailable),
    };
    assert!(matches!(outcome, Some(Code::Unavailable | Code::Unknown | Code::Internal)), "{outcome:?}");
    let metrics = crate::management::scrape(&world, "/metrics").await;
    assert!(metrics.contains(r#"handshakes_failed_total{reason="crowded"}"#), "{metrics}");
}

/// Who gives out JWTs.
struct Issuer(jsonwebtoken::EncodingKey);

impl Issuer {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        Self(jsonwebtoken::EncodingKey::from_ec_der(key.serialized_der()))
    }

    /// Its keys, when that is the name of the only one.
    fn set(&self, kid: &str) -> String {
        let jwk = jsonwebtoken::jwk::Jwk::from_encoding_key(&self.0, jsonwebtoken::Algorithm::ES256);
        let mut jwk = serde_json::to_value(jwk.unwrap()).unwrap();
        jwk["kid"] = kid.into();
        serde_json::json!({ "keys": [jwk] }).to_string()
    }

    /// A token of `node-a` by the key `k2`, which expires so many seconds from now.
    fn token(&self, seconds: i64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let claims = serde_json::json!({
            "iss": "https://issuer", "aud": ["istio-ca"], "exp": now.saturating_add_signed(seconds),
            "sub": "system:serviceaccount:mesh-system:mesh-agent",
            "kubernetes.io": {"node": {"name": "node-a"}},
        });
        let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        header.kid = Some("k2".to_owned());
        jsonwebtoken::encode(&header, &claims, &self.0).unwrap()
    }

    /// A control plane that takes its tokens, by the keys in a file.
    async fn world(&self, kid: &str) -> (World, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
        let (mut config, state) = config(dir.path());
        let path = state.path().join("jwks.json");
        fs::write(&path, self.set(kid)).unwrap();
        (config.token_issuer, config.token_jwks) = (Some("https://issuer".into()), Some(path.clone()));
        (World::with(dir, config, state).await, path)
    }
}

#[tokio::test]
async fn a_stream_that_a_jwt_opened_ends_with_it() {
    let issuer = Issuer::new();
    let (world, _) = issuer.world("k2").await;
    // Ten seconds of grace: two are left.
    let token = Shows::token_of(&issuer.token(-8));
    let mut stream = Subscriber::try_open(&world, &token, Default::default()).await.unwrap();
    let mut joined = world.subscriber().await;
    stream.next().await;
    let end = stream.receive().await.unwrap_err();
    assert_eq!(end.code(), Code::Unauthenticated);
    assert!(end.message().contains("token: ") && end.message().contains("has expired"), "{end}");
    let again = Subscriber::try_open(&world, &token, Default::default()).await.err().unwrap();
    assert_eq!(again.code(), Code::Unauthenticated);
    let metrics = crate::management::scrape(&world, "/metrics").await;
    for line in [
        r#"mesh_control_xds_streams_ended_total{reason="token_expired"} 1"#,
        r#"mesh_control_xds_streams_refused_total{reason="token_expired"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    // A join token ends when it is withdrawn.
    joined.nothing().await;
}

#[tokio::test]
async fn a_jwt_is_good_for_the_node_that_it_names() {
    let issuer = Issuer::new();
    let (world, path) = issuer.world("k1").await;
    let set = |kid| issuer.set(kid);
    let shows = Shows::token_of(&issuer.token(600));
    let error = shows.ask(&world, &Wanted::of(WEB_ID)).await.err().unwrap();
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
    // The issuer's keys change while the control plane runs.
    fs::write(&path, set("k2")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = shows.ask(&world, &Wanted::of(WEB_ID)).await {
        assert!(Instant::now() < deadline, "{error}");
        sleep(Duration::from_millis(50)).await;
    }
    let foreign = Shows { node: Some("node-b".into()), ..shows };
    let error = foreign.ask(&world, &Wanted::own()).await.err().unwrap();
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
}

#[tokio::test]
async fn options_at_fault_are_named() {
    let start = |change: fn(&mut mesh_control::Config)| async move {
        let dir = tempfile::tempdir().unwrap();
        let (mut config, _state) = config(dir.path());
        change(&mut config);
        format!("{:#}", mesh_control::ControlPlane::start(config).await.unwrap_err())
    };
    for (text, option) in [
        (
            start(|config| config.join_tokens = Some("/nowhere/tokens".into())).await,
            "--join-tokens: /nowhere/tokens",
        ),
        (start(|config| config.crl = Some("/nowhere/crl".into())).await, "--crl /nowhere/crl"),
        (start(|config| config.token_issuer = Some("x".into())).await, "--token-issuer needs --token-jwks"),
        (start(|config| config.trust_domain = "a/b".into()).await, "--trust-domain \"a/b\""),
        (start(|config| config.ca_dir = "/proc/nowhere".into()).await, "--ca-dir /proc/nowhere"),
        (start(|config| config.tls_name = vec!["\u{e9}".into()]).await, "--tls-name"),
    ] {
        assert!(text.contains(option), "{option} in {text}");
    }
}
