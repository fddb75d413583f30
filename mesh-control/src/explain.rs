//! What would come of a connection, and why. Pure: over what is served to agents.

mod choice;
mod way;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use mesh_common::{
    abi::Proxy,
    api::{
        istio::{
            security::{self as api, Authorization},
            workload::{NetworkMode, Service, TunnelProtocol, Workload, WorkloadStatus},
        },
        mesh::v1::{ExplainResponse, ExplainedBackend, WorkloadExtension, explained_backend::Path},
    },
    policy::{Attempt, Block, Decision, Mentions, Policy, Principal, Scope, SourceIp, evaluate, rehearse},
};

use crate::index::Joined;

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) from: From,
    pub(crate) namespace: String,
    /// Its name or its host name.
    pub(crate) service: String,
    pub(crate) port: u16,
}

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Workload {
        namespace: String,
        name: String,
    },
    /// Somebody outside the mesh, at that address if one is given.
    Outside(Option<IpAddr>),
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unanswered {
    #[error("--from {0:?}: neither NAMESPACE/WORKLOAD, nor an IP address, nor \"none\"")]
    From(String),
    #[error("--to {0:?}: not NAMESPACE/SERVICE:PORT")]
    To(String),
    #[error("--from: no workload {name} in namespace {namespace}")]
    NoWorkload { namespace: String, name: String },
    #[error("--to: no service {service} in namespace {namespace}")]
    NoService { namespace: String, service: String },
    #[error("--to: service {service} has no TCP port {port}; it has {has}")]
    NoPort { service: String, port: u16, has: String },
}

/// The ports of node proxies.
const RESERVED: [u16; 3] = [Proxy::OUTBOUND, Proxy::PLAIN, Proxy::TUNNEL];

/// Everything that is served.
#[derive(Default)]
pub(crate) struct Served {
    pub(crate) services: Vec<Service>,
    pub(crate) workloads: Vec<(Workload, WorkloadExtension)>,
    pub(crate) policies: BTreeMap<String, Authorization>,
}

impl Question {
    pub(crate) fn parse(from: &str, to: &str) -> Result<Self, Unanswered> {
        let from = if from == "none" {
            From::Outside(None)
        } else if let Ok(address) = from.parse() {
            From::Outside(Some(address))
        } else {
            let parts = from.split_once('/').filter(|(ns, name)| !ns.is_empty() && !name.is_empty());
            let (namespace, name) = parts.ok_or_else(|| Unanswered::From(from.to_owned()))?;
            From::Workload { namespace: namespace.to_owned(), name: name.to_owned() }
        };
        let parts = to.rsplit_once(':').and_then(|(name, port)| {
            let (namespace, service) = name.split_once('/')?;
            let port = port.parse().ok().filter(|port| *port != 0)?;
            (!namespace.is_empty() && !service.is_empty()).then_some((namespace, service, port))
        });
        let (namespace, service, port) = parts.ok_or_else(|| Unanswered::To(to.to_owned()))?;
        Ok(Self { from, namespace: namespace.to_owned(), service: service.to_owned(), port })
    }
}

/// A backend, as far as it is chosen by that.
struct Candidate<'a> {
    workload: &'a Workload,
    address: IpAddr,
    port: u16,
    state: State,
}

