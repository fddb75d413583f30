//! Against a real server, over TLS on loopback.

mod refusals;
mod server;

use std::net::SocketAddr;
use std::time::SystemTime;

use tokio::task::JoinHandle;
use tonic::Status;

use self::server::{Asked, Server};
use super::*;
use crate::identity::testing::{Authority, Files};
use crate::identity::{Certificates, WorkloadCertificate};

/// A wait that is only reached when something is broken.
const SOON: Duration = Duration::from_secs(30);
const NODE: &str = "spiffe://cluster.local/mesh.dev/node/node-a";

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

/// An agent's identities, an authority, and the wire between them.
struct World {
    server: Server,
    address: SocketAddr,
    serving: JoinHandle<()>,
    files: Files,
    access: Arc<Access>,
    store: Arc<Store>,
    wanted: watch::Sender<Wanted>,
    report: watch::Receiver<Arc<Report>>,
    task: JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.serving.abort();
        self.task.abort();
    }
}

impl World {
    async fn new(wanted: &[&str]) -> Self {
        Self::with(wanted, |_| {}).await
    }

    async fn with(wanted: &[&str], rules: impl FnOnce(&mut server::Rules)) -> Self {
        let server = Server::new(Authority::new("root"));
        rules(&mut server.rules());
        let (address, serving) = server.listen("127.0.0.1:0".parse().unwrap()).await;
        let files = Files::new(&server.rules().authority.pem(), " join\n\n");
        let store = Arc::new(Store::default());
        let access = files.access(address, &store);
        let (publish, listen) = watch::channel(set(wanted));
        let (tell, report) = watch::channel(Arc::default());
        let task = tokio::spawn(run(Arc::clone(&access), "node-a".into(), Arc::clone(&store), listen, tell));
        Self { server, address, serving, files, access, store, wanted: publish, report, task }
    }

    fn want(&self, wanted: &[&str]) {
        self.wanted.send_replace(set(wanted));
    }

    fn current(&self, account: &str) -> Option<Arc<WorkloadCertificate>> {
        self.store.current(&id(account))
    }

    /// Waits until that is so, as the report or the store tells it.
    async fn until(&mut self, what: &str, so: impl Fn(&Self, &Report) -> bool) {
        let waiting = async {
            loop {
                let report = Arc::clone(&self.report.borrow_and_update());
                if so(self, &report) {
                    return;
                }
                // The report does not change when a certificate expires.
                let changed = tokio::time::timeout(Duration::from_millis(50), self.report.changed()).await;
                assert!(!matches!(changed, Ok(Err(_))), "the task ended");
            }
        };
        let waited = tokio::time::timeout(SOON, waiting).await;
        assert!(waited.is_ok(), "not {what}: {:#?}", self.report.borrow());
    }

    async fn issued(&mut self, account: &str) -> Arc<WorkloadCertificate> {
        self.until(account, |world, _| world.current(account).is_some()).await;
        self.current(account).unwrap()
    }

    /// Another one than that.
    async fn renewed(&mut self, account: &str, old: &WorkloadCertificate) -> Arc<WorkloadCertificate> {
        let other = |new: Arc<WorkloadCertificate>| leaf_of(&new) != leaf_of(old);
        self.until("renewed", |world, _| world.current(account).is_some_and(other)).await;
        self.current(account).unwrap()
    }

    fn asked(&self) -> Vec<Asked> {
        self.server.rules().asked.clone()
    }

    fn asked_for(&self, account: &str) -> usize {
        let uri = id(account).to_string();
        self.asked().iter().filter(|asked| asked.identity.as_ref() == Some(&uri)).count()
    }

    fn refuse(&self, identity: &str, status: Status) {
        self.server.rules().refuse.insert(identity.to_owned(), status);
    }

    async fn leave(&mut self) {
        self.serving.abort();
        drop((&mut self.serving).await);
    }

    async fn come_back(&mut self) {
        self.serving = self.server.listen(self.address).await.1;
    }
}

fn set(accounts: &[&str]) -> Wanted {
    Arc::new(accounts.iter().map(|account| id(account)).collect())
}

fn leaf_of(certificate: &WorkloadCertificate) -> &[u8] {
    certificate.certified.cert[0].as_ref()
}

fn error_of<'a>(report: &'a Report, account: &str) -> &'a str {
    report.error(&id(account)).unwrap_or_default()
}

fn outcome(report: &Report, name: &str) -> u64 {
    report.fetches.get(name).copied().unwrap_or_default()
}

