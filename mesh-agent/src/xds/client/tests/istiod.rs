//! A server that speaks as istiod does, to an agent that enforces: what comes late, never, twice or not at all has a bound, a
//! verdict and a counter.

use mesh_common::api::envoy::service::discovery::v3::Resource;
use mesh_common::api::istio::security::{Action, Authorization, Clause, Match, Rule, Scope};
use mesh_common::api::istio::workload::Workload;

use super::*;
use crate::policy::testing::{self, HERE, no_identity, pod, policy, ports};
use crate::policy::{Counts, NOT_ARRIVED};
use crate::snapshot::fixtures::of_policy;

const CLIENT: &str = "demo/client-1";
const SERVER: &str = "demo/server-1";
const ALLOW: &str = "demo/allow-client";

/// An agent with its policies and a kernel, and the server that it listens to.
struct Mesh {
    world: World,
    agent: testing::World,
    nonce: u32,
}

/// What the agent did.
#[derive(Debug, PartialEq, Eq)]
enum Did {
    Connected,
    Disconnected(String),
    Addresses,
    Policies,
}

impl Mesh {
    async fn new() -> Self {
        Self { world: World::new().await, agent: testing::World::new(10_000), nonce: 0 }
    }

    /// Lets the agent do its next step.
    async fn step(&mut self) -> Did {
        loop {
            let event = tokio::time::timeout(SOON, self.world.events.recv()).await.expect("no event");
            match event.expect("the client ended") {
                XdsEvent::Versions { reply } => {
                    let (addresses, policies) =
                        (self.agent.snapshot.versions(), self.agent.policies.versions());
                    reply.send(Versions { addresses, policies }).unwrap();
                }
                XdsEvent::Connected => return Did::Connected,
                XdsEvent::Disconnected { reason } => return Did::Disconnected(reason),
                XdsEvent::Delta { delta, applied, .. } => {
                    let changed = self.agent.snapshot.apply(delta);
                    let plan = self.agent.policies.workloads(&changed, &self.agent.snapshot);
                    self.agent.enforce(&plan);
                    applied.send(Applied::default()).unwrap();
                    return Did::Addresses;
                }
                XdsEvent::Policies { update, synced, applied } => {
                    self.agent.apply(update, synced);
                    applied.send(Applied::default()).unwrap();
                    return Did::Policies;
                }
            }
        }
    }

    /// The stream that the agent opens next, with what it says to hold of policies and of addresses.
    async fn connect(&mut self) -> (Talk, HashMap<String, String>, HashMap<String, String>) {
        while self.step().await != Did::Connected {}
        let mut talk = self.world.talks.recv().await.unwrap();
        let (policies, addresses) = (talk.request().await, talk.request().await);
        assert_eq!([&*policies.type_url, &*addresses.type_url], [AUTHORIZATION_TYPE, ADDRESS_TYPE]);
        (talk, policies.initial_resource_versions, addresses.initial_resource_versions)
    }

