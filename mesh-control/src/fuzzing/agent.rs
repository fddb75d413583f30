//! An agent that says whatever it likes on one stream, while what is served changes, and what it must be told all the same.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

use mesh_common::api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, COMPLETE,
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    google::rpc,
};
use prost::Message as _;

use crate::{
    catalog::{Contents, Revisions},
    index::{Body, Delta, Name, Resource},
    xds::{Answer, Next, Offered, Subscriptions},
};

const NAMES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];
/// Responses after which nothing more may be due, when nothing changes.
const MANY: usize = 200;

/// Requests of an agent, changes, and answers, one after the other.
pub fn agent_requests(bytes: &[u8]) {
    let mut world = World::default();
    let mut bytes = bytes.iter().copied();
    while let Some(step) = bytes.next() {
        let mut next = || bytes.next().unwrap_or(0);
        let going_on = match step % 8 {
            0..=2 => world.request(asked(&mut next)),
            3 => {
                let length = usize::from(next());
                let message: Vec<u8> = bytes.by_ref().take(length).collect();
                let message = DeltaDiscoveryRequest::decode(message.as_slice());
                message.is_err() || message.is_ok_and(|message| world.request(message))
            }
            4 | 5 => {
                world.change(next(), next());
                true
            }
            _ => {
                world.respond();
                true
            }
        };
        if !going_on {
            return;
        }
        world.is_bounded();
    }
    world.settle();
}

/// A request of small alphabets: what only chance would find is what follows from them.
fn asked(next: &mut impl FnMut() -> u8) -> DeltaDiscoveryRequest {
    let type_url = match next() {
        kind @ 0..=31 => format!("type-{kind}"),
        kind if kind % 2 == 0 => ADDRESS_TYPE.to_owned(),
        _ => AUTHORIZATION_TYPE.to_owned(),
    };
    let mut names = || {
        let bits = next();
        let named = NAMES.iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1);
        let mut named: Vec<String> = named.map(|(_, name)| (*name).to_owned()).collect();
        named.extend((bits >> 7 == 1).then(|| "*".to_owned()));
        named
    };
    let (subscribe, unsubscribe, initial) = (names(), names(), names());
    let version = format!("{:016x}", next() % 4);
    let (nonce, refused) = (next(), next());
    DeltaDiscoveryRequest {
        type_url,
        resource_names_subscribe: subscribe,
        resource_names_unsubscribe: unsubscribe,
        initial_resource_versions: initial.into_iter().map(|name| (name, version.clone())).collect(),
        response_nonce: if nonce == 0 { String::new() } else { nonce.to_string() },
        error_detail: (refused % 4 == 3).then(rpc::Status::default),
        ..DeltaDiscoveryRequest::default()
    }
}

#[derive(Default)]
struct World {
    addresses: Contents,
    policies: Contents,
    nothing: Contents,
    subscriptions: Subscriptions,
    /// What the agent knows of each type that it has asked for.
    told: BTreeMap<String, Told>,
    /// Names that it has said.
    said: usize,
}

#[derive(Default)]
struct Told {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Names for which it asked at some time; all, if it was a wildcard.
    ever: BTreeSet<String>,
    /// What it has, by version.
    held: BTreeMap<String, String>,
    /// Responses that it has not answered, and how much was in each.
    unanswered: VecDeque<(u64, usize)>,
    last: u64,
}

impl Told {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }
}