#[tokio::test]
async fn certificates_are_fetched_when_workloads_are_announced() {
    let mut world = World::new(&["web"]).await;
    let web = world.issued("web").await;
    assert!(world.current("db").is_none());
    world.want(&["db", "web"]);
    let db = world.issued("db").await;
    assert_ne!(web.serial, db.serial);
    assert!(Arc::ptr_eq(&web.roots, &db.roots) && web.not_after > SystemTime::now());
    assert_eq!(world.asked_for("web"), 1, "it was there already");
    let token = || Some("Bearer join".to_owned());
    let asked = world.asked();
    assert_eq!(
        asked[0],
        Asked { identity: None, token: token(), by_certificate: false },
        "the node's own first"
    );
    // This is an istiod: who it says this node is, is no node of ours, and the token goes on serving.
    assert!(asked.iter().all(|asked| asked.token == token() && !asked.by_certificate), "{asked:?}");
    assert!(world.store.node(SystemTime::now()).is_none());
    let states: Vec<_> =
        world.report.borrow().certificates.iter().map(|c| c.state(SystemTime::now())).collect();
    assert_eq!(states, ["ready"; 3]);
}

#[tokio::test]
async fn the_nodes_own_certificate_takes_the_place_of_the_token() {
    let mut world = World::with(&[], |rules| rules.caller = NODE.to_owned()).await;
    world.until("known as a node", |world, _| world.store.node(SystemTime::now()).is_some()).await;
    world.files.remove_token();
    world.want(&["web"]);
    world.issued("web").await;
    let last = world.asked().pop().unwrap();
    assert_eq!((last.token, last.by_certificate), (None, true));
    let node = world.report.borrow().certificates[0].clone();
    assert_eq!((&*node.identity, node.state(SystemTime::now())), (NODE, "ready"));
}

#[tokio::test]
async fn the_name_of_another_node_is_not_ours() {
    let other = "spiffe://cluster.local/mesh.dev/node/node-b".to_owned();
    let mut world = World::with(&["web"], |rules| rules.caller = other).await;
    world.issued("web").await;
    assert!(world.store.node(SystemTime::now()).is_none());
}

#[tokio::test]
async fn a_certificate_that_is_refused_gives_way_to_the_token() {
    let rules =
        |rules: &mut server::Rules| (rules.caller, rules.refuse_certificates) = (NODE.to_owned(), true);
    let mut world = World::with(&["web"], rules).await;
    world.issued("web").await;
    world.until("counted", |world, _| world.access.refusals() == 1).await;
    let by_certificate = |world: &World| world.asked().iter().filter(|asked| asked.token.is_none()).count();
    assert_eq!(by_certificate(&world), 1);
    // It is not tried again for every workload.
    world.want(&["web", "db"]);
    world.issued("db").await;
    assert_eq!(by_certificate(&world), 1);
}

#[tokio::test]
async fn an_expired_certificate_of_the_node_gives_way_to_the_token() {
    let rules = |rules: &mut server::Rules| {
        rules.caller = NODE.to_owned();
        rules.lifetimes.insert(NODE.to_owned(), Duration::from_secs(3));
    };
    let mut world = World::with(&[], rules).await;
    world.until("known as a node", |world, _| world.store.node(SystemTime::now()).is_some()).await;
    world.leave().await;
    world.until("expired", |world, _| world.store.node(SystemTime::now()).is_none()).await;
    world.come_back().await;
    world.want(&["web"]);
    world.issued("web").await;
    world.until("known again", |world, _| world.store.node(SystemTime::now()).is_some()).await;
    assert!(world.asked().iter().filter(|asked| asked.token.is_some()).count() >= 2);
}

#[tokio::test]
async fn a_certificate_is_renewed_at_half_of_its_life() {
    let lifetime = Duration::from_secs(6);
    let mut world = World::with(&["web"], |rules| rules.lifetime = lifetime).await;
    let first = world.issued("web").await;
    let second = world.renewed("web", &first).await;
    // The first still had a good part of its life.
    assert!(first.not_after > SystemTime::now());
    assert!(second.not_after > first.not_after && second.serial > first.serial);
    let keys = [&first, &second].map(|c| c.certified.key.public_key().unwrap().as_ref().to_vec());
    assert_ne!(keys[0], keys[1], "with a key of its own");
    world.until("counted", |_, report| outcome(report, "issued") >= 4).await;
}

#[tokio::test]
async fn while_the_authority_is_away_the_old_one_serves_until_it_expires() {
    let mut world = World::with(&["web", "old"], |rules| {
        rules.lifetimes.insert(id("old").to_string(), Duration::from_secs(4));
    })
    .await;
    let (old, web) = (world.issued("old").await, world.issued("web").await);
    world.leave().await;
    world.until("told", |_, report| error_of(report, "old").contains("refused")).await;
    let serving = world.current("old").map(|certificate| certificate.serial);
    if SystemTime::now() < old.not_after {
        assert_eq!(serving, Some(old.serial), "the same serves");
    }
    world.until("gone", |world, _| world.current("old").is_none()).await;
    assert!(SystemTime::now() >= old.not_after);
    let report = Arc::clone(&world.report.borrow());
    let state = |c: &&Certificate| c.identity == id("old").as_str();
    assert_eq!(report.certificates.iter().find(state).unwrap().state(SystemTime::now()), "expired");
    assert!(outcome(&report, "unreachable") > 1);
    assert_eq!(world.current("web").unwrap().serial, web.serial, "untouched");
    world.come_back().await;
    world.issued("old").await;
}

