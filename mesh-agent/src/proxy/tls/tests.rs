use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::fixtures::{Authority, Pair, Wanted, client, id, server};
use super::*;
use crate::fixtures::Directory;
use crate::identity::Certificates;

/// The handshake must fail at the client, or at the server when the client has already finished.
async fn refused(pair: &Pair) -> (Option<HandshakeError>, Option<HandshakeError>) {
    let (near, far) = pair.shake().await;
    (near.err(), far.err())
}

#[tokio::test]
async fn each_end_knows_the_other() {
    let (near, far) = Pair::new().tunnel().await;
    assert_eq!((near.peer, far.peer), (server(), client()));
    assert_eq!((near.protocol, far.protocol), (Protocol::Stream, Protocol::Stream));
}

#[tokio::test]
async fn a_peer_without_our_protocol_gets_http2() {
    let (near, far) = Pair::speaking(vec![Protocol::H2]).tunnel().await;
    assert_eq!((near.protocol, far.protocol), (Protocol::H2, Protocol::H2));
}

#[tokio::test]
async fn bytes_arrive_unchanged_both_ways() {
    let (near, far) = Pair::new().tunnel().await;
    let (mut near, mut far) = (TlsIo::new(near), TlsIo::new(far));
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = sent.clone();
    let echo = tokio::spawn(async move {
        let mut buffer = Vec::new();
        far.read_to_end(&mut buffer).await.unwrap();
        far.write_all(&buffer).await.unwrap();
        far.shutdown().await.unwrap();
    });
    near.write_all(&sent).await.unwrap();
    near.shutdown().await.unwrap();
    let mut back = Vec::new();
    near.read_to_end(&mut back).await.unwrap();
    assert!(back == expected);
    echo.await.unwrap();
}

#[tokio::test]
async fn a_resumed_session_carries_the_verified_identity() {
    let pair = Pair::new();
    let (near, mut far) = pair.tunnel().await;
    assert!(!near.resumed);
    // The ticket comes after the handshake, through our own record layer.
    let record = far.writer.data(b"x").unwrap();
    far.tcp.write_all(&record).await.unwrap();
    let mut byte = [0];
    TlsIo::new(near).read_exact(&mut byte).await.unwrap();
    let (near, far) = pair.tunnel().await;
    assert!(near.resumed && far.resumed);
    assert_eq!((near.peer, far.peer), (server(), client()));
}

#[tokio::test]
async fn a_new_certificate_ends_old_sessions() {
    let pair = Pair::new();
    let (near, mut far) = pair.tunnel().await;
    let record = far.writer.data(b"x").unwrap();
    far.tcp.write_all(&record).await.unwrap();
    TlsIo::new(near).read_exact(&mut [0]).await.unwrap();
    pair.server_held.set(&server(), pair.authority.issue(&Wanted::of(&server())));
    let (near, far) = pair.tunnel().await;
    assert!(!near.resumed && !far.resumed);
}

#[tokio::test]
async fn a_session_does_not_outlive_its_certificate() {
    let pair = Pair::new();
    let brief = Wanted { until: SystemTime::now() + Duration::from_secs(2), ..Wanted::of(&client()) };
    pair.client_held.set(&client(), pair.authority.issue(&brief));
    let (near, mut far) = pair.tunnel().await;
    let record = far.writer.data(b"x").unwrap();
    far.tcp.write_all(&record).await.unwrap();
    TlsIo::new(near).read_exact(&mut [0]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (_near, far) = pair.shake().await;
    assert!(matches!(far, Err(HandshakeError::NotTrusted(NotTrusted::Lapsed))));
}

#[tokio::test]
async fn keys_change_in_the_middle() {
    let (mut near, far) = Pair::new().tunnel().await;
    let mut far = TlsIo::new(far);
    for round in 0..5_u8 {
        let update = near.writer.update_key(true).unwrap();
        let data = near.writer.data(&[round]).unwrap();
        near.tcp.write_all(&[update, data].concat()).await.unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).await.unwrap();
        // The answer comes with a key of its own.
        far.write_all(&byte).await.unwrap();
        let mut io = TlsIo::new(near);
        let mut back = [0];
        io.read_exact(&mut back).await.unwrap();
        assert_eq!(back, [round]);
        near = io.into_tls();
    }
}

