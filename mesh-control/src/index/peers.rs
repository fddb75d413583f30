//! PeerAuthentication: what each workload accepts, as policies that it names.
//!
//! The narrowest policy that says something counts: of the workload, its namespace, the mesh; the oldest where several say it.
//! A workload that accepts no plaintext names one policy for all of these, or, where ports differ, one of its own.

use std::sync::Arc;

use mesh_common::api::istio::security::{
    Action, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType,
};

use super::{
    Index, Origin, Policy, Problem,
    inputs::{link, swap},
    selection::Chooser,
};
use crate::manifest::{Key, Kind, NsName, PeerAuthentication, PeerMode};

/// Underscores keep these names apart from those of objects.
const STRICT: &str = "istio_converted_static_strict";
const CONVERTED: &str = "converted_peer_authentication_";

/// What applies to a workload by name.
pub(super) struct Applied {
    pub(super) names: Vec<String>,
    /// Mutual TLS is not offered.
    pub(super) disabled: bool,
}

/// Ports that differ from the rest of a workload.
enum Exceptions {
    None,
    /// These accept plaintext, the others do not.
    Open(Vec<u32>),
    /// These do not, the others do.
    Closed(Vec<u32>),
}

/// Name on the wire of the policy with the modes of single ports.
pub(super) fn converted(name: &NsName) -> String {
    format!("{}/{CONVERTED}{}", name.namespace, name.name)
}

impl Index {
    pub(super) fn take_peers(&mut self, name: NsName, peers: Option<&Arc<PeerAuthentication>>) {
        let namespace = Arc::clone(&name.namespace);
        let chooser = Chooser::Peers(name.clone());
        let before = self.inherited(&namespace);
        swap(&mut self.inputs.peers, &name, peers.cloned());
        link(&mut self.inputs.peers_in, Arc::clone(&namespace), name.clone(), peers.is_some());
        self.choose(&chooser, &namespace, peers.and_then(|peers| peers.selector()));
        if before != self.inherited(&namespace) {
            let root = *namespace == *self.mesh.root_namespace;
            self.mark_inheriting((!root).then_some(&*namespace));
        }
        self.policies.push(Policy::Peers(name));
        self.policies.push(Policy::Strict);
    }

    /// Marks what a mode of a namespace, or of the mesh, is inherited by.
    fn mark_inheriting(&mut self, namespace: Option<&str>) {
        self.inputs.selection.inside(namespace).into_iter().for_each(|origin| self.workloads.push(origin));
        let heirs = self.inputs.peers.keys().filter(|name| namespace.is_none_or(|ns| *name.namespace == *ns));
        heirs.for_each(|name| self.policies.push(Policy::Peers(name.clone())));
    }

    /// The mode of a workload that no policy chooses.
    fn inherited(&self, namespace: &str) -> PeerMode {
        let mesh = || self.level(&self.mesh.root_namespace);
        self.level(namespace).or(mesh).or(|| PeerMode::Permissive)
    }

    /// What is said for a whole namespace; for the root namespace, and so for the mesh.
    fn level(&self, namespace: &str) -> PeerMode {
        self.wide(namespace).first().map_or(PeerMode::Unset, |peers| peers.mode())
    }

    /// The policies for a whole namespace; the first of them counts.
    fn wide(&self, namespace: &str) -> Vec<&PeerAuthentication> {
        let inside = self.inputs.peers_in.get(namespace).into_iter().flatten();
        let inside = inside.filter_map(|name| self.inputs.peers.get(name)).map(Arc::as_ref);
        let mut wide: Vec<_> = inside.filter(|peers| peers.selector().is_none()).collect();
        wide.sort_by_key(|peers| peers.age());
        wide
    }

    /// The policies that an older one makes void.
    pub(super) fn overruled(&self) -> impl Iterator<Item = Problem> {
        self.inputs.peers_in.keys().flat_map(|namespace| {
            let wide = self.wide(namespace);
            let first = wide.first().map_or("", |first| &first.metadata.name);
            let problem = |loser: &&PeerAuthentication| Problem {
                key: Key { kind: Kind::PeerAuthentication, name: loser.metadata.ns_name() },
                field: "spec.selector".to_owned(),
                reason: format!(
                    "is missing, and {namespace} already has PeerAuthentication {first} without one, which stays in force"
                ),
            };
            wide.iter().skip(1).map(problem).collect::<Vec<_>>()
        })
    }