/// Answers for each backend of the service, ready or not.
pub(crate) fn explain(
    question: &Question,
    served: &Served,
    joined: &Joined,
) -> Result<ExplainResponse, Unanswered> {
    let Question { namespace, service: wanted, port, .. } = question;
    let source = match &question.from {
        From::Outside(_) => None,
        From::Workload { namespace, name } => {
            let found = served.workloads.iter().find(|(w, _)| w.namespace == *namespace && w.name == *name);
            let missing = || Unanswered::NoWorkload { namespace: namespace.clone(), name: name.clone() };
            Some(found.ok_or_else(missing)?)
        }
    };
    let named = |service: &&Service| {
        service.namespace == *namespace && (service.name == *wanted || service.hostname == *wanted)
    };
    let missing = || Unanswered::NoService { namespace: namespace.clone(), service: wanted.clone() };
    let service = served.services.iter().find(named).ok_or_else(missing)?;
    let numbers: Vec<u32> = service.ports.iter().map(|port| port.service_port).collect();
    if !numbers.contains(&u32::from(*port)) {
        let has: Vec<_> = numbers.iter().map(u32::to_string).collect();
        let has = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
        return Err(Unanswered::NoPort { service: wanted.clone(), port: *port, has });
    }
    let name = format!("{}/{}", service.namespace, service.hostname);
    let mut backends = Vec::new();
    let mut candidates = Vec::new();
    for (workload, extension) in &served.workloads {
        let ports = workload.services.get(&name).into_iter().flat_map(|list| &list.ports);
        let targets = ports.filter(|p| p.service_port == u32::from(*port)).map(|p| p.target_port);
        for target in targets.filter_map(|target| u16::try_from(target).ok()) {
            for address in workload.addresses.iter().filter_map(|octets| address_of(octets)) {
                let end = Backend { workload, address, port: target };
                let mut backend = end.explain(&question.from, source, served, joined);
                let state = State::of(workload, extension, &name);
                state.name().clone_into(&mut backend.state);
                backends.push(backend);
                candidates.push(Candidate { workload, address, port: target, state });
            }
        }
    }
    let client = choice::client(source.map(|(workload, _)| workload), served, joined);
    let told = choice::shares(service, &client, &candidates);
    for (backend, told) in backends.iter_mut().zip(told) {
        (backend.share, backend.choice) = (told.share, told.why);
    }
    backends.sort_by(|a, b| (&a.workload, &a.address).cmp(&(&b.workload, &b.address)));
    let source = match (source, &question.from) {
        (Some((workload, _)), _) => format!("spiffe://{}", identity(workload)),
        (None, From::Outside(Some(address))) => address.to_string(),
        (None, From::Outside(None) | From::Workload { .. }) => String::new(),
    };
    Ok(ExplainResponse { source, service: Some(service.clone()), backends })
}

/// The far end of the connection.
struct Backend<'a> {
    workload: &'a Workload,
    address: IpAddr,
    port: u16,
}