    /// Sends a response, lets the agent take it, and returns its answer, which is to that response of that type.
    async fn push(
        &mut self,
        talk: &mut Talk,
        kind: &str,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> DeltaDiscoveryRequest {
        self.nonce += 1;
        let nonce = format!("2026-08-22T10:00:00Z/{}8c5f", self.nonce);
        talk.send(DeltaDiscoveryResponse {
            type_url: kind.to_owned(),
            system_version_info: format!("2026-08-22T10:00:00Z/{}", self.nonce),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..response(&nonce, resources)
        })
        .await;
        let wanted = if kind == ADDRESS_TYPE { Did::Addresses } else { Did::Policies };
        while self.step().await != wanted {}
        // The answer is sent when the change is in force, which the client learns while it waits for what comes next.
        let answer = talk.request().await;
        assert_eq!((&*answer.type_url, answer.response_nonce), (kind, nonce));
        DeltaDiscoveryRequest { response_nonce: String::new(), ..answer }
    }

    async fn addresses(&mut self, talk: &mut Talk, pods: &[Workload]) {
        let resources = pods.iter().map(|pod| of_workload(pod.clone(), "5ef4a1c2")).collect();
        assert_eq!(self.push(talk, ADDRESS_TYPE, resources, &[]).await.error_detail, None);
    }

    /// All policies, as at each push: without versions.
    async fn policies(&mut self, talk: &mut Talk, policies: &[Authorization]) {
        let resources = policies.iter().map(|one| of_policy(one.clone(), "")).collect();
        assert_eq!(self.push(talk, AUTHORIZATION_TYPE, resources, &[]).await.error_detail, None);
    }

    /// Until all policies have been named: nothing marks the last of them but silence.
    async fn until_complete(&mut self) {
        while !self.counts().complete {
            self.step().await;
        }
    }

    /// Whether the kernel lets a workload of this node in, and if not, by which policy.
    fn verdict(&self, from: &str, to: &str, port: u16) -> Result<(), String> {
        let verdict = self.agent.kernel.by_identity(from, to, port, 4);
        if self.agent.kernel.set(to) == 0 {
            return Ok(());
        }
        let verdict = verdict.ok_or("no verdict")?;
        if verdict.allows() {
            return Ok(());
        }
        Err(self.agent.policies.name(verdict.policy).map_or_else(String::new, |name| name.to_string()))
    }

    fn counts(&self) -> Counts {
        self.agent.policies.counts()
    }
}

fn client() -> Workload {
    pod(CLIENT, "10.244.2.9", HERE, &[])
}

fn server(policies: &[&str]) -> Workload {
    pod(SERVER, "10.244.2.10", HERE, policies)
}

fn allow(name: &str, port: u32) -> Authorization {
    policy(name, Scope::WorkloadSelector, Action::Allow, vec![ports(&[port])])
}

fn refused(by: &str) -> Result<(), String> {
    Err(by.to_owned())
}

#[tokio::test]
async fn an_address_may_come_before_the_policy_that_it_names() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.addresses(&mut talk, &[client(), server(&[ALLOW])]).await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused(NOT_ARRIVED));
    assert_eq!(mesh.counts().refusing_not_arrived, 2);
    mesh.policies(&mut talk, &[allow(ALLOW, 8080)]).await;
    mesh.until_complete().await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
    assert_eq!(mesh.verdict(CLIENT, SERVER, 9090), refused(""), "no ALLOW matches");
    // Later the same, one by one: for as long as the second push takes, and no longer.
    mesh.addresses(&mut talk, &[server(&[ALLOW, "demo/second"])]).await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused("demo/second"));
    assert_eq!((mesh.counts().awaited, mesh.counts().refusing), (1, 1));
    assert_eq!(mesh.verdict(SERVER, CLIENT, 8080), Ok(()), "whoever does not name it is not concerned");
    mesh.policies(&mut talk, &[allow(ALLOW, 8080), allow("demo/second", 9090)]).await;
    assert_eq!([8080, 9090].map(|port| mesh.verdict(CLIENT, SERVER, port)), [Ok(()), Ok(())]);
    assert_eq!((mesh.counts().awaited, mesh.counts().refusing), (0, 0));
}

#[tokio::test]
async fn a_name_that_never_comes_refuses_its_workload_alone_and_is_counted() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.policies(&mut talk, &[]).await;
    let dangling = "demo/converted_peer_authentication_raw-port-open";
    mesh.addresses(&mut talk, &[client(), server(&[dangling])]).await;
    for _ in 0..3 {
        mesh.policies(&mut talk, &[allow(ALLOW, 8080)]).await;
        assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused(dangling));
        assert_eq!(mesh.verdict(SERVER, CLIENT, 8080), Ok(()));
        assert_eq!((mesh.counts().awaited, mesh.counts().refusing), (1, 1));
    }
    assert_eq!(mesh.agent.policies.awaited(), [Arc::from(dangling)]);
    // It is named no more.
    mesh.addresses(&mut talk, &[server(&[])]).await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
    mesh.policies(&mut talk, &[]).await;
    assert_eq!(mesh.counts().refusing, 0);
}

#[tokio::test]
async fn everything_is_resent_at_each_push_and_changes_nothing() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.addresses(&mut talk, &[client(), server(&[ALLOW])]).await;
    mesh.policies(&mut talk, &[allow(ALLOW, 8080)]).await;
    mesh.until_complete().await;
    let changed = mesh.agent.policies.shared().changed();
    let (before, set) = (*changed.borrow(), mesh.agent.kernel.set(SERVER));
    let verdicts = mesh.agent.kernel.verdicts.clone();
    for _ in 0..3 {
        mesh.policies(&mut talk, &[allow(ALLOW, 8080)]).await;
        mesh.addresses(&mut talk, &[client(), server(&[ALLOW])]).await;
    }
    assert_eq!((*changed.borrow(), mesh.agent.kernel.set(SERVER)), (before, set));
    assert_eq!(mesh.agent.kernel.verdicts, verdicts);
}

