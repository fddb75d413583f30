use rustls::sign::CertifiedKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::fixtures::{Authority, Held, Pair, Wanted, client, server, sockets};
use super::super::{HandshakeError, Tls, TlsIo, accept};
use super::*;
use crate::identity::{Certificates, SpiffeId};

/// Both ends with what each of them holds: who judges first, then who is judged.
fn sides(pair: &Pair) -> [(&Held, &Held, SpiffeId); 2] {
    let (client_held, server_held) = (&*pair.client_held, &*pair.server_held);
    [(client_held, server_held, server()), (server_held, client_held, client())]
}

/// What this one of both ends has.
fn end<'a>(judging: &Held, pair: &Pair, (near, far): (&'a Tls, &'a Tls)) -> (&'a Tls, &'a Tls) {
    if std::ptr::eq(judging, &*pair.client_held) { (near, far) } else { (far, near) }
}

/// A tunnel whose client has a ticket, so that the next one could resume its session.
async fn with_ticket(pair: &Pair) -> (Tls, Tls) {
    let (near, mut far) = pair.tunnel().await;
    let record = far.writer.data(b"x").unwrap();
    far.tcp.write_all(&record).await.unwrap();
    let mut near = TlsIo::new(near);
    near.read_exact(&mut [0]).await.unwrap();
    (near.into_tls(), far)
}

#[tokio::test]
async fn whose_root_is_dropped_counts_as_revoked_at_the_end_that_dropped_it() {
    for side in 0..2 {
        let pair = Pair::new();
        let next = Authority::new();
        let (judging, judged, peer) = sides(&pair)[side].clone();
        let (near, far) = with_ticket(&pair).await;
        judging.trust_in(&[&next]);
        let (by, other) = end(judging, &pair, (&near, &far));
        assert!(!by.may_begin() && by.standing.is_revoked(), "{peer}");
        assert!(other.may_begin() && !other.standing.is_revoked(), "{peer}");
        // Neither anew nor by the session of before.
        let (near, far) = pair.shake().await;
        let refused = if side == 0 { near.err() } else { far.err() };
        let Some(HandshakeError::Tls(rustls::Error::InvalidCertificate(_))) = &refused else {
            panic!("{refused:?}")
        };
        // With a certificate of the new root it is as good as any.
        judged.set(&peer, next.issue(&Wanted::of(&peer)));
        judged.trust_in(&[&pair.authority, &next]);
        let (near, far) = pair.tunnel().await;
        assert!(near.may_begin() && far.may_begin() && !near.resumed);
    }
}

#[tokio::test]
async fn roots_that_a_peer_does_not_need_come_and_go_without_it() {
    for side in 0..2 {
        let (pair, next) = (Pair::new(), Authority::new());
        let (judging, _judged, _peer) = sides(&pair)[side].clone();
        let (near, far) = pair.tunnel().await;
        let (by, _other) = end(judging, &pair, (&near, &far));
        for roots in [&[&pair.authority, &next][..], &[&pair.authority], &[&next, &pair.authority]] {
            judging.trust_in(roots);
            assert!(by.may_begin() && !by.standing.is_revoked());
        }
        // And back: what was dropped by mistake is trusted again.
        judging.trust_in(&[&next]);
        assert!(!by.may_begin());
        judging.trust_in(&[&pair.authority]);
        assert!(by.may_begin() && !by.standing.is_revoked());
        judging.trust_in(&[]);
        assert!(!by.may_begin() && by.standing.is_revoked(), "nobody is trusted");
    }
}

#[tokio::test]
async fn a_peer_that_another_root_vouches_for_does_not_need_its_first() {
    for side in 0..2 {
        let (pair, next) = (Pair::new(), Authority::new());
        let (judging, judged, peer) = sides(&pair)[side].clone();
        let issued = pair.authority.issue(&Wanted::of(&peer));
        let chain = vec![issued.certified.cert[0].clone(), pair.authority.vouched_for_by(&next)];
        let certified = Arc::new(CertifiedKey::new(chain, Arc::clone(&issued.certified.key)));
        judged.set(&peer, crate::identity::WorkloadCertificate { certified, ..issued });
        let (near, far) = pair.tunnel().await;
        let (by, _other) = end(judging, &pair, (&near, &far));
        judging.trust_in(&[&next]);
        assert!(by.may_begin() && !by.standing.is_revoked(), "{peer}");
        judging.trust_in(&[&Authority::new()]);
        assert!(!by.may_begin() && by.standing.is_revoked(), "{peer}");
    }
}

#[tokio::test]
async fn a_certificate_that_has_ended_ends_nothing_that_is_open_when_roots_change() {
    for side in 0..2 {
        let (pair, next) = (Pair::new(), Authority::new());
        let (judging, judged, peer) = sides(&pair)[side].clone();
        let until = SystemTime::now() + Duration::from_secs(2);
        judged
            .set(&peer, pair.authority.issue(&super::super::fixtures::Wanted { until, ..Wanted::of(&peer) }));
        let (near, far) = pair.tunnel().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        judging.trust_in(&[&pair.authority, &next]);
        let (by, _other) = end(judging, &pair, (&near, &far));
        assert!(!by.may_begin() && !by.standing.is_revoked(), "{peer}");
    }
}

#[tokio::test]
async fn a_handshake_that_began_before_its_root_was_dropped_is_refused() {
    let pair = Pair::new();
    let (near, far) = sockets().await;
    let (own, configs) = (server(), Arc::clone(&pair.server));
    let mut accepting = Box::pin(accept(&configs, &own, far));
    // It has its configuration, and waits for the client's first word.
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut accepting).await.is_err());
    pair.server_held.trust_in(&[&Authority::new()]);
    let (client, server) = (client(), server());
    let (_near, far) = tokio::join!(super::super::connect(&pair.client, &client, &server, near), accepting);
    assert!(matches!(far, Err(HandshakeError::NotTrusted(NotTrusted::RootDropped))));
}

#[tokio::test]
async fn a_chain_is_kept_once_and_judged_once_for_all_connections_with_a_peer() {
    let pair = Pair::new();
    let (one, _) = pair.tunnel().await;
    let (other, _) = pair.tunnel().await;
    assert!(Arc::ptr_eq(&one.standing.chain, &other.standing.chain));
    pair.client_held.trust_in(&[&pair.authority]);
    let generation = pair.client_held.trusted().generation();
    assert_eq!(other.standing.chain.judged_by(generation), None, "nobody has asked");
    assert!(one.may_begin());
    assert_eq!(other.standing.chain.judged_by(generation), Some(true));
    assert_eq!(other.standing.chain.judged_by(generation + 1), None);
}

#[test]
fn chains_of_peers_that_have_gone_are_forgotten() {
    let (authority, trust, chains) = (Authority::new(), Trust::default(), Chains::default());
    let provider = crate::identity::answer::provider();
    let certificate = authority.issue(&Wanted::of(&client()));
    let of = |chain: &[CertificateDer<'static>], side| {
        chains.of(chain, side, &provider, (&trust, &certificate.roots)).unwrap()
    };
    let kept = of(&certificate.certified.cert, Side::Client);
    // The same in the other role is verified in another way.
    assert!(!Arc::ptr_eq(&kept, &of(&certificate.certified.cert, Side::Server)));
    for _ in 0..300 {
        drop(of(&authority.issue(&Wanted::of(&client())).certified.cert, Side::Client));
    }
    assert!(Arc::ptr_eq(&kept, &of(&certificate.certified.cert, Side::Client)));
    assert!(chains.0.lock().unwrap().chains.len() <= 65);
}