impl Backend<'_> {
    fn explain(
        &self,
        from: &From,
        source: Option<&(Workload, WorkloadExtension)>,
        served: &Served,
        joined: &Joined,
    ) -> ExplainedBackend {
        let (path, mut why) = way::way(source, self.workload, self.port, joined);
        let to_itself = source.is_some_and(|(source, _)| source.uid == self.workload.uid);
        let source = source.map(|(workload, _)| workload);
        let (allowed, policy, rule, verdict) = match path {
            Path::Refused => (false, String::new(), None, "refused before any policy".to_owned()),
            Path::Kernel | Path::Mtls | Path::Plaintext => match self.unguarded(joined) {
                Some(why) => (true, String::new(), None, why),
                None => self.judge(from, source.filter(|_| path != Path::Plaintext), source, served),
            },
        };
        if matches!(path, Path::Kernel | Path::Plaintext)
            && allowed
            && !to_itself
            && !RESERVED.contains(&self.port)
            && self.unguarded(joined).is_none()
            && self.is_steered(served)
        {
            why += "; policies with conditions on HTTP lead it through the backend's node proxy";
        }
        ExplainedBackend {
            workload: self.workload.uid.clone(),
            node: self.workload.node.clone(),
            address: self.address.to_string(),
            port: u32::from(self.port),
            state: String::new(),
            path: path.into(),
            why,
            allowed,
            policy,
            rule,
            verdict,
            share: None,
            choice: String::new(),
        }
    }

    /// Why nobody enforces policies there, if that is so.
    fn unguarded(&self, joined: &Joined) -> Option<String> {
        if self.workload.network_mode() == NetworkMode::HostNetwork {
            Some("no policy is enforced: it has no network of its own".to_owned())
        } else if !joined.contains_key(self.workload.node.as_str()) {
            Some("no policy is enforced: no agent has joined on its node".to_owned())
        } else {
            None
        }
    }

    /// Whether what comes without TLS goes through the proxy of the backend's node.
    fn is_steered(&self, served: &Served) -> bool {
        let names = &self.workload.authorization_policies;
        served.policies.iter().any(|(name, policy)| {
            let applies = match policy.scope() {
                api::Scope::Global => true,
                api::Scope::Namespace => policy.namespace == self.workload.namespace,
                api::Scope::WorkloadSelector => names.contains(name),
            };
            applies && policy.http && !policy.dry_run
        })
    }

    /// What the policies say of `known`, which is the source if it can be known.
    fn judge(
        &self,
        from: &From,
        known: Option<&Workload>,
        source: Option<&Workload>,
        served: &Served,
    ) -> (bool, String, Option<u32>, String) {
        let names = &self.workload.authorization_policies;
        let mut policies = Vec::new();
        for (name, wire) in &served.policies {
            let policy = match Policy::try_from(wire) {
                Ok(policy) => policy,
                Err(error) => {
                    return (false, name.clone(), None, format!("the policy cannot be understood: {error}"));
                }
            };
            let applies = match policy.scope {
                Scope::Global => true,
                Scope::Namespace => *policy.namespace == self.workload.namespace,
                Scope::Selector => names.contains(name),
            };
            if applies {
                policies.push(policy);
            }
        }
        if let Some(missing) = names.iter().find(|name| !served.policies.contains_key(*name)) {
            return (false, missing.clone(), None, "the policy is named, and is not there".to_owned());
        }
        let domain = known.map_or("", |known| domain_of(known));
        let principal = known.map(|known| Principal {
            trust_domain: domain,
            namespace: &known.namespace,
            service_account: account_of(known),
        });
        let from_any = known.is_some_and(is_shared);
        let listed = Mentions::of(policies.iter()).source_blocks;
        let rehearsed = policies.iter().map(|policy| Policy { dry_run: false, ..policy.clone() });
        let rehearsed: Vec<_> = rehearsed.collect();
        let all_listed = Mentions::of(rehearsed.iter()).source_blocks;
        let sources = |listed: &BTreeSet<Block>| match from_any {
            true => self.any_source(listed),
            false => vec![SourceIp::One(self.source_ip(from, source))],
        };
        let attempt = |source_ip| Attempt {
            source: principal,
            source_ip,
            destination_ip: self.address,
            port: self.port,
        };
        let of = |source_ip: SourceIp| evaluate(policies.iter(), &attempt(source_ip));
        let decision = worst(sources(&listed).into_iter().map(of));
        let (allowed, policy, rule, mut verdict) = spoken(decision, &policies, known.is_some());
        if !all_listed.is_empty() {
            if from_any {
                verdict += "; it shares its node's addresses, and is judged as if it came from any";
            } else if *from == From::Outside(None) {
                verdict += "; another address may fare otherwise: ask with --from ADDRESS";
            } else if source.is_some_and(is_shared) {
                verdict += "; it shares its node's addresses, and another of them may fare otherwise";
            }
        }
        let of = |source_ip: SourceIp| rehearse(policies.iter(), &attempt(source_ip));
        let rehearsed = worst(sources(&all_listed).into_iter().map(of));
        if rehearsed.allows() != decision.allows() {
            let (_, policy, _, would) = spoken(rehearsed, &policies, known.is_some());
            verdict += &format!("; with dry runs in force: {would} {policy}");
        }
        (allowed, policy, rule, verdict.trim_end().to_owned())
    }

    /// Every address of the family: those alike by what the policies mention, and all others.
    fn any_source(&self, listed: &BTreeSet<Block>) -> Vec<SourceIp> {
        let all = if self.address.is_ipv4() { Block::V4 } else { Block::V6 };
        let own = listed.iter().copied().filter(|block| block.address().is_ipv4() == self.address.is_ipv4());
        own.chain((!listed.contains(&all)).then_some(all)).map(SourceIp::Block).collect()
    }

    /// The source's address of the same family; unknown is one that no block holds but that of all.
    fn source_ip(&self, from: &From, source: Option<&Workload>) -> IpAddr {
        let own =
            source.into_iter().flat_map(|source| &source.addresses).filter_map(|octets| address_of(octets));
        let given = match from {
            From::Outside(address) => *address,
            From::Workload { .. } => None,
        };
        let fitting = own.chain(given).find(|address| address.is_ipv4() == self.address.is_ipv4());
        let unknown =
            if self.address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        fitting.unwrap_or(unknown)
    }
}