    fn mode(&self, namespace: &str, peers: &PeerAuthentication) -> PeerMode {
        peers.mode().or(|| self.inherited(namespace))
    }

    /// The policies that a workload names.
    pub(super) fn policies_of(&self, origin: &Origin, namespace: &str) -> Applied {
        let (mut names, mut chosen) = (Vec::new(), Vec::new());
        for chooser in self.inputs.selection.choosers(origin) {
            match chooser {
                Chooser::Owner(_) => {}
                Chooser::Authorization(name) => names.push(name.to_string()),
                Chooser::Peers(name) => chosen.extend(self.inputs.peers.get_key_value(name)),
            }
        }
        let own = chosen.into_iter().min_by_key(|(_, peers)| peers.age());
        let mode = own.map_or_else(|| self.inherited(namespace), |(_, peers)| self.mode(namespace, peers));
        let exceptions = own.map_or(Exceptions::None, |(_, peers)| exceptions(mode, peers));
        match (&exceptions, own) {
            (Exceptions::Open(_) | Exceptions::Closed(_), Some((name, _))) => names.push(converted(name)),
            (Exceptions::None | Exceptions::Open(_) | Exceptions::Closed(_), _)
                if mode == PeerMode::Strict =>
            {
                names.push(self.strict_name());
            }
            (Exceptions::None | Exceptions::Open(_) | Exceptions::Closed(_), _) => {}
        }
        names.sort();
        // A port that refuses plaintext could not be reached at all without mutual TLS.
        let disabled = mode == PeerMode::Disable && !matches!(exceptions, Exceptions::Closed(_));
        Applied { names, disabled }
    }

    pub(super) fn strict_name(&self) -> String {
        format!("{}/{STRICT}", self.mesh.root_namespace)
    }

    /// Served as long as a workload could name it.
    pub(super) fn strict_policy(&self) -> Option<Authorization> {
        let rule = Rule { clauses: vec![one(anonymous())] };
        let policy = || denying(&self.mesh.root_namespace, STRICT.to_owned(), rule);
        (!self.inputs.peers.is_empty()).then(policy)
    }

    /// Served whether or not a workload names it now.
    pub(super) fn port_policy(&self, name: &NsName) -> Option<Authorization> {
        let peers = self.inputs.peers.get(name)?;
        let clauses = match exceptions(self.mode(&name.namespace, peers), peers) {
            Exceptions::None => return None,
            Exceptions::Open(ports) => {
                let elsewhere = Match { not_destination_ports: ports, ..Match::default() };
                vec![one(elsewhere), one(anonymous())]
            }
            Exceptions::Closed(ports) => {
                vec![one(Match { destination_ports: ports, ..anonymous() })]
            }
        };
        Some(denying(&name.namespace, format!("{CONVERTED}{}", name.name), Rule { clauses }))
    }
}

/// The ports that are not as `mode`, in a policy whose own ports can only count beside a selector.
fn exceptions(mode: PeerMode, peers: &PeerAuthentication) -> Exceptions {
    let strict = mode == PeerMode::Strict;
    let differs = |own: PeerMode| own != PeerMode::Unset && (own == PeerMode::Strict) != strict;
    let ports: Vec<_> =
        peers.ports().filter(|(_, own)| differs(*own)).map(|(port, _)| u32::from(port)).collect();
    match (ports.is_empty(), strict) {
        (true, _) => Exceptions::None,
        (false, true) => Exceptions::Open(ports),
        (false, false) => Exceptions::Closed(ports),
    }
}

/// Met by who shows no identity.
fn anonymous() -> Match {
    let any = StringMatch { match_type: Some(MatchType::Presence(())) };
    Match { not_principals: vec![any], ..Match::default() }
}

fn one(only: Match) -> Clause {
    Clause { matches: vec![only] }
}

fn denying(namespace: &str, name: String, rule: Rule) -> Authorization {
    Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules: vec![rule],
        dry_run: false,
        http: false,
    }
}
