//! Changing certificates while agents come and go.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh_control::ca::rotation;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationList, CertificateRevocationListParams,
    CertifiedIssuer, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, RevocationReason, RevokedCertParams,
    SerialNumber,
};
use tokio::time::{Instant, sleep};
use tonic::Code;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    certificates::{ders, shop, verified},
    client::{Issued, Shows, Wanted},
    manifests::*,
    subscriber::Subscriber,
    world::{PATIENCE, World, config},
};

/// Asks until the answer is as wanted.
async fn until(world: &World, shows: &Shows, wanted: impl Fn(Result<&Issued, Code>) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = shows.ask(world, &Wanted::own()).await;
        if wanted(answer.as_ref().map_err(tonic::Status::code)) {
            return;
        }
        assert!(Instant::now() < deadline, "still {:?}", answer.err());
        sleep(Duration::from_millis(50)).await;
    }
}

fn serial(pem: &str) -> SerialNumber {
    let der = ders(pem).remove(0);
    SerialNumber::from_slice(X509Certificate::from_der(&der).unwrap().1.raw_serial())
}

/// An authority of the user's own: a self-signed root, an intermediate, and an issuing certificate.
fn own_authority(dir: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
    let params = |name: String| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    let key = || KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let root = CertifiedIssuer::self_signed(params(format!("{name} root")), key()).unwrap();
    let middle = CertifiedIssuer::signed_by(params(format!("{name} middle")), key(), &root).unwrap();
    let (mut issuing, issuing_key) = (params(format!("{name} issuing")), key());
    change(&mut issuing);
    let cert = issuing.signed_by(&issuing_key, &middle).unwrap().pem();
    fs::create_dir_all(dir).unwrap();
    // As Istio's makefile lays them out: the chain holds all of it.
    fs::write(dir.join("ca-key.pem"), issuing_key.serialize_pem()).unwrap();
    fs::write(dir.join("cert-chain.pem"), [&cert, &middle.pem(), &root.pem()].map(String::as_str).concat())
        .unwrap();
    fs::write(dir.join("root-cert.pem"), root.pem()).unwrap();
    fs::write(dir.join("ca-cert.pem"), cert).unwrap();
}

