use mesh_common::api::istio::workload as wire;
use mesh_common::api::mesh::v1::WorkloadExtension;

use super::*;
use crate::snapshot::fixtures::{extend_workload, of_service, of_workload, removal, service, update};
use crate::snapshot::{Delta, Locality};

const GRACE: Duration = Duration::from_secs(5);
const A: &str = "c//Pod/shop/a";
const B: &str = "c//Pod/shop/b";
const C: &str = "c//Pod/shop/c";

struct World {
    mesh: Mesh,
    snapshot: Snapshot,
    vantage: Vantage,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let vantage = Vantage {
            node: "node-a".into(),
            locality: Locality::default(),
            cluster: "".into(),
            network: "".into(),
        };
        let mesh = Mesh::new(GRACE);
        Self { mesh, snapshot: Snapshot::new(), vantage, now: Instant::now() }
    }

    fn apply(&mut self, delta: Delta) {
        let changed = self.snapshot.apply(delta);
        self.mesh.apply(&changed, &self.snapshot, &self.vantage, self.now);
    }

    fn pod(&mut self, uid: &str, address: &str, services: &[&str]) {
        self.apply(update(&[of_workload(workload(uid, address, "node-b", services), "1")]));
    }

    fn name(&self, address: &str) -> Option<String> {
        match self.mesh.reach(address.parse().unwrap()) {
            Reach::Unknown => None,
            Reach::Plain(workload) | Reach::Meshed(workload, _) => Some(workload.uid()),
        }
    }
}

fn workload(uid: &str, address: &str, node: &str, services: &[&str]) -> wire::Workload {
    let protocol =
        if uid.ends_with("plain") { wire::TunnelProtocol::None } else { wire::TunnelProtocol::Hbone };
    let workload = crate::snapshot::fixtures::workload(uid, address, node, services);
    wire::Workload { tunnel_protocol: protocol as i32, ..workload }
}

fn meshed(target: &str) -> Endpoint {
    let target: SocketAddr = target.parse().unwrap();
    Endpoint {
        identity: "spiffe://cluster.local/ns/shop/sa/default".parse().unwrap(),
        tunnel: SocketAddr::new(target.ip(), 15008),
        target,
    }
}

#[test]
fn who_is_at_an_address_follows_the_snapshot() {
    let mut world = World::new();
    assert_eq!(world.name("10.0.0.1:80"), None);
    world.pod(A, "10.0.0.1", &[]);
    world.pod("c//Pod/shop/plain", "10.0.0.2", &[]);
    let found = world.mesh.reach("10.0.0.1:80".parse().unwrap());
    assert!(matches!(found, Reach::Meshed(_, found) if found == meshed("10.0.0.1:80")));
    assert!(matches!(world.mesh.reach("10.0.0.2:80".parse().unwrap()), Reach::Plain(_)));
    world.pod(A, "fd00::1", &[]);
    assert_eq!(world.name("10.0.0.1:80"), None);
    assert_eq!(world.name("[fd00::1]:80").as_deref(), Some(A));
    world.apply(removal(&[A]));
    assert_eq!(world.name("[fd00::1]:80"), None);
}

#[test]
fn who_shares_its_nodes_address_is_not_found_by_it() {
    let mut world = World::new();
    let mut host = workload(A, "10.0.0.1", "node-b", &[]);
    host.network_mode = wire::NetworkMode::HostNetwork as i32;
    world.apply(update(&[of_workload(host, "1")]));
    assert_eq!(world.name("10.0.0.1:80"), None);
}

#[test]
fn an_address_that_two_claim_is_the_same_ones_whoever_came_first() {
    for (first, second) in [(A, B), (B, A)] {
        let mut world = World::new();
        world.pod(first, "10.0.0.1", &[]);
        world.pod(second, "10.0.0.1", &[]);
        assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A), "{first} came first");
        // Announced again, nothing changes.
        world.pod(second, "10.0.0.1", &["shop/web.shop.svc"]);
        assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A), "{first} came first");
        for (goes, stays) in [(A, B), (B, A)] {
            world.apply(removal(&[goes]));
            assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(stays));
            world.pod(goes, "10.0.0.1", &[]);
            assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A));
        }
        world.apply(removal(&[A, B]));
        assert_eq!(world.name("10.0.0.1:80"), None);
        assert!(world.mesh.read().outdone.is_empty() && world.mesh.read().by_uid.is_empty());
    }
}

#[test]
fn the_control_plane_says_whose_an_address_is() {
    let announce = |world: &mut World, uid: &str, outdone: bool| {
        let extension = WorkloadExtension { outdone, ..WorkloadExtension::default() };
        let workload = extend_workload(workload(uid, "10.0.0.1", "node-b", &[]), &extension);
        world.apply(update(&[of_workload(workload, if outdone { "outdone" } else { "not" })]));
    };
    let mut world = World::new();
    announce(&mut world, A, false);
    announce(&mut world, B, false);
    assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A));
    let identity = meshed("10.0.0.1:80").identity;
    let mut changed = world.mesh.changed();
    announce(&mut world, A, true);
    assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(B));
    // Who meant the former has the grace time.
    assert!(world.mesh.still("10.0.0.1".parse().unwrap(), Some(&identity)).is_some());
    world.mesh.tick(world.now + GRACE);
    assert!(changed.has_changed().unwrap());
    changed.mark_unchanged();
    announce(&mut world, B, true);
    announce(&mut world, A, false);
    assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A));
    // A pod that is outdone is before an entry that is not.
    announce(&mut world, A, true);
    announce(&mut world, "c/networking.istio.io/WorkloadEntry/evil/web", false);
    assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A));
}