#[tokio::test]
async fn keys_change_as_another_implementation_changes_them() {
    for suite in [
        rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ] {
        let pair = Pair::new();
        let mut config = (*pair.client.client(&client(), &server()).unwrap().config).clone();
        config.key_log = Arc::new(rustls::NoKeyLog {});
        let provider = rustls::crypto::CryptoProvider {
            cipher_suites: vec![suite],
            ..rustls::crypto::aws_lc_rs::default_provider()
        };
        let verifier = pair.client.client(&client(), &server()).unwrap().verifier;
        let mut only = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::clone(&config.client_auth_cert_resolver));
        only.alpn_protocols = config.alpn_protocols;
        let (near, far) = super::fixtures::sockets().await;
        let name = rustls::pki_types::ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
        let connector = tokio_rustls::TlsConnector::from(Arc::new(only));
        let own = server();
        let (near, far) = tokio::join!(connector.connect(name, near), accept(&pair.server, &own, far));
        let (mut near, mut far) = (near.unwrap(), far.unwrap());
        for round in 0..4_u8 {
            // It changes its key, and asks for a change of ours.
            near.get_mut().1.refresh_traffic_keys().unwrap();
            near.write_all(&[round]).await.unwrap();
            let mut io = TlsIo::new(far);
            let mut byte = [0];
            io.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [round]);
            io.write_all(&byte).await.unwrap();
            near.read_exact(&mut byte).await.unwrap();
            // And ours, unasked.
            far = io.into_tls();
            let update = far.writer.update_key(true).unwrap();
            let data = far.writer.data(&[round + 1]).unwrap();
            far.tcp.write_all(&[update, data].concat()).await.unwrap();
            near.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [round + 1]);
            near.write_all(&byte).await.unwrap();
            let mut io = TlsIo::new(far);
            io.read_exact(&mut byte).await.unwrap();
            far = io.into_tls();
            far.reader.rest();
            far.writer.rest();
        }
    }
}

#[tokio::test]
async fn another_workload_is_refused() {
    let pair = Pair::new();
    pair.server_held.set(&server(), pair.authority.issue(&Wanted::of(&id("ns/shop/sa/thief"))));
    let (near, _far) = refused(&pair).await;
    let near = near.unwrap().to_string();
    assert!(near.contains("sa/thief") && near.contains("sa/server"), "{near}");
}

#[tokio::test]
async fn another_trust_domain_is_refused() {
    let pair = Pair::new();
    let foreign =
        Wanted { names: vec!["spiffe://other.mesh/ns/shop/sa/client".to_owned()], ..Wanted::of(&client()) };
    pair.client_held.set(&client(), pair.authority.issue(&foreign));
    let (_near, far) = refused(&pair).await;
    let far = far.unwrap().to_string();
    assert!(far.contains("other.mesh"), "{far}");
}

#[tokio::test]
async fn certificates_that_are_not_valid_now_are_refused() {
    let now = SystemTime::now();
    for (from, until) in [(-7200, -60), (60, 7200)] {
        let at = |seconds: i64| {
            let offset = Duration::from_secs(seconds.unsigned_abs());
            if seconds < 0 { now - offset } else { now + offset }
        };
        let pair = Pair::new();
        let wanted = Wanted { from: at(from), until: at(until), ..Wanted::of(&client()) };
        pair.client_held.set(&client(), pair.authority.issue(&wanted));
        assert!(refused(&pair).await.1.is_some());
        let pair = Pair::new();
        let wanted = Wanted { from: at(from), until: at(until), ..Wanted::of(&server()) };
        pair.server_held.set(&server(), pair.authority.issue(&wanted));
        assert!(refused(&pair).await.0.is_some());
    }
}