/// The decision that holds for all of them: a refusal, if one of them is.
fn worst(decisions: impl Iterator<Item = Decision>) -> Decision {
    let worse = |a: Decision, b: Decision| if a.allows() { b } else { a };
    decisions.reduce(worse).unwrap_or(Decision::Deny { by: None })
}

fn spoken(decision: Decision, policies: &[Policy], known: bool) -> (bool, String, Option<u32>, String) {
    let name = |policy: &Policy| format!("{}/{}", policy.namespace, policy.name);
    let whom = if known { "" } else { " (the source has no identity)" };
    let (allowed, by, verdict) = match decision {
        Decision::Allow { by: None } => (true, None, "allowed: no ALLOW policy applies"),
        Decision::Allow { by } => (true, by, "allowed by"),
        Decision::Deny { by: None } => (false, None, "denied: no rule of an ALLOW policy matches"),
        Decision::Deny { by } => (false, by, "denied by"),
    };
    let asking = |policy: &&Policy| policy.action == mesh_common::policy::Action::Allow && !policy.dry_run;
    let policy = match by {
        Some(by) => policies.get(by.policy).map(name).unwrap_or_default(),
        // All that could have allowed it.
        None if !allowed => policies.iter().filter(asking).map(name).collect::<Vec<_>>().join(", "),
        None => String::new(),
    };
    let rule = by.and_then(|by| u32::try_from(by.rule).ok());
    (allowed, policy, rule, format!("{verdict}{}", if allowed { "" } else { whom }))
}

/// How a backend fares in the service.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Unready,
    Terminating,
}

impl State {
    fn of(workload: &Workload, extension: &WorkloadExtension, service: &str) -> Self {
        if extension.terminating_in.iter().any(|name| name == service) {
            Self::Terminating
        } else if workload.status() != WorkloadStatus::Healthy
            || extension.unready_in.iter().any(|n| n == service)
        {
            Self::Unready
        } else {
            Self::Ready
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Unready => "unready",
            Self::Terminating => "terminating",
        }
    }
}

/// `TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
fn identity(workload: &Workload) -> String {
    format!("{}/ns/{}/sa/{}", domain_of(workload), workload.namespace, account_of(workload))
}

/// On the wire nothing stands for `cluster.local`.
fn domain_of(workload: &Workload) -> &str {
    if workload.trust_domain.is_empty() { "cluster.local" } else { &workload.trust_domain }
}

fn account_of(workload: &Workload) -> &str {
    if workload.service_account.is_empty() { "default" } else { &workload.service_account }
}

fn is_meshed(workload: &Workload) -> bool {
    workload.tunnel_protocol() == TunnelProtocol::Hbone
}

/// It connects from its node's addresses, whichever: the agents' `policy::table` means the same.
fn is_shared(workload: &Workload) -> bool {
    workload.network_mode() == NetworkMode::HostNetwork || workload.addresses.is_empty()
}

fn address_of(octets: &[u8]) -> Option<IpAddr> {
    match *octets {
        [a, b, c, d] => Some(IpAddr::from([a, b, c, d])),
        _ => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
    }
}

#[cfg(test)]
mod tests;
