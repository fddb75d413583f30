//! Roots that come and go while connections are open.

use super::*;

/// The node that judges, and the one that is judged.
fn nodes(world: &World, server_judges: bool) -> (&Node, &Node, crate::identity::SpiffeId) {
    if server_judges {
        (&world.server, &world.client, client())
    } else {
        (&world.client, &world.server, server())
    }
}

#[tokio::test]
async fn what_is_open_ends_when_the_peers_root_is_dropped_unless_it_has_a_new_certificate() {
    for server_judges in [true, false] {
        let Some(world) = World::new().await else { return };
        let next = Authority::new();
        let (judging, judged, peer) = nodes(&world, server_judges);
        let revoked = || match server_judges {
            true => judging.outcome(|figures| &figures.inbound, "revoked"),
            false => judging.outcome(|figures| &figures.outbound, "revoked"),
        };
        let (mut near, mut far) = world.joined(false, 8080).await;
        passes(&mut near, &mut far, b"hello").await;
        // Both are trusted for a while, and whoever renews its certificate then gets one of the new root.
        for node in [judging, judged] {
            node.certificates.trust_in(&[&world.authority, &next]);
        }
        judged.certificates.set(&peer, next.issue(&Wanted::of(&peer)));
        judged.certificates.trust_in(&[&world.authority, &next]);
        let (mut new_near, mut new_far) = world.joined(false, 8081).await;
        passes(&mut near, &mut far, b"still there").await;
        judging.certificates.trust_in(&[&next]);
        is_reset(&mut near).await;
        is_reset(&mut far).await;
        until("it is told", || revoked() == 1).await;
        passes(&mut new_near, &mut new_far, b"hello").await;
        // Another change, which it does not need.
        judging.certificates.trust_in(&[&Authority::new(), &next]);
        sleep(Duration::from_millis(200)).await;
        passes(&mut new_near, &mut new_far, b"still there").await;
        assert_eq!(revoked(), 1);
    }
}