impl World {
    /// Whether the stream goes on.
    fn request(&mut self, request: DeltaDiscoveryRequest) -> bool {
        let first = !self.told.contains_key(&request.type_url);
        let nonce = request.response_nonce.parse::<u64>().ok();
        let told = self.told.get(&request.type_url);
        let place = told.and_then(|told| told.unanswered.iter().position(|(sent, _)| Some(*sent) == nonce));
        let expected = match (place, &request.error_detail) {
            (None, _) => Answer::None,
            (Some(_), None) => Answer::Acknowledged,
            (Some(_), Some(_)) => Answer::Refused,
        };
        let types = self.told.len();
        let copy = request.clone();
        let Ok((answer, refusal)) = self.subscriptions.request(request) else {
            assert!(first && types >= 16, "refused after {types} types and {} names", self.said);
            return false;
        };
        assert_eq!((answer, refusal.is_some()), (expected, copy.error_detail.is_some()));
        let told = self.told.entry(copy.type_url).or_default();
        told.unanswered.drain(..place.map_or(0, |place| place + 1));
        if first {
            told.wildcard = copy.resource_names_subscribe.is_empty();
            told.ever.extend(copy.initial_resource_versions.keys().cloned());
            self.said += copy.initial_resource_versions.len();
            told.held.extend(copy.initial_resource_versions);
        }
        self.said += copy.resource_names_subscribe.len();
        for name in copy.resource_names_subscribe {
            if name == "*" {
                told.wildcard = true;
            } else {
                told.ever.insert(name.clone());
                told.names.insert(name);
            }
        }
        if told.wildcard {
            told.ever.insert("*".to_owned());
        }
        let all = told.wildcard && !copy.resource_names_unsubscribe.iter().any(|name| name == "*");
        if first && !all {
            // What it holds is what it asks for, too.
            told.names.extend(told.held.keys().filter(|name| *name != "*").cloned());
        }
        let forgets = first || !copy.resource_names_unsubscribe.is_empty();
        for name in copy.resource_names_unsubscribe {
            if name == "*" {
                told.wildcard = false;
            } else {
                told.names.remove(&name);
            }
        }
        // Who does not ask for something does not hold it.
        let (wildcard, names) = (told.wildcard, &told.names);
        told.held.retain(|name, _| !forgets || wildcard || names.contains(name));
        true
    }

