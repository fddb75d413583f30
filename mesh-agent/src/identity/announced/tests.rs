use super::*;
use crate::identity::report::Report;
use crate::snapshot::fixtures::{parsed_workload, workload as pod};

const SECOND: Duration = Duration::from_secs(1);

struct World {
    announced: Announced,
    wanted: watch::Receiver<Wanted>,
    report: watch::Sender<Arc<Report>>,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let (publish, wanted) = watch::channel(Wanted::default());
        let report = watch::Sender::default();
        let announced = Announced::new("node-a", publish, report.subscribe());
        Self { announced, wanted, report, now: Instant::now() }
    }

    fn put(&mut self, name: &str, account: &str, node: &str) {
        let uid = format!("c//Pod/shop/{name}");
        let mut message = pod(&uid, "10.0.0.1", node, &[]);
        message.service_account = account.to_owned();
        let workload = parsed_workload(message);
        self.announced.workload(&uid, Some(&workload), self.now);
    }

    fn remove(&mut self, name: &str) {
        self.announced.workload(&format!("c//Pod/shop/{name}"), None, self.now);
    }

    /// Service accounts, if they have been published anew.
    fn published(&mut self) -> Option<Vec<String>> {
        self.announced.publish();
        let changed = self.wanted.has_changed().unwrap();
        let accounts = |wanted: &Wanted| wanted.iter().map(|id| id.service_account().to_owned()).collect();
        changed.then(|| accounts(&self.wanted.borrow_and_update()))
    }

    fn issued(&self, account: &str) {
        self.report.send_modify(|report| {
            Arc::make_mut(report).note(SpiffeId::new("cluster.local", "shop", account).unwrap());
        });
    }
}

#[test]
fn an_identity_goes_with_its_last_workload() {
    let mut world = World::new();
    world.put("web-1", "web", "node-a");
    world.put("web-2", "web", "node-a");
    world.put("db-1", "db", "node-a");
    assert_eq!(world.published().unwrap(), ["db", "web"]);
    world.remove("web-1");
    world.remove("unknown");
    assert_eq!(world.published().unwrap(), ["db", "web"]);
    world.remove("web-2");
    assert_eq!(world.published().unwrap(), ["db"]);
    assert_eq!(world.published(), None, "nothing has changed");
}

#[test]
fn a_workload_that_changes_its_account_changes_what_is_wanted() {
    let mut world = World::new();
    world.put("web-1", "web", "node-a");
    world.published();
    world.put("web-1", "other", "node-a");
    assert_eq!(world.published().unwrap(), ["other"]);
    // It is the same workload on another node.
    world.put("web-1", "other", "node-b");
    assert_eq!(world.published().unwrap(), [""; 0]);
}

#[test]
fn only_workloads_of_this_node_count_and_only_names_that_can_be_certified() {
    let mut world = World::new();
    world.put("far", "far", "node-b");
    world.put("nowhere", "nowhere", "");
    world.put("odd", "a/b", "node-a");
    assert_eq!(world.published(), None);
    assert_eq!(world.announced.ready(world.now), Ok(()));
}

#[test]
fn the_hosts_own_network_makes_no_difference() {
    let mut world = World::new();
    let mut host = pod("c//Pod/shop/host", "10.0.0.1", "node-a", &[]);
    (host.network_mode, host.service_account) = (1, "host".to_owned());
    world.announced.workload("c//Pod/shop/host", Some(&parsed_workload(host)), world.now);
    assert_eq!(world.published().unwrap(), ["host"]);
}

#[test]
fn what_the_api_leaves_empty_has_its_defaults() {
    let mut message = pod("c//Pod/shop/web", "10.0.0.1", "node-a", &[]);
    let uri = |message: &_| spiffe_of(&parsed_workload(Clone::clone(message))).unwrap().to_string();
    assert_eq!(uri(&message), "spiffe://cluster.local/ns/shop/sa/default");
    message.trust_domain = "mesh.example".to_owned();
    message.service_account = "web".to_owned();
    assert_eq!(uri(&message), "spiffe://mesh.example/ns/shop/sa/web");
}

#[test]
fn readiness_waits_for_every_identity_and_says_for_which() {
    let mut world = World::new();
    world.put("web", "web", "node-a");
    world.put("db", "db", "node-a");
    let reason = world.announced.ready(world.now).unwrap_err();
    assert!(reason.contains("/sa/db") && reason.contains("being fetched"), "{reason}");
    world.issued("db");
    assert!(world.announced.ready(world.now).unwrap_err().contains("/sa/web"));
    world.issued("web");
    assert_eq!(world.announced.ready(world.now), Ok(()));
    // Once ready, one more workload does not take the node out of service.
    world.put("new", "new", "node-a");
    assert_eq!(world.announced.ready(world.now), Ok(()));
}

#[test]
fn an_identity_that_is_refused_keeps_nobody_waiting_for_ever() {
    let mut world = World::new();
    world.put("web", "web", "node-a");
    assert!(world.announced.ready(world.now + PATIENCE - SECOND).is_err());
    // Another workload of the same identity does not begin anew.
    world.now += PATIENCE - SECOND;
    world.put("web-2", "web", "node-a");
    assert!(world.announced.ready(world.now).is_err());
    assert_eq!(world.announced.ready(world.now + SECOND), Ok(()));
}

#[test]
fn without_an_authority_nothing_waits() {
    let mut announced = Announced::without_authority("node-a");
    let workload = parsed_workload(pod("c//Pod/shop/web", "10.0.0.1", "node-a", &[]));
    announced.workload("c//Pod/shop/web", Some(&workload), Instant::now());
    announced.publish();
    assert_eq!(announced.ready(Instant::now()), Ok(()));
}
