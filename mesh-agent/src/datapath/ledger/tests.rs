//! The plans are run against a kernel that is a few hash maps, and read back with the functions that the real programs use.

use std::collections::BTreeMap;

use mesh_common::abi::{Address, Protocol, descend};

use mesh_common::abi::{Page, Pointer};

use super::*;
use crate::datapath::adopt::{Contents, adopt};
use crate::datapath::desired::Candidate;
use crate::datapath::show::show_endpoint;
use crate::snapshot::fixtures::{parsed_workload, workload};

const SIZES: MapSizes = MapSizes {
    services: 64,
    backends: 8_192,
    pages: 1_024,
    workloads: 8,
    affinity: 8,
    udp_flows: 8,
    counters: 8,
    peers: 8,
    passages: 8,
    verdicts: 8,
};

/// The maps, and the rule that what is published is never written.
#[derive(Default, Clone)]
struct Kernel {
    services: BTreeMap<ServiceKey, Pointer>,
    pages: HashMap<u32, Page>,
    backends: HashMap<u32, Backend>,
}

impl Kernel {
    fn write(&mut self, write: &Write) {
        match write {
            Write::Backend(number, slot) => {
                let used = self.backends.get(number).is_some_and(|old| old.service != 0);
                assert!(!used, "backend {number} is written while it is in use");
                self.backends.insert(*number, *slot);
            }
            Write::NoLoad(_) => {}
            Write::Page(number, page) => {
                assert!(!self.reachable().contains(number), "page {number} is written while it is published");
                self.pages.insert(*number, **page);
            }
            Write::Publish(key, pointer) => {
                self.services.insert(*key, *pointer);
            }
            Write::Remove(key) => {
                self.services.remove(key);
            }
        }
    }

    fn reachable(&self) -> HashSet<u32> {
        let mut found = HashSet::new();
        let mut next: Vec<u32> = self.services.values().map(|pointer| pointer.page()).collect();
        while let Some(number) = next.pop() {
            let page = &self.pages[&number];
            found.insert(number);
            if page.header.depth > 1 {
                next.extend(page.entries[..page.header.used as usize].iter().map(|entry| entry.child));
            }
        }
        found
    }

    /// Share of the positions that each endpoint has, as the kernel programs would find it.
    fn shares(&self, key: &ServiceKey) -> BTreeMap<String, u32> {
        let root = &self.pages[&self.services[key].page()];
        assert_eq!(root.header.generation, self.services[key].generation());
        let mut shares = BTreeMap::new();
        for position in 0..root.header.total {
            let number = descend(root, position, |number| self.pages.get(&number)).expect("a whole tree");
            let slot = &self.backends[&number];
            assert_eq!(slot.service, root.header.service, "a backend of another service");
            *shares.entry(show_endpoint(&slot.endpoint)).or_default() += 1;
        }
        shares
    }

    fn slots(&self) -> Vec<Backend> {
        let last = self.backends.keys().max().map_or(0, |last| last + 1);
        (0..last).map(|n| self.backends.get(&n).copied().unwrap_or_default()).collect()
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            services: self.services.iter().map(|(key, pointer)| (*key, *pointer)).collect(),
            page: Box::new(|number| self.pages.get(&number).copied()),
            backend: Box::new(|number| self.backends.get(&number).copied()),
        }
    }

    fn adopted(&self) -> Ledger {
        let contents = self.contents();
        let (ports, broken) = adopt(&contents);
        Ledger::new(SIZES, ports, broken, &self.slots(), 1)
    }
}