#[tokio::test]
async fn another_authority_is_refused() {
    let pair = Pair::new();
    let mut forged = Authority::new().issue(&Wanted::of(&client()));
    forged.roots = pair.authority.issue(&Wanted::of(&client())).roots;
    pair.client_held.set(&client(), forged);
    assert!(refused(&pair).await.1.is_some());
    let pair = Pair::new();
    pair.server_held.set(&server(), Authority::new().issue(&Wanted::of(&server())));
    assert!(refused(&pair).await.0.is_some());
}

#[tokio::test]
async fn two_names_or_a_nodes_name_are_refused() {
    let node = "spiffe://cluster.local/mesh.dev/node/n1".to_owned();
    for names in [vec![client().to_string(), id("ns/a/sa/b").to_string()], vec![node], vec![]] {
        let pair = Pair::new();
        let wanted = Wanted { names, ..Wanted::of(&client()) };
        pair.client_held.set(&client(), pair.authority.issue(&wanted));
        assert!(refused(&pair).await.1.is_some());
    }
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let pair = Pair::new();
    let mut bare = pair.authority.issue(&Wanted::of(&client()));
    let key = bare.certified.key.clone();
    bare.certified = std::sync::Arc::new(rustls::sign::CertifiedKey::new(vec![], key));
    pair.client_held.set(&client(), bare);
    let (_near, far) = refused(&pair).await;
    assert!(far.is_some());
}

#[tokio::test]
async fn a_workload_without_certificate_dials_nobody() {
    let pair = Pair::new();
    let (near, _far) = fixtures::sockets().await;
    let refused = connect(&pair.client, &id("ns/shop/sa/late"), &server(), near).await;
    assert!(matches!(refused, Err(HandshakeError::Config(ConfigError::NoCertificate(_)))));
}

/// Every bit of a record matters, in any place, and none makes the reader panic.
#[tokio::test]
async fn changed_records_end_their_connection() {
    for position in 0..40 {
        let (mut near, mut far) = Pair::new().tunnel().await;
        // The ticket that the server has sent is not in the way of this direction.
        let mut record = near.writer.data(b"sixteen bytes...").unwrap();
        let position = position % record.len();
        record[position] ^= 1 << (position % 8);
        record.resize(record.len() + (1 << 15), 0);
        assert!(far.reader.open(&mut record).is_err(), "byte {position}");
    }
}

#[tokio::test]
async fn noise_is_no_record() {
    let (_near, mut far) = Pair::new().tunnel().await;
    let mut state = 1_u64;
    for length in 0..2_000 {
        let mut noise: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u8
            })
            .collect();
        if length % 2 == 0 && length > 5 {
            noise[..3].copy_from_slice(&[23, 3, 3]);
        }
        assert!(!matches!(far.reader.open(&mut noise), Ok(Some(_))));
    }
}

#[tokio::test]
async fn records_without_data_have_an_end() {
    let (mut near, mut far) = Pair::new().tunnel().await;
    let last = (0..1_000).find_map(|_| {
        let mut record = near.writer.update_key(false).unwrap();
        far.reader.open(&mut record).err()
    });
    assert_eq!(last, Some(TlsError::Idle));
}

#[tokio::test]
async fn a_cut_connection_is_not_an_end() {
    let (near, far) = Pair::new().tunnel().await;
    drop(far);
    let error = TlsIo::new(near).read(&mut [0]).await.unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset));
}