#[tokio::test]
async fn a_new_issuer_and_a_new_root_disturb_nobody() {
    let manifests = tempfile::tempdir().unwrap();
    fs::write(manifests.path().join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
    let (mut config, state) = config(manifests.path());
    config.certificate_lifetime = Duration::from_secs(5);
    let lifetime = config.certificate_lifetime;
    let world = Arc::new(World::with(manifests, config, state).await);
    let (done, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let agent = tokio::spawn({
        let (world, done, asked) = (Arc::clone(&world), Arc::clone(&done), Arc::clone(&asked));
        async move {
            // It knows the roots that came with its last certificate, and nothing newer.
            let mut shows = Shows::token();
            let mut roots = world.roots();
            while !done.load(Ordering::Relaxed) {
                let channel = shows.connect_by(&world, &roots).await.unwrap();
                let own = shows.ask_on(channel, &Wanted::own()).await.unwrap();
                verified(&own, &roots);
                roots.clone_from(own.chain.last().unwrap());
                shows = own.shown();
                asked.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let (dir, old) = (world.config.ca_dir.clone(), world.roots());
    let pause = || sleep(Duration::from_millis(1_500));
    rotation::new_issuer(&dir, SystemTime::now()).unwrap();
    pause().await;
    rotation::add_root(&dir, SystemTime::now()).unwrap();
    assert!(rotation::use_root(&dir, lifetime, SystemTime::now()).is_err());
    sleep(lifetime + Duration::from_secs(1)).await;
    rotation::use_root(&dir, lifetime, SystemTime::now()).unwrap();
    sleep(lifetime + Duration::from_secs(1)).await;
    rotation::drop_roots(&dir, lifetime, SystemTime::now()).unwrap();
    pause().await;
    done.store(true, Ordering::Relaxed);
    agent.await.unwrap();
    assert!(asked.load(Ordering::Relaxed) > 50);
    let own = Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    assert!(!world.roots().contains(old.trim()));
    assert_eq!(own.chain.last().unwrap().trim(), world.roots().trim());
}

#[tokio::test]
async fn an_own_authority_with_intermediates_is_taken() {
    let (config, state) = config(tempfile::tempdir().unwrap().path());
    own_authority(&config.ca_dir, "own", |_| {});
    let dir = tempfile::tempdir().unwrap();
    let config = mesh_control::Config { manifests: dir.path().to_owned(), ..config };
    let world = World::with(dir, config, state).await;
    let own = Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    assert_eq!(own.chain.len(), 4);
    verified(&own, &world.roots());
    own.shown().ask(&world, &Wanted::own()).await.unwrap();
}

#[tokio::test]
async fn an_own_authority_that_is_none_is_refused_by_the_name_of_the_file() {
    let expired = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let early = |params: &mut CertificateParams| params.not_before = rcgen::date_time_ymd(3000, 1, 1);
    let leaf = |params: &mut CertificateParams| params.is_ca = IsCa::ExplicitNoCa;
    type Make<'a> = &'a dyn Fn(&Path);
    let cases: [(Make<'_>, &str); 8] = [
        (&|dir| own_authority(dir, "x", expired), "ca-cert.pem: CN=x issuing expired at"),
        (&|dir| own_authority(dir, "x", early), "ca-cert.pem: CN=x issuing is not valid before"),
        (&|dir| own_authority(dir, "x", leaf), "its CA bit is not set"),
        (
            &|dir| {
                own_authority(dir, "x", |_| {});
                fs::write(dir.join("ca-key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
            },
            "ca-key.pem: is not the key of the certificate in ca-cert.pem",
        ),
        (
            &|dir| {
                own_authority(dir, "x", |_| {});
                fs::remove_file(dir.join("cert-chain.pem")).unwrap();
            },
            "does not verify to a root of root-cert.pem",
        ),
        (
            &|dir| {
                own_authority(&dir.join("other"), "x", |_| {});
                own_authority(dir, "x", |_| {});
                fs::copy(dir.join("other/root-cert.pem"), dir.join("root-cert.pem")).unwrap();
            },
            "does not verify to a root of root-cert.pem",
        ),
        (
            &|dir| {
                own_authority(dir, "x", |_| {});
                fs::write(dir.join("root-cert.pem"), "nothing").unwrap();
            },
            "root-cert.pem: holds no certificate",
        ),
        (
            &|dir| {
                own_authority(dir, "x", |_| {});
                fs::remove_file(dir.join("ca-key.pem")).unwrap();
            },
            "ca-key.pem: is missing",
        ),
    ];
    for (make, reason) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (config, _state) = config(dir.path());
        make(&config.ca_dir);
        let error = format!("{:#}", mesh_control::ControlPlane::start(config).await.unwrap_err());
        assert!(error.contains("--ca-dir") && error.contains(reason), "{reason} in {error}");
    }
}

#[tokio::test]
async fn a_bad_replacement_is_refused_and_a_good_one_taken() {
    let world = shop().await;
    let (dir, old) = (&world.config.ca_dir, world.roots());
    let good = fs::read_to_string(dir.join("ca-key.pem")).unwrap();
    fs::write(dir.join("ca-key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let counted = r#"mesh_control_credentials_refused_total{what="ca_dir"} 1"#;
    while !crate::management::scrape(&world, "/metrics").await.contains(counted) {
        assert!(Instant::now() < deadline);
        sleep(Duration::from_millis(50)).await;
    }
    let own = Shows::token().ask(&world, &Wanted::own()).await.unwrap();
    assert_eq!(own.chain.last().unwrap().trim(), old.trim());
    fs::write(dir.join("ca-key.pem"), good).unwrap();
    own_authority(dir, "new", |_| {});
    let new = world.roots();
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Clients know one of the two roots: whoever is not served by it comes again.
        if let Ok(channel) = Shows::token().connect_by(&world, &new).await {
            let own = Shows::token().ask_on(channel, &Wanted::own()).await.unwrap();
            assert_eq!(own.chain.last().unwrap().trim(), new.trim());
            return;
        }
        assert!(Instant::now() < deadline);
        sleep(Duration::from_millis(50)).await;
    }
}

/// A control plane that reads revocation lists, and what signs them.
struct Listed {
    world: World,
    path: std::path::PathBuf,
    issuer: (String, String),
}

impl Listed {
    /// With a list of nothing until `end`.
    async fn start(end: SystemTime) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.yaml"), pod("a", "10.0.0.1")).unwrap();
        let (mut config, state) = config(dir.path());
        let path = state.path().join("crl.pem");
        config.crl = Some(path.clone());
        // The authority is needed before there can be a list of it.
        let first = mesh_control::ControlPlane::start(mesh_control::Config { crl: None, ..config.clone() })
            .await
            .unwrap();
        first.stop().await.unwrap();
        let read = |name: &str| fs::read_to_string(config.ca_dir.join(name)).unwrap();
        let issuer = (read("ca-cert.pem"), read("ca-key.pem"));
        fs::write(&path, list(&issuer, &[], end).pem().unwrap()).unwrap();
        let world = World::with(dir, config, state).await;
        Self { world, path, issuer }
    }

    fn list(&self, revoked: &[&SerialNumber], end: SystemTime) -> CertificateRevocationList {
        list(&self.issuer, revoked, end)
    }
}

fn list(
    (cert, key): &(String, String),
    revoked: &[&SerialNumber],
    end: SystemTime,
) -> CertificateRevocationList {
    let issuer = Issuer::from_ca_cert_pem(cert, KeyPair::from_pem(key).unwrap()).unwrap();
    let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: (*serial).clone(),
        revocation_time: SystemTime::now().into(),
        reason_code: Some(RevocationReason::KeyCompromise),
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: (SystemTime::now() - Duration::from_secs(600)).into(),
        next_update: end.into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer).unwrap()
}

#[tokio::test]
async fn who_is_revoked_is_refused_and_a_list_that_is_none_refuses_all() {
    let later = SystemTime::now() + Duration::from_secs(3_600);
    let listed = Listed::start(later).await;
    let (world, path) = (&listed.world, &listed.path);
    let bad = Shows::token().ask(world, &Wanted::own()).await.unwrap();
    let good = Shows::token().ask(world, &Wanted::own()).await.unwrap();
    let mut stream = Subscriber::try_open(world, &bad.shown(), Default::default()).await.unwrap();
    stream.next().await;
    let (bad_shown, good_shown) = (bad.shown(), good.shown());

    // DER is read as well. The stream that is open ends, too.
    fs::write(path, listed.list(&[&serial(&bad.chain[0])], later).der().as_ref()).unwrap();
    assert_eq!(stream.receive().await.unwrap_err().code(), Code::Unauthenticated);
    until(world, &bad_shown, |answer| answer.is_err()).await;
    good_shown.ask(world, &Wanted::own()).await.unwrap();

    for broken in
        [listed.list(&[], SystemTime::now() - Duration::from_secs(60)).pem().unwrap(), "garbage".to_owned()]
    {
        fs::write(path, broken).unwrap();
        until(world, &good_shown, |answer| answer.is_err()).await;
        // A token is no certificate.
        Shows::token().ask(world, &Wanted::own()).await.unwrap();
        fs::write(path, listed.list(&[], later).pem().unwrap()).unwrap();
        until(world, &good_shown, |answer| answer.is_ok()).await;
    }
    fs::remove_file(path).unwrap();
    until(world, &good_shown, |answer| answer.is_err()).await;
}

#[tokio::test]
async fn a_stream_ends_when_the_list_lapses_unless_a_newer_one_has_come() {
    let seconds = Duration::from_secs;
    let start = SystemTime::now();
    let listed = Listed::start(start + seconds(5)).await;
    let world = &listed.world;
    let own = Shows::token().ask(world, &Wanted::own()).await.unwrap().shown();
    let mut stream = Subscriber::try_open(world, &own, Default::default()).await.unwrap();
    stream.next().await;
    let mut by_token = Subscriber::try_open(world, &Shows::token(), Default::default()).await.unwrap();
    by_token.next().await;
    // The newer list is in force before the first one lapses, and lapses itself.
    fs::write(&listed.path, listed.list(&[], start + seconds(9)).pem().unwrap()).unwrap();
    let status = stream.receive().await.unwrap_err();
    let lasted = start.elapsed().unwrap();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("has lapsed"), "{status}");
    assert!((seconds(8)..seconds(12)).contains(&lasted), "{lasted:?}");
    let counted = r#"mesh_control_xds_streams_ended_total{reason="revocation_list"} 1"#;
    let metrics = crate::management::scrape(world, "/metrics").await;
    assert!(metrics.contains(counted), "{metrics}");
    // Nobody comes in by a certificate now; a token is none.
    until(world, &own, |answer| answer.is_err()).await;
    by_token.nothing().await;
    // With a new list all is well again.
    fs::write(&listed.path, listed.list(&[], start + seconds(3_600)).pem().unwrap()).unwrap();
    until(world, &own, |answer| answer.is_ok()).await;
}