struct World {
    kernel: Kernel,
    ledger: Ledger,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let kernel = Kernel::default();
        Self { ledger: kernel.adopted(), kernel, now: Instant::now() }
    }

    /// Puts a frontend in force; how many writes that took.
    fn put(&mut self, owner: &str, frontend: &Frontend) -> Result<usize, Refusal> {
        let change = self.ledger.plan_put(&owner.into(), frontend)?;
        Ok(change.map_or(0, |change| self.execute(change)))
    }

    fn execute(&mut self, change: Change) -> usize {
        change.writes.iter().for_each(|write| self.kernel.write(write));
        let count = change.writes.len();
        self.ledger.commit(change, self.now);
        self.settle();
        count
    }

    /// Frees what is to be freed and lets everything rest.
    fn settle(&mut self) {
        while let Some((number, slot)) = self.ledger.leaving() {
            self.kernel.backends.insert(number, slot);
            self.ledger.left(self.now);
        }
        self.now += std::time::Duration::from_secs(2);
        self.ledger.wake(self.now);
    }
}

fn vip(last: u8) -> ServiceKey {
    ServiceKey::new(Address::from_v4([10, 96, 0, last]), 80, Protocol::Tcp)
}

fn endpoint(n: u16) -> Endpoint {
    let [high, low] = n.to_be_bytes();
    Endpoint::new(Address::from_v4([10, 1, high, low]), 8080)
}

fn frontend(key: ServiceKey, algorithm: Algorithm, weights: &[(u16, u32)]) -> Frontend {
    let backends = weights
        .iter()
        .map(|(n, weight)| Candidate {
            endpoint: endpoint(*n),
            weight: *weight,
            workload: parsed_workload(workload(&format!("w{n}"), "10.1.0.1", "", &[])),
        })
        .collect();
    Frontend { key, algorithm, affinity_seconds: 0, backends }
}

fn random(key: ServiceKey, backends: std::ops::Range<u16>) -> Frontend {
    frontend(key, Algorithm::WeightedRandom, &backends.map(|n| (n, 1)).collect::<Vec<_>>())
}

fn expected(frontend: &Frontend) -> BTreeMap<String, u32> {
    frontend.backends.iter().map(|b| (show_endpoint(&b.endpoint), b.weight)).collect()
}

#[test]
fn weights_arrive_as_shares_of_the_positions() {
    let mut world = World::new();
    let wanted = frontend(vip(1), Algorithm::WeightedRandom, &[(1, 1), (2, 5), (3, 2)]);
    world.put("shop/cart", &wanted).unwrap();
    assert_eq!(world.kernel.shares(&vip(1)), expected(&wanted));
}

#[test]
fn what_is_in_force_takes_no_write() {
    let mut world = World::new();
    assert!(world.put("shop/cart", &random(vip(1), 0..10)).unwrap() > 0);
    assert_eq!(world.put("shop/cart", &random(vip(1), 0..10)).unwrap(), 0);
}

#[test]
fn one_endpoint_of_thousands_costs_as_many_writes_as_the_tree_is_deep() {
    let mut world = World::new();
    world.put("shop/big", &random(vip(1), 0..5_000)).unwrap();
    let wanted = random(vip(1), 0..5_001);
    let writes = world.put("shop/big", &wanted).unwrap();
    assert!(writes <= 5, "a backend, three pages and the pointer, not {writes}");
    assert_eq!(world.kernel.shares(&vip(1)), expected(&wanted));
    let mut fewer = random(vip(1), 0..5_001);
    fewer.backends.remove(2_500);
    assert!(world.put("shop/big", &fewer).unwrap() <= 4);
    assert_eq!(world.kernel.shares(&vip(1)), expected(&fewer));
}

#[test]
fn any_sequence_of_changes_leaves_what_was_asked_for() {
    let mut world = World::new();
    let mut seed = 7u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for _ in 0..400 {
        let key = vip(next(3) as u8);
        let algorithm = match next(3) {
            0 => Algorithm::RoundRobin,
            1 => Algorithm::LeastConnections,
            _ => Algorithm::WeightedRandom,
        };
        let size = [0, 1, 3, 63, 64, 65, 130, 300][next(8) as usize];
        let mut weights = BTreeMap::new();
        for _ in 0..size {
            weights.insert(next(400) as u16, next(4) as u32 + 1);
        }
        let wanted = frontend(key, algorithm, &weights.into_iter().collect::<Vec<_>>());
        world.put(&format!("ns/{}", key.endpoint().address().bytes()[15]), &wanted).unwrap();
        assert_eq!(world.kernel.shares(&key), expected(&wanted));
    }
    let (pages, backends) = world.ledger.in_use();
    assert_eq!(pages, world.kernel.reachable().len(), "no page is lost");
    let used = world.kernel.backends.values().filter(|slot| slot.service != 0).count();
    assert_eq!(backends, used, "no backend slot is lost");
}

