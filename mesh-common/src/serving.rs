//! Which members of a service serve the clients of a node: the agents lead them by it, the control plane explains it. Pure.
//!
//! By health first and then by locality, as kube-proxy does: endpoints that terminate serve only when no other would.

/// What client and backend may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The same region.
    Region,
    /// The same zone of the same region.
    Zone,
    /// The same subzone.
    Subzone,
    /// The same node.
    Node,
    /// The same cluster.
    Cluster,
    /// The same network.
    Network,
}

/// What a preference means for backends that do not match it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Every backend is as good as another.
    Any,
    /// Only backends that match every scope.
    Strict,
    /// The backends that match the most leading scopes.
    Failover,
}

/// Where a client or a backend stands; what is not known is empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place<'a> {
    /// Its node.
    pub node: &'a str,
    /// Region of the node.
    pub region: &'a str,
    /// Zone of the region.
    pub zone: &'a str,
    /// Subzone of the zone.
    pub subzone: &'a str,
    /// Its cluster.
    pub cluster: &'a str,
    /// Its network; empty is the default one.
    pub network: &'a str,
}

/// What a service says of its backends.
#[derive(Debug, Clone, Copy)]
pub struct Rule<'a> {
    /// Which are preferred, most important first.
    pub preference: &'a [Scope],
    /// What the preference means.
    pub mode: Mode,
    /// Those that are not ready serve as well.
    pub allow_unready: bool,
}

/// A member of the service.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// Where it stands.
    pub place: Place<'a>,
    /// Its share; 0 receives nothing.
    pub weight: u32,
    /// Ready, in general and in this service.
    pub ready: bool,
    /// Going away, but still serving.
    pub terminating: bool,
}

/// What becomes of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// It serves.
    Serves,
    /// Its weight is 0.
    Weightless,
    /// It is not ready.
    Unready,
    /// It terminates, and others do not.
    Terminating,
    /// It has not this in common with the client, and only those serve that have.
    Elsewhere(Scope),
    /// It has not this in common with the client, and others have.
    Farther(Scope),
}

/// What a member that may serve is measured by.
#[derive(Clone, Copy)]
struct Offer {
    terminating: bool,
    /// Leading scopes that it has in common with the client.
    rank: usize,
}

/// What becomes of each of `members`, in their order, for clients at `vantage`.
pub fn choose<'a, T>(
    rule: &Rule<'_>,
    vantage: &Place<'_>,
    members: impl Iterator<Item = (T, Member<'a>)>,
) -> Vec<(T, Choice)> {
    let offers: Vec<_> = members.map(|(name, member)| (name, offer(rule, vantage, &member))).collect();
    let able = || offers.iter().filter_map(|(_, offer)| offer.as_ref().ok());
    let terminating = able().all(|offer| offer.terminating);
    let healthy = able().filter(|offer| offer.terminating == terminating);
    let best = match rule.mode {
        Mode::Failover => healthy.map(|offer| offer.rank).max().unwrap_or(0),
        Mode::Any | Mode::Strict => 0,
    };
    let choice = |offer: Result<Offer, Choice>| match offer {
        Err(passed_over) => passed_over,
        Ok(offer) if offer.terminating != terminating => Choice::Terminating,
        Ok(offer) if offer.rank < best => {
            rule.preference.get(offer.rank).map_or(Choice::Serves, |scope| Choice::Farther(*scope))
        }
        Ok(_) => Choice::Serves,
    };
    offers.into_iter().map(|(name, offer)| (name, choice(offer))).collect()
}

fn offer(rule: &Rule<'_>, vantage: &Place<'_>, member: &Member<'_>) -> Result<Offer, Choice> {
    if member.weight == 0 {
        return Err(Choice::Weightless);
    }
    if !(rule.allow_unready || member.ready || member.terminating) {
        return Err(Choice::Unready);
    }
    let rank = rank(rule.preference, &member.place, vantage);
    match rule.preference.get(rank) {
        Some(scope) if rule.mode == Mode::Strict => Err(Choice::Elsewhere(*scope)),
        Some(_) | None => Ok(Offer { terminating: member.terminating, rank }),
    }
}

