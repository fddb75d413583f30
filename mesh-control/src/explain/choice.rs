//! Which backends the client's node leads it to, with which share: by the rule that agents go by (`mesh_common::serving`).

use std::{collections::BTreeSet, net::IpAddr};

use mesh_common::{
    api::istio::workload::{
        Service, Workload,
        load_balancing::{self as wire, HealthPolicy},
    },
    serving::{Choice, Member, Mode, Place, Rule, Scope, choose},
};

use super::{Candidate, Served, State, address_of, way::absent};
use crate::index::Joined;

/// Where the client is, as its node's agent sees it; or why no agent leads it anywhere.
pub(super) type Client<'a> = Result<Place<'a>, String>;

/// What comes of a backend.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Told {
    pub(super) share: Option<f64>,
    pub(super) why: String,
}

/// Where the client is.
pub(super) fn client<'a>(source: Option<&'a Workload>, served: &'a Served, joined: &Joined) -> Client<'a> {
    let source = source.ok_or("the client is on no node of the mesh")?;
    if !joined.contains_key(source.node.as_str()) {
        return Err(absent("the client", &source.node));
    }
    // Pods stand where their node stands; other workloads may say anything of themselves.
    let says = |workload: &&Workload| {
        workload.node == source.node
            && workload.uid.contains("//Pod/")
            && workload.locality.as_ref().is_some_and(|at| !(at.region.is_empty() && at.zone.is_empty()))
    };
    let neighbours = served.workloads.iter().map(|(workload, _)| workload);
    let stands = std::iter::once(source).chain(neighbours).find(says).unwrap_or(source);
    Ok(Place { cluster: &source.cluster_id, ..place(stands) })
}

fn place(workload: &Workload) -> Place<'_> {
    let (region, zone, subzone) = match &workload.locality {
        Some(at) => (at.region.as_str(), at.zone.as_str(), at.subzone.as_str()),
        None => ("", "", ""),
    };
    Place {
        node: &workload.node,
        region,
        zone,
        subzone,
        cluster: &workload.cluster_id,
        network: &workload.network,
    }
}

/// For each of the candidates, in their order.
pub(super) fn shares(service: &Service, client: &Client<'_>, candidates: &[Candidate<'_>]) -> Vec<Told> {
    let balancing = service.load_balancing.clone().unwrap_or_default();
    let none = |why: &str| Told { share: None, why: why.to_owned() };
    let all = |why: &str| candidates.iter().map(|_| none(why)).collect();
    let vantage = match client {
        Ok(vantage) => vantage,
        Err(why) => return all(why),
    };
    if service.addresses.is_empty() || balancing.mode() == wire::Mode::Passthrough {
        return all("the service has no address of its own: it is dialled by those of its backends");
    }
    let preference: Vec<_> = balancing.routing_preference().filter_map(scope).collect();
    let mode = match balancing.mode() {
        wire::Mode::UnspecifiedMode | wire::Mode::Passthrough => Mode::Any,
        wire::Mode::Strict => Mode::Strict,
        wire::Mode::Failover => Mode::Failover,
    };
    let allow_unready = balancing.health_policy() == HealthPolicy::AllowAll;
    let rule = Rule { preference: &preference, mode, allow_unready };
    let members = candidates.iter().map(|candidate| {
        let member = Member {
            place: place(candidate.workload),
            weight: weight(candidate.workload),
            ready: candidate.state == State::Ready,
            terminating: candidate.state == State::Terminating,
        };
        (candidate, member)
    });
    let choices = choose(&rule, vantage, members);
    let dialled: Vec<_> =
        service.addresses.iter().filter_map(|address| address_of(&address.address)).collect();
    let families = |address: IpAddr| dialled.iter().any(|own| own.is_ipv4() == address.is_ipv4());
    // An endpoint that two workloads claim counts once.
    let mut seen = BTreeSet::new();
    let lets: Vec<_> = choices
        .into_iter()
        .map(|(candidate, choice)| match choice {
            Choice::Serves if !families(candidate.address) => {
                let family = if candidate.address.is_ipv4() { "IPv4" } else { "IPv6" };
                Err(format!("the service has no {family} address"))
            }
            Choice::Serves if !seen.insert((candidate.address, candidate.port)) => {
                Err("another workload has the same address and port".to_owned())
            }
            Choice::Serves => Ok(candidate),
            Choice::Weightless
            | Choice::Unready
            | Choice::Terminating
            | Choice::Elsewhere(_)
            | Choice::Farther(_) => Err(passed_over(choice)),
        })
        .collect();
    let total = |of: IpAddr| -> u64 {
        let chosen = lets.iter().filter_map(|one| one.as_ref().ok());
        let alike = chosen.filter(|one| one.address.is_ipv4() == of.is_ipv4());
        alike.map(|one| u64::from(weight(one.workload))).sum()
    };
    let told = |one: &Result<&Candidate<'_>, String>| match one {
        Err(why) => none(why),
        Ok(candidate) => {
            let share = f64::from(weight(candidate.workload)) / total(candidate.address) as f64;
            let why = match candidate.state {
                State::Ready => "",
                State::Unready => "unready endpoints of this service serve as well",
                State::Terminating => "no other is left",
            };
            Told { share: Some(share), why: why.to_owned() }
        }
    };
    lets.iter().map(told).collect()
}

fn weight(workload: &Workload) -> u32 {
    workload.capacity.unwrap_or(1)
}

fn passed_over(choice: Choice) -> String {
    match choice {
        Choice::Serves => String::new(),
        Choice::Weightless => "its weight is 0".to_owned(),
        Choice::Unready => "it is not ready".to_owned(),
        Choice::Terminating => "it terminates, and others serve".to_owned(),
        Choice::Elsewhere(scope) => format!("only the client's own {} serves", name(scope)),
        Choice::Farther(scope) => format!("others serve that are in the client's {}", name(scope)),
    }
}

fn name(scope: Scope) -> &'static str {
    match scope {
        Scope::Region => "region",
        Scope::Zone => "zone",
        Scope::Subzone => "subzone",
        Scope::Node => "node",
        Scope::Cluster => "cluster",
        Scope::Network => "network",
    }
}

fn scope(scope: wire::Scope) -> Option<Scope> {
    Some(match scope {
        wire::Scope::UnspecifiedScope => return None,
        wire::Scope::Region => Scope::Region,
        wire::Scope::Zone => Scope::Zone,
        wire::Scope::Subzone => Scope::Subzone,
        wire::Scope::Node => Scope::Node,
        wire::Scope::Cluster => Scope::Cluster,
        wire::Scope::Network => Scope::Network,
    })
}

#[cfg(test)]
mod tests;