#[test]
fn an_agent_may_die_after_any_write() {
    let mut world = World::new();
    let (before, after) = (random(vip(1), 0..100), random(vip(1), 50..170));
    world.put("shop/cart", &before).unwrap();
    let change = world.ledger.plan_put(&"shop/cart".into(), &after).unwrap().unwrap();
    for done in 0..=change.writes.len() {
        let mut kernel = world.kernel.clone();
        change.writes[..done].iter().for_each(|write| kernel.write(write));
        let published = done == change.writes.len();
        let in_force = if published { &after } else { &before };
        assert_eq!(kernel.shares(&vip(1)), expected(in_force), "after {done} writes");
        let mut successor = World { ledger: kernel.adopted(), kernel, now: Instant::now() };
        successor.settle();
        successor.put("shop/cart", &after).unwrap();
        assert_eq!(
            successor.kernel.shares(&vip(1)),
            expected(&after),
            "by the successor after {done} writes"
        );
        let used = successor.kernel.backends.values().filter(|slot| slot.service != 0).count();
        assert_eq!(used, 120, "what the dead agent wrote in vain is freed");
    }
}

#[test]
fn adopting_gives_the_ledger_back() {
    let mut world = World::new();
    for (n, size) in [(1, 3), (2, 200), (3, 4_500)] {
        world.put(&format!("ns/{n}"), &random(vip(n), 0..size)).unwrap();
    }
    let mut adopted = World { ledger: world.kernel.adopted(), kernel: world.kernel, now: world.now };
    for (n, size) in [(1, 3), (2, 200), (3, 4_500)] {
        assert!(!adopted.ledger.found_different(&random(vip(n), 0..size)));
        assert_eq!(adopted.put(&format!("ns/{n}"), &random(vip(n), 0..size)).unwrap(), 0, "names only");
        assert_eq!(adopted.ledger.owned(&format!("ns/{n}").into()), [vip(n)]);
    }
    assert!(adopted.ledger.unowned().is_empty());
}

#[test]
fn a_damaged_tree_is_not_adopted_and_is_replaced() {
    let mut world = World::new();
    world.put("shop/cart", &random(vip(1), 0..3)).unwrap();
    let root = world.kernel.services[&vip(1)].page();
    world.kernel.pages.get_mut(&root).unwrap().header.generation += 1;
    let mut adopted = World { ledger: world.kernel.adopted(), kernel: world.kernel, now: world.now };
    assert_eq!(adopted.ledger.unowned(), [vip(1)]);
    adopted.settle();
    adopted.kernel.services.clear();
    adopted.put("shop/cart", &random(vip(1), 0..3)).unwrap();
    assert_eq!(adopted.kernel.shares(&vip(1)), expected(&random(vip(1), 0..3)));
    assert!(adopted.ledger.unowned().is_empty());
}