/// How many leading scopes two places have in common.
fn rank(preference: &[Scope], theirs: &Place<'_>, ours: &Place<'_>) -> usize {
    let region = theirs.region == ours.region;
    let zone = region && theirs.zone == ours.zone;
    let shared = |scope: &&Scope| match scope {
        Scope::Network => theirs.network == ours.network,
        Scope::Cluster => theirs.cluster == ours.cluster,
        Scope::Region => region,
        Scope::Zone => zone,
        Scope::Subzone => zone && theirs.subzone == ours.subzone,
        Scope::Node => theirs.node == ours.node,
    };
    preference.iter().take_while(shared).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Place<'_> =
        Place { node: "n1", region: "r", zone: "z1", subzone: "", cluster: "c", network: "" };
    const NEAR: &[Scope] = &[Scope::Network, Scope::Region, Scope::Zone, Scope::Node];

    /// A member by what is said of it: `unready`, `terminating`, `weightless`, and where it is if not here: `node`, `zone`, `region`.
    fn member(said: &str) -> Member<'static> {
        let is = |word: &str| said.split(' ').any(|said| said == word);
        let away = is("node") || is("zone") || is("region");
        Member {
            place: Place {
                node: if away { "n2" } else { "n1" },
                zone: if is("zone") { "z2" } else { "z1" },
                region: if is("region") { "s" } else { "r" },
                ..US
            },
            weight: u32::from(!is("weightless")),
            ready: !is("unready"),
            terminating: is("terminating"),
        }
    }

    fn check(mode: Mode, preference: &[Scope], allow_unready: bool, members: &[(&str, Choice)]) {
        let rule = Rule { preference, mode, allow_unready };
        let asked = members.iter().map(|(said, _)| (*said, member(said)));
        assert_eq!(choose(&rule, &US, asked), members, "{rule:?}");
    }

    #[test]
    fn health_comes_first() {
        use Choice::{Serves, Terminating, Unready, Weightless};
        let any = |allow, members: &[_]| check(Mode::Any, &[], allow, members);
        any(false, &[("", Serves), ("unready", Unready), ("weightless", Weightless), ("region", Serves)]);
        any(true, &[("unready", Serves), ("weightless unready", Weightless)]);
        any(false, &[("terminating", Terminating), ("", Serves)]);
        any(false, &[("terminating", Serves), ("unready terminating", Serves), ("unready", Unready)]);
        any(false, &[("weightless terminating", Weightless)]);
        any(false, &[]);
    }

    #[test]
    fn strict_has_no_second_choice() {
        use Choice::{Elsewhere, Serves, Unready};
        let only = |members: &[_]| check(Mode::Strict, &[Scope::Node], false, members);
        only(&[("", Serves), ("node", Elsewhere(Scope::Node))]);
        only(&[("unready", Unready), ("node", Elsewhere(Scope::Node))]);
        // Who terminates here is better than who does not there.
        only(&[("terminating", Serves), ("node", Elsewhere(Scope::Node))]);
    }

    #[test]
    fn failover_takes_the_nearest_that_is_ready() {
        use Choice::{Farther, Serves, Terminating, Unready};
        let near = |members: &[_]| check(Mode::Failover, NEAR, false, members);
        let (node, zone, region) = (Farther(Scope::Node), Farther(Scope::Zone), Farther(Scope::Region));
        near(&[("", Serves), ("node", node), ("zone", zone), ("region", region)]);
        near(&[("unready", Unready), ("node", Serves), ("zone", zone)]);
        near(&[("region", Serves), ("region", Serves)]);
        // Health before distance.
        near(&[("terminating", Terminating), ("zone", Serves)]);
        near(&[("terminating node", Serves), ("terminating zone", zone)]);
    }

    #[test]
    fn a_zone_is_that_of_its_region() {
        let elsewhere = Place { region: "s", ..US };
        assert_eq!(rank(&[Scope::Zone], &elsewhere, &US), 0);
        assert_eq!(rank(&[Scope::Subzone], &Place { subzone: "x", ..US }, &US), 0);
        assert_eq!(rank(&[Scope::Cluster, Scope::Node, Scope::Subzone], &US, &US), 3);
    }
}