#[test]
fn connections_to_who_has_gone_have_a_grace_time_and_are_then_looked_at_anew() {
    let mut world = World::new();
    world.pod(A, "10.0.0.1", &[]);
    let identity = meshed("10.0.0.1:80").identity;
    let target = "10.0.0.1".parse().unwrap();
    let mut changed = world.mesh.changed();
    world.apply(removal(&[A]));
    world.mesh.tick(world.now + GRACE - Duration::from_millis(1));
    assert!(!changed.has_changed().unwrap());
    assert!(world.mesh.still(target, Some(&identity)).is_some());
    world.mesh.tick(world.now + GRACE);
    assert!(changed.has_changed().unwrap());
    changed.mark_unchanged();
    assert!(world.mesh.still(target, Some(&identity)).is_none());
    world.mesh.tick(world.now + GRACE * 2);
    assert!(!changed.has_changed().unwrap());
}

#[test]
fn who_comes_back_within_the_grace_time_loses_nothing() {
    let mut world = World::new();
    world.pod(A, "10.0.0.1", &[]);
    world.apply(removal(&[A]));
    world.pod(A, "10.0.0.1", &[]);
    world.mesh.tick(world.now + GRACE);
    let identity = meshed("10.0.0.1:80").identity;
    assert!(world.mesh.still("10.0.0.1".parse().unwrap(), Some(&identity)).is_some());
}

#[test]
fn another_identity_at_the_address_ends_what_was_meant_for_the_first() {
    let mut world = World::new();
    world.pod(A, "10.0.0.1", &[]);
    let mut other = workload(A, "10.0.0.1", "node-b", &[]);
    other.service_account = "other".to_owned();
    world.apply(update(&[of_workload(other, "2")]));
    world.mesh.tick(world.now + GRACE);
    let target = "10.0.0.1".parse().unwrap();
    assert!(world.mesh.still(target, Some(&meshed("10.0.0.1:80").identity)).is_none());
    assert!(world.mesh.still(target, None).is_some());
}

#[test]
fn other_endpoints_of_a_service_are_those_that_were_not_tried() {
    let mut world = World::new();
    let web = service("shop/web.shop.svc", &["10.96.0.1"], &[(80, 8080), (443, 8443)]);
    world.apply(update(&[of_service(web, "1")]));
    for (uid, address) in
        [(A, "10.0.0.1"), (B, "10.0.0.2"), (C, "10.0.0.3"), ("c//Pod/shop/plain", "10.0.0.4")]
    {
        world.pod(uid, address, &["shop/web.shop.svc"]);
    }
    let dialled = "10.96.0.1:80".parse().unwrap();
    let failed = [meshed("10.0.0.2:8080")];
    let mut firsts = std::collections::BTreeSet::new();
    for _ in 0..8 {
        let others: Vec<_> =
            world.mesh.others(dialled, &failed).into_iter().map(|(_, one)| one.target).collect();
        let mut sorted = others.clone();
        sorted.sort();
        assert_eq!(sorted, ["10.0.0.1:8080".parse().unwrap(), "10.0.0.3:8080".parse().unwrap()]);
        firsts.insert(others[0]);
    }
    // Not all go to the same one.
    assert_eq!(firsts.len(), 2);
    assert_eq!(world.mesh.host("10.96.0.1".parse().unwrap()).as_deref(), Some("web.shop.svc"));
    assert!(world.mesh.others("10.96.0.1:81".parse().unwrap(), &[]).is_empty());
    world.apply(removal(&["shop/web.shop.svc"]));
    assert!(world.mesh.others(dialled, &[]).is_empty() && world.mesh.host(dialled.ip()).is_none());
}

#[test]
fn no_entry_takes_a_pods_address() {
    const ENTRY: &str = "c/networking.istio.io/WorkloadEntry/evil/web";
    const INLINE: &str = "c/networking.istio.io/ServiceEntry/evil/web/10.0.0.1";
    for first in [A, ENTRY, INLINE] {
        let mut world = World::new();
        for uid in [first, A, ENTRY, INLINE] {
            world.pod(uid, "10.0.0.1", &[]);
        }
        assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(A), "{first} came first");
        world.apply(removal(&[A]));
        assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(ENTRY), "{first} came first");
        world.apply(removal(&[ENTRY]));
        assert_eq!(world.name("10.0.0.1:80").as_deref(), Some(INLINE), "{first} came first");
        world.apply(removal(&[INLINE]));
        assert_eq!(world.name("10.0.0.1:80"), None);
        assert!(world.mesh.read().outdone.is_empty() && world.mesh.read().by_uid.is_empty());
    }
}