#[test]
fn full_maps_refuse_and_leave_what_is_there() {
    let small = MapSizes { services: 2, backends: 10, pages: 3, ..SIZES };
    let kernel = Kernel::default();
    let mut world = World {
        ledger: Ledger::new(small, HashMap::new(), HashSet::new(), &[], 1),
        kernel,
        now: Instant::now(),
    };
    world.put("a/a", &random(vip(1), 0..6)).unwrap();
    let refusal = world.put("b/b", &random(vip(2), 0..6)).unwrap_err();
    assert_eq!(refusal.to_string(), "map BACKENDS is full (10 entries); raise --max-backends");
    assert_eq!(world.kernel.shares(&vip(1)), expected(&random(vip(1), 0..6)));
    world.put("b/b", &random(vip(2), 0..4)).unwrap();
    let refusal = world.put("c/c", &random(vip(3), 0..0)).unwrap_err();
    assert_eq!(refusal.to_string(), "map SERVICES is full (2 entries); raise --max-services");
    let change = world.ledger.plan_remove(&vip(1)).unwrap();
    world.execute(change);
    world.put("c/c", &random(vip(3), 0..6)).unwrap();
    assert_eq!(world.kernel.shares(&vip(3)), expected(&random(vip(3), 0..6)), "room that was freed is used");
}

#[test]
fn an_address_belongs_to_one_service() {
    let mut world = World::new();
    world.put("a/a", &random(vip(1), 0..2)).unwrap();
    let refusal = world.put("b/b", &random(vip(1), 5..6)).unwrap_err();
    assert_eq!(refusal.to_string(), "10.96.0.1:80/TCP already belongs to a/a");
    assert_eq!(world.kernel.shares(&vip(1)), expected(&random(vip(1), 0..2)));
}

#[test]
fn no_backends_is_a_service_that_refuses() {
    let mut world = World::new();
    world.put("a/a", &random(vip(1), 0..0)).unwrap();
    let root = world.kernel.pages[&world.kernel.services[&vip(1)].page()];
    assert_eq!((root.header.total, root.header.depth), (0, 1));
}

#[test]
fn a_reused_slot_has_another_incarnation_and_its_counters_are_named() {
    let small = MapSizes { backends: 1, ..SIZES };
    let kernel = Kernel::default();
    let mut world = World {
        ledger: Ledger::new(small, HashMap::new(), HashSet::new(), &[], 1),
        kernel,
        now: Instant::now(),
    };
    world.put("a/a", &random(vip(1), 0..1)).unwrap();
    let first = world.kernel.backends[&1].incarnation;
    world.put("a/a", &random(vip(1), 0..0)).unwrap();
    let change = world.ledger.plan_put(&"a/a".into(), &random(vip(1), 7..8)).unwrap().unwrap();
    assert_eq!(change.reused.backends, [1]);
    world.execute(change);
    assert_eq!(world.kernel.backends[&1].incarnation, first + 1);
}

#[test]
fn maglev_moves_few_slots_and_changes_few_pages() {
    let mut world = World::new();
    let all: Vec<(u16, u32)> = (0..10).map(|n| (n, 1)).collect();
    world.put("a/a", &frontend(vip(1), Algorithm::Maglev, &all)).unwrap();
    let before = world.kernel.shares(&vip(1));
    assert!(before.values().all(|share| share.abs_diff(409) <= 2), "{before:?}");
    world.put("a/a", &frontend(vip(1), Algorithm::Maglev, &all[1..])).unwrap();
    let after = world.kernel.shares(&vip(1));
    assert_eq!((after.len(), after.values().sum::<u32>()), (9, 4_093));
    let adopted = world.kernel.adopted();
    assert_eq!(adopted.ports()[&vip(1)].backends.len(), 9);
}

#[test]
fn round_robin_interleaves_heavy_backends() {
    let mut world = World::new();
    world.put("a/a", &frontend(vip(1), Algorithm::RoundRobin, &[(1, 5), (2, 5)])).unwrap();
    let root = &world.kernel.pages[&world.kernel.services[&vip(1)].page()];
    let (stride, total) = (root.header.stride, root.header.total);
    let sequence: Vec<u32> = (0..10)
        .map(|turn| {
            let position = mesh_common::abi::round_robin_position(turn, stride, total);
            descend(root, position, |_| None).unwrap()
        })
        .collect();
    let longest = sequence.chunk_by(|a, b| a == b).map(<[u32]>::len).max().unwrap();
    assert!(longest <= 3, "{sequence:?}");
}