#[tokio::test]
async fn after_a_reconnect_what_is_gone_is_listed_as_removed() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.addresses(&mut talk, &[client(), server(&[ALLOW])]).await;
    let old = policy("demo/old", Scope::Namespace, Action::Deny, vec![ports(&[8080])]);
    mesh.policies(&mut talk, &[allow(ALLOW, 8080), old]).await;
    mesh.until_complete().await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused("demo/old"));
    drop(talk);
    let (mut talk, policies, addresses) = mesh.connect().await;
    let wanted = [ALLOW, "demo/old"].map(|name| (name.to_owned(), String::new()));
    assert_eq!(policies, wanted.into());
    assert_eq!(addresses.len(), 2);
    // It still holds while nothing has been said.
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused("demo/old"));
    let resent = vec![of_policy(allow(ALLOW, 8080), "")];
    let answer = mesh.push(&mut talk, AUTHORIZATION_TYPE, resent, &["demo/old"]).await;
    assert_eq!(answer.error_detail, None);
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
    // Equal hashes are left out: nothing at all is the answer.
    mesh.addresses(&mut talk, &[]).await;
    assert_eq!(mesh.agent.snapshot.workload_count(), 2);
}

#[tokio::test]
async fn an_answer_of_nothing_says_that_there_are_no_policies() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.addresses(&mut talk, &[client(), server(&[])]).await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused(NOT_ARRIVED));
    mesh.policies(&mut talk, &[]).await;
    assert!(mesh.counts().complete, "at once, not after a silence");
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
}

#[tokio::test]
async fn what_is_enforced_stays_so_while_the_server_refuses_streams() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.addresses(&mut talk, &[client(), server(&[ALLOW])]).await;
    mesh.policies(&mut talk, &[allow(ALLOW, 8080)]).await;
    mesh.until_complete().await;
    *mesh.world.refuse.lock().unwrap() = Some(Status::resource_exhausted("request rate limit exceeded"));
    drop(talk);
    let mut refusals = 0;
    while refusals < 3 {
        let Did::Disconnected(reason) = mesh.step().await else { continue };
        refusals += u32::from(reason.contains("rate limit"));
        assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
        assert_eq!(mesh.verdict(CLIENT, SERVER, 9090), refused(""));
    }
    *mesh.world.refuse.lock().unwrap() = None;
    let (mut talk, policies, _) = mesh.connect().await;
    assert_eq!(policies.len(), 1);
    mesh.policies(&mut talk, &[allow(ALLOW, 9090)]).await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 9090), Ok(()));
}

#[tokio::test]
async fn a_policy_that_is_not_understood_is_named_refuses_and_is_asked_for_again() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    mesh.addresses(&mut talk, &[client(), server(&[ALLOW])]).await;
    // An action of a later version of the API.
    let odd = of_policy(Authorization { action: 3, ..allow(ALLOW, 8080) }, "");
    let nack = mesh.push(&mut talk, AUTHORIZATION_TYPE, vec![odd], &[]).await;
    assert_eq!(nack.error_detail.unwrap().message, "demo/allow-client: action: unknown value 3");
    mesh.until_complete().await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), refused(ALLOW));
    assert_eq!(mesh.verdict(SERVER, CLIENT, 8080), Ok(()));
    assert_eq!((mesh.counts().not_understood, mesh.counts().refusing), (1, 1));
    drop(talk);
    let (mut talk, policies, _) = mesh.connect().await;
    assert_eq!(policies, [(ALLOW.to_owned(), String::new())].into());
    mesh.policies(&mut talk, &[allow(ALLOW, 8080)]).await;
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
    assert_eq!((mesh.counts().not_understood, mesh.counts().refusing), (0, 0));
}

#[tokio::test]
async fn strict_comes_as_a_policy_of_the_root_namespace_that_workloads_name() {
    let mut mesh = Mesh::new().await;
    let (mut talk, ..) = mesh.connect().await;
    let (strict, open) =
        ("istio-system/istio_converted_static_strict", "demo/converted_peer_authentication_open");
    let clause = |one: Match| Clause { matches: vec![one] };
    let but_9000 = Match { not_destination_ports: vec![9000], ..Match::default() };
    let rules = vec![Rule { clauses: vec![clause(no_identity()), clause(but_9000)] }];
    let policies = [
        policy(strict, Scope::WorkloadSelector, Action::Deny, vec![no_identity()]),
        Authorization { rules, ..policy(open, Scope::WorkloadSelector, Action::Deny, vec![]) },
    ];
    mesh.addresses(&mut talk, &[client(), server(&[strict]), pod("demo/open", "10.244.2.11", HERE, &[open])])
        .await;
    mesh.policies(&mut talk, &policies).await;
    mesh.until_complete().await;
    let plain = |to: &str, port| {
        mesh.agent.kernel.by_address([10, 244, 9, 9].into(), to, port).is_some_and(|verdict| verdict.allows())
    };
    assert_eq!(mesh.verdict(CLIENT, SERVER, 8080), Ok(()));
    assert_eq!([8080, 9000].map(|port| plain(SERVER, port)), [false, false]);
    assert_eq!([8080, 9000].map(|port| plain("demo/open", port)), [false, true]);
}