    fn change(&mut self, which: u8, how: u8) {
        let name = NAMES[usize::from(which) % NAMES.len()];
        let version = u64::from(how % 4);
        let policy = which >= 128;
        let resource = (version > 0).then(|| Resource {
            name: name.into(),
            body: if policy { Body::Policy } else { Body::Workload },
            namespace: "ns".into(),
            version,
            bytes: bytes::Bytes::from_static(marker(policy)),
            placement: None,
            wide: policy && how & 4 != 0,
        });
        let contents = if policy { &mut self.policies } else { &mut self.addresses };
        // The index tells only of what differs.
        let same = match (&resource, contents.get(name)) {
            (Some(new), Some(old)) => *new == old.resource,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !same {
            contents.apply(Delta::from([(Name::from(name), resource)]), Instant::now());
        }
    }

    /// Makes the response that is due, if one is; whether something was.
    fn respond(&mut self) -> bool {
        let (addresses, policies) = (self.addresses.revision(), self.policies.revision());
        let Some(at) = self.subscriptions.due(Revisions { addresses, policies }) else { return false };
        let offered =
            Offered { addresses: &self.addresses, policies: &self.policies, nothing: &self.nothing };
        match self.subscriptions.next(at, &offered) {
            Next::Idle | Next::Again => {}
            Next::TooFarBehind => panic!("nothing was forgotten"),
            Next::Send(response) => {
                let response = self.subscriptions.on_wire(at, response);
                self.receive(response);
            }
        }
        true
    }

    fn receive(&mut self, response: DeltaDiscoveryResponse) {
        let kind = response.type_url;
        let told = self.told.get_mut(&kind).expect("a type that was asked for");
        let nonce = response.nonce.parse::<u64>().expect("a number");
        assert!(nonce > told.last, "{nonce} after {}", told.last);
        told.last = nonce;
        let items = response.resources.len() + response.removed_resources.len();
        told.unanswered.push_back((nonce, items));
        let asked = |told: &Told, name: &str| told.ever.contains("*") || told.ever.contains(name);
        let mut named = BTreeSet::new();
        for resource in response.resources {
            let content = resource.resource.expect("content");
            assert_eq!(content.type_url, kind);
            assert_eq!(content.value, marker(kind == AUTHORIZATION_TYPE), "{kind}");
            assert!(kind == ADDRESS_TYPE || kind == AUTHORIZATION_TYPE, "{kind} is served by nobody");
            assert!(asked(told, &resource.name), "{} was not asked for", resource.name);
            assert!(named.insert(resource.name.clone()), "{} is there twice", resource.name);
            told.held.insert(resource.name, resource.version);
        }
        for name in response.removed_resources {
            assert!(asked(told, &name), "{name} was not asked for");
            assert!(named.insert(name.clone()), "{name} is there twice");
            told.held.remove(&name);
        }
        if response.system_version_info.ends_with(COMPLETE) {
            self.is_told(&kind);
        }
    }

    /// The agent has what it wants of a type, and nothing else of it.
    fn is_told(&self, kind: &str) {
        let contents = match kind {
            ADDRESS_TYPE => &self.addresses,
            AUTHORIZATION_TYPE => &self.policies,
            _ => &self.nothing,
        };
        let told = &self.told[kind];
        for served in contents.live().filter(|served| told.wants(&served.resource.name)) {
            let name = &*served.resource.name;
            assert_eq!(told.held.get(name), Some(&served.version()), "{kind}: {name}");
        }
        for name in told.held.keys().filter(|name| told.wants(name)) {
            assert!(contents.get(name).is_some(), "{kind}: {name} has gone, and it was not told");
        }
    }

    /// What is kept of the agent is in proportion to what it has said, and to what there is.
    fn is_bounded(&self) {
        let unanswered = self.told.values().flat_map(|told| &told.unanswered).map(|(_, items)| 2 + items);
        let most = 3 * self.said + unanswered.sum::<usize>() + self.told.len() * (65 + NAMES.len());
        let weight = self.subscriptions.weight();
        assert!(weight <= most, "{weight} pieces of {} names", self.said);
    }

    /// An agent that answers from now on is told everything in a while.
    fn settle(&mut self) {
        for _ in 0..MANY {
            let answers: Vec<_> = self
                .told
                .iter()
                .filter_map(|(kind, told)| Some((kind.clone(), told.unanswered.back()?.0)))
                .collect();
            for (type_url, nonce) in answers {
                let response_nonce = nonce.to_string();
                self.request(DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() });
            }
            if !self.respond() {
                self.told.keys().for_each(|kind| self.is_told(kind));
                return;
            }
        }
        panic!("there is always something due");
    }
}

fn marker(policy: bool) -> &'static [u8] {
    if policy { b"policy" } else { b"address" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_asks_for_all_is_told_all() {
        let mut world = World::default();
        let all = |kind: &str| DeltaDiscoveryRequest { type_url: kind.to_owned(), ..Default::default() };
        assert!(world.request(all(ADDRESS_TYPE)) && world.request(all(AUTHORIZATION_TYPE)));
        for which in [0, 1, 128, 129] {
            world.change(which, 1);
        }
        world.settle();
        world.change(128, 0);
        world.change(1, 2);
        world.settle();
        assert_eq!(world.told[ADDRESS_TYPE].held.len(), 2);
        assert_eq!(world.told[AUTHORIZATION_TYPE].held.len(), 1);
    }

    /// What libFuzzer would find in a moment is found without it.
    #[test]
    fn no_agent_does_harm_by_chance() {
        let mut state = 1_u64;
        let mut roll = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        for _ in 0..3_000 {
            let program: Vec<u8> = (0..200).map(|_| roll()).collect();
            agent_requests(&program);
        }
    }

    #[test]
    fn the_seeds_do_no_harm() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/seeds/agent_requests");
        let seeds: Vec<_> = std::fs::read_dir(seeds).unwrap().map(Result::unwrap).collect();
        assert!(!seeds.is_empty());
        seeds.iter().for_each(|seed| agent_requests(&std::fs::read(seed.path()).unwrap()));
    }
}