/// Passes bytes on, with one bit changed.
async fn meddle(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    at: usize,
) {
    let (mut seen, mut buffer) = (0, [0; 4096]);
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if (seen..seen + read).contains(&at) {
            buffer[at - seen] ^= 1 << (at % 8);
        }
        seen += read;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// Somebody on the way changes the handshake, anywhere: nobody panics, and nobody is taken for another.
#[tokio::test]
async fn a_changed_handshake_fails_or_changes_nothing() {
    let pair = Pair::new();
    let mut refused = 0;
    for round in 0..150_usize {
        let ((near, one), (other, far)) = (fixtures::sockets().await, fixtures::sockets().await);
        let ((from_near, to_near), (from_far, to_far)) = (one.into_split(), other.into_split());
        let (up, down) = if round % 2 == 0 { (round * 13, usize::MAX) } else { (usize::MAX, round * 13) };
        let way = tokio::spawn(async move {
            tokio::join!(meddle(from_near, to_far, up), meddle(from_far, to_near, down));
        });
        let (own, peer) = (client(), server());
        let ends = async {
            let (near, far) =
                tokio::join!(connect(&pair.client, &own, &peer, near), accept(&pair.server, &peer, far));
            refused += usize::from(near.is_err() || far.is_err());
            assert!(near.is_err() || near.is_ok_and(|near| near.peer == peer));
            assert!(far.is_err() || far.is_ok_and(|far| far.peer == own));
        };
        // A changed length makes an end wait for more: the limit is its caller's.
        drop(tokio::time::timeout(Duration::from_millis(300), ends).await);
        way.abort();
    }
    assert!(refused > 50, "{refused}");
}

/// Both ends honour the lists in a file that begins with nobody on it.
fn revoking(pair: &mut Pair, folder: &Directory) -> (std::path::PathBuf, [Arc<Revocations>; 2]) {
    let file = folder.path().join("crl.pem");
    std::fs::write(&file, pair.authority.revoke(&[])).unwrap();
    let lists = [Revocations::read(&file).unwrap(), Revocations::read(&file).unwrap()];
    let configs = |held: &Arc<super::fixtures::Held>, lists: &Arc<Revocations>| {
        let held: Arc<dyn Certificates> = Arc::<super::fixtures::Held>::clone(held);
        Arc::new(Configs::new(held).honouring(Arc::clone(lists)))
    };
    pair.client = configs(&pair.client_held, &lists[0]);
    pair.server = configs(&pair.server_held, &lists[1]);
    (file, lists)
}

#[tokio::test]
async fn a_revoked_peer_is_refused_by_either_end_and_its_tunnels_carry_no_more() {
    for (revoked, looks) in [(client(), 1), (server(), 0)] {
        let folder = Directory::new();
        let mut pair = Pair::new();
        let (file, lists) = revoking(&mut pair, &folder);
        let (near, far) = pair.tunnel().await;
        assert!(near.may_begin() && far.may_begin());
        let held = if revoked == client() { &pair.client_held } else { &pair.server_held };
        let certificate = held.current(&revoked).unwrap();
        std::fs::write(&file, pair.authority.revoke(&[&certificate])).unwrap();
        // Only the end that judges reads it, so that it is known who refuses.
        assert_eq!(lists[looks].look(), Some(Ok(())));
        assert_eq!(lists[looks].look(), None, "nothing has changed since");
        let judging = if looks == 0 { &near } else { &far };
        assert!(!judging.may_begin() && judging.standing.is_revoked(), "{revoked}");
        let (client_failed, server_failed) = refused(&pair).await;
        let error = if looks == 0 { client_failed } else { server_failed };
        assert!(error.is_some_and(|error| error.to_string().contains("Revoked")), "{revoked}");
        // Another certificate of the same workload is as good as any.
        held.set(&revoked, pair.authority.issue(&Wanted::of(&revoked)));
        let (near, far) = pair.tunnel().await;
        assert!(near.may_begin() && far.may_begin());
    }
}

#[tokio::test]
async fn a_list_that_ends_says_nothing_of_those_that_it_was_asked_about() {
    let folder = Directory::new();
    let mut pair = Pair::new();
    let (file, lists) = revoking(&mut pair, &folder);
    let until = SystemTime::now() + Duration::from_secs(3);
    std::fs::write(&file, pair.authority.revoke_until(&[], until)).unwrap();
    assert!(lists.iter().all(|list| list.look() == Some(Ok(()))));
    let (near, far) = pair.tunnel().await;
    assert!(near.may_begin() && far.may_begin());
    while SystemTime::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!near.may_begin() && !far.may_begin() && !near.standing.is_revoked());
    // Neither by another handshake nor by a session that was begun before.
    let (client, server) = pair.shake().await;
    assert!(client.is_err() || server.is_err());
    std::fs::write(&file, pair.authority.revoke(&[])).unwrap();
    assert!(lists.iter().all(|list| list.look() == Some(Ok(()))));
    let (near, far) = pair.tunnel().await;
    assert!(near.may_begin() && far.may_begin());
}

