//! What policies say of a connection.

use std::net::IpAddr;

use super::{Account, Action, Block, Clause, Match, Policy, Rule, Text};

/// A connection to a workload, attempted or made.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// Who comes; `None`: nobody knows.
    pub source: Option<Principal<'a>>,
    /// From where.
    pub source_ip: SourceIp,
    /// The workload's address.
    pub destination_ip: IpAddr,
    /// The workload's port.
    pub port: u16,
}

/// An identity, `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Principal<'a> {
    /// Who vouches for it.
    pub trust_domain: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its service account.
    pub service_account: &'a str,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceIp {
    /// An address.
    One(IpAddr),
    /// Any address of a block. To be asked only of blocks that [`super::Mentions`] lists, less those in them that it lists too:
    /// for the addresses that are left the outcome is the same.
    Block(Block),
}

/// A rule of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ref {
    /// Place of the policy among those that were evaluated, from 0.
    pub policy: usize,
    /// Place of the rule in the policy, from 0.
    pub rule: usize,
}

/// The outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The connection may be. `by: None`: since there is no ALLOW policy.
    Allow {
        /// The rule that lets it in.
        by: Option<Ref>,
    },
    /// It may not. `by: None`: since there are ALLOW policies, and none matches.
    Deny {
        /// The rule that refuses it.
        by: Option<Ref>,
    },
}

impl Decision {
    /// Whether the connection may be.
    pub const fn allows(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }
}

/// What `policies`, which are those that apply to the workload, say of `attempt`. A DENY that matches wins; then, where there is
/// an ALLOW, one must match. Policies of a dry run do not count at all.
pub fn evaluate<'p>(policies: impl Iterator<Item = &'p Policy>, attempt: &Attempt<'_>) -> Decision {
    decide(policies.enumerate().filter(|(_, policy)| !policy.dry_run), attempt)
}

/// What they would say if those of a dry run were in force as well.
pub fn rehearse<'p>(policies: impl Iterator<Item = &'p Policy>, attempt: &Attempt<'_>) -> Decision {
    decide(policies.enumerate(), attempt)
}

fn decide<'p>(policies: impl Iterator<Item = (usize, &'p Policy)>, attempt: &Attempt<'_>) -> Decision {
    let mut restricted = false;
    let mut allowed = None;
    for (policy, content) in policies {
        let matching = || content.rules.iter().position(|rule| rule.matches(attempt));
        match content.action {
            Action::Deny => {
                if let Some(rule) = matching() {
                    return Decision::Deny { by: Some(Ref { policy, rule }) };
                }
            }
            Action::Allow => {
                restricted = true;
                allowed = allowed.or_else(|| matching().map(|rule| Ref { policy, rule }));
            }
        }
    }
    if restricted && allowed.is_none() {
        Decision::Deny { by: None }
    } else {
        Decision::Allow { by: allowed }
    }
}

impl Rule {
    fn matches(&self, attempt: &Attempt<'_>) -> bool {
        self.clauses.iter().all(|clause| clause.matches(attempt))
    }
}

impl Clause {
    fn matches(&self, attempt: &Attempt<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| one.matches(attempt))
    }
}

impl Match {
    fn matches(&self, attempt: &Attempt<'_>) -> bool {
        // The cheap ones first: most attempts fail one of them.
        !self.is_empty()
            && holds(&self.destination_ports, &self.not_destination_ports, |port| *port == attempt.port)
            && holds(&self.source_ips, &self.not_source_ips, |block| attempt.source_ip.is_in(block))
            && holds(&self.destination_ips, &self.not_destination_ips, |block| {
                block.contains(attempt.destination_ip)
            })
            && holds(&self.namespaces, &self.not_namespaces, |text| {
                attempt.source.is_some_and(|source| text.matches(&[source.namespace]))
            })
            && holds(&self.service_accounts, &self.not_service_accounts, |account| {
                attempt.source.is_some_and(|source| account.matches(&source))
            })
            && holds(&self.principals, &self.not_principals, |text| {
                attempt.source.is_some_and(|source| text.matches(&source.parts()))
            })
    }
}

/// Whether one of the values is met, where there are any, and none of the others.
fn holds<T>(values: &[T], not: &[T], met: impl Fn(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&met)) && !not.iter().any(&met)
}

impl SourceIp {
    fn is_in(&self, block: &Block) -> bool {
        match self {
            Self::One(address) => block.contains(*address),
            Self::Block(all) => block.covers(all),
        }
    }
}

impl<'a> Principal<'a> {
    /// The id without its scheme, which policies do not write, in pieces.
    fn parts(&self) -> [&'a str; 5] {
        [self.trust_domain, "/ns/", self.namespace, "/sa/", self.service_account]
    }
}

impl Account {
    fn matches(&self, source: &Principal<'_>) -> bool {
        *self.namespace == *source.namespace && *self.name == *source.service_account
    }
}

impl Text {
    /// Compares with a text that lies in pieces, so that none has to be put together for each connection.
    fn matches(&self, pieces: &[&str]) -> bool {
        let bytes = || pieces.iter().flat_map(|piece| piece.bytes());
        match self {
            Self::Exact(text) => bytes().eq(text.bytes()),
            Self::Prefix(text) => starts_with(bytes(), text.bytes()),
            Self::Suffix(text) => starts_with(bytes().rev(), text.bytes().rev()),
            Self::Present => pieces.iter().any(|piece| !piece.is_empty()),
        }
    }
}

fn starts_with(mut all: impl Iterator<Item = u8>, mut start: impl Iterator<Item = u8>) -> bool {
    start.all(|byte| all.next() == Some(byte))
}

#[cfg(test)]
mod tests;