#[tokio::test]
async fn an_identity_is_forgotten_with_its_last_workload() {
    // One that would still serve, and one that would be renewed before the one that stays.
    let rules = |rules: &mut server::Rules| {
        rules.lifetimes.insert(id("short").to_string(), Duration::from_secs(5));
        rules.lifetimes.insert(id("stays").to_string(), Duration::from_secs(9));
    };
    let mut world = World::with(&["long", "short", "stays"], rules).await;
    world.issued("long").await;
    world.issued("short").await;
    let stays = world.issued("stays").await;
    world.want(&["stays"]);
    let forgotten = |world: &World, name| world.current(name).is_none();
    world.until("forgotten", |world, _| forgotten(world, "long") && forgotten(world, "short")).await;
    let asked = world.asked_for("short");
    world.renewed("stays", &stays).await;
    assert_eq!(world.asked_for("short"), asked, "it is not renewed");
    let known =
        |account| world.report.borrow().certificates.iter().any(|c| c.identity == id(account).as_str());
    assert_eq!(["long", "short", "stays"].map(known), [false, false, true]);
    // It comes back as a new one.
    world.want(&["long", "stays"]);
    world.issued("long").await;
}

#[tokio::test]
async fn what_is_forgotten_while_it_is_fetched_does_not_appear() {
    let mut world = World::new(&[]).await;
    world.until("started", |world, _| world.asked().len() == 1).await;
    world.server.rules().delay = Duration::from_millis(300);
    world.want(&["web"]);
    world.until("under way", |world, _| world.server.rules().at_once == 1).await;
    world.want(&["db"]);
    world.issued("db").await;
    assert_eq!(world.asked_for("web"), 1);
    assert!(world.current("web").is_none());
}

#[tokio::test]
async fn no_more_than_eight_are_fetched_at_once_on_one_connection() {
    let names: Vec<String> = (0..40).map(|i| format!("w{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = World::with(&names, |rules| rules.delay = Duration::from_millis(30)).await;
    for name in &names {
        world.issued(name).await;
    }
    assert_eq!(world.server.rules().most_at_once, 8);
    assert_eq!(world.asked().len(), 41);
}

#[tokio::test]
async fn new_roots_reach_every_certificate() {
    let mut world = World::new(&["a", "b"]).await;
    let (a, b) = (world.issued("a").await, world.issued("b").await);
    let next = Authority::new("next");
    let both = {
        let mut rules = world.server.rules();
        let both = format!("{}{}", rules.authority.pem(), next.pem());
        rules.bundle = Some(both.clone());
        both
    };
    world.want(&["a", "b", "c"]);
    let c = world.issued("c").await;
    for old in [(&a, "a"), (&b, "b")] {
        let now = world.current(old.1).unwrap();
        assert_eq!((leaf_of(&now), now.roots.len()), (leaf_of(old.0), 2));
        assert!(now.serial > old.0.serial, "readers have to notice");
        assert!(Arc::ptr_eq(&now.roots, &c.roots));
    }
    // The next root signs, while the bundle holds both; and then it is alone.
    world.files.write_root(&both);
    world.server.rules().authority = Arc::new(next);
    world.leave().await;
    world.come_back().await;
    world.want(&["a", "b", "c", "d"]);
    world.issued("d").await;
    assert_eq!(leaf_of(&world.current("a").unwrap()), leaf_of(&a), "what both vouch for stays");
    world.server.rules().bundle = None;
    world.want(&["a", "b", "c", "d", "e"]);
    let e = world.issued("e").await;
    // What the old root had signed is of no use any more.
    for (name, old) in [("a", &a), ("b", &b), ("c", &c)] {
        let new = world.renewed(name, old).await;
        assert!(Arc::ptr_eq(&new.roots, &e.roots));
        assert_eq!(new.roots.len(), 1);
    }
}

#[tokio::test]
async fn it_ends_when_nobody_wants_anything() {
    let mut world = World::new(&["web"]).await;
    world.issued("web").await;
    let (publish, _) = watch::channel(set(&[]));
    drop(std::mem::replace(&mut world.wanted, publish));
    let ended = tokio::time::timeout(SOON, &mut world.task).await;
    ended.expect("it goes on").unwrap();
}