#[tokio::test]
async fn whose_issuer_is_revoked_is_revoked_and_what_cannot_be_read_stands_for_nobody() {
    let folder = Directory::new();
    let mut pair = Pair::new();
    let (file, [lists, _]) = revoking(&mut pair, &folder);
    let verifier = pair.client.client(&client(), &server()).unwrap().verifier;
    // As good as an issuer's for this: a certificate of the chain that has a number.
    let leaf = pair.client_held.current(&client()).unwrap();
    let issuer = pair.server_held.current(&server()).unwrap();
    let [first, second] = [&leaf, &issuer].map(|one| one.certified.cert[0].clone());
    let standing = |chain: &[_]| verifier.standing(chain);
    let (alone, both) =
        (standing(std::slice::from_ref(&first)).unwrap(), standing(&[first.clone(), second]).unwrap());
    std::fs::write(&file, pair.authority.revoke(&[&issuer])).unwrap();
    assert_eq!(lists.look(), Some(Ok(())));
    assert!(both.is_revoked() && !alone.is_revoked());
    assert!(!both.is_current() && !alone.is_current());
    let garbage = rustls::pki_types::CertificateDer::from(vec![1, 2, 3]);
    assert_eq!(standing(&[first, garbage]).unwrap_err(), NotTrusted::Unreadable);
}

#[tokio::test]
async fn a_list_that_cannot_be_used_refuses_everybody() {
    let folder = Directory::new();
    let mut pair = Pair::new();
    let (file, lists) = revoking(&mut pair, &folder);
    let (_near, far) = pair.tunnel().await;
    std::fs::write(&file, "-----BEGIN X509 CRL-----\nnonsense\n-----END X509 CRL-----\n").unwrap();
    assert!(matches!(lists[1].look(), Some(Err(_))));
    assert!(!far.may_begin() && !far.standing.is_revoked());
    assert!(refused(&pair).await.1.is_some());
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(lists[1].look(), Some(Err(_))));
    assert!(refused(&pair).await.1.is_some());
    std::fs::write(&file, pair.authority.revoke(&[])).unwrap();
    assert_eq!(lists[1].look(), Some(Ok(())));
    pair.tunnel().await;
    for content in ["", "no list at all"] {
        std::fs::write(&file, content).unwrap();
        assert!(Revocations::read(&file).is_err(), "{content:?}");
    }
}

#[test]
fn a_list_that_only_the_handshake_would_refuse_is_refused_when_it_is_read() {
    use rustls::pki_types::CertificateRevocationListDer;
    use rustls::pki_types::pem::PemObject;

    let folder = Directory::new();
    let file = folder.path().join("crl.der");
    let whole =
        CertificateRevocationListDer::from_pem_slice(Authority::new().revoke(&[]).as_bytes()).unwrap();
    std::fs::write(&file, &whole).unwrap();
    Revocations::read(&file).unwrap();
    // What was its number is now that of the list that this one says the difference to.
    let (number, base) = ([0x55, 0x1d, 20], [0x55, 0x1d, 27]);
    let mut difference = whole.to_vec();
    let at = difference.windows(3).position(|oid| oid == number).unwrap();
    difference[at..at + 3].copy_from_slice(&base);
    std::fs::write(&file, &difference).unwrap();
    let error = Revocations::read(&file).unwrap_err();
    assert!(error.starts_with("a revocation list cannot be used"), "{error}");
}
