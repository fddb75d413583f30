//! AuthorizationPolicy as agents enforce it.
//!
//! A rule becomes clauses, all of which must hold: one for `to`, one for `from`, one for each `when`. HTTP fields are not
//! judged: with ALLOW their rule is left out, with DENY they count as met. A match that only had such is then met by all,
//! and so is its clause, which must be left out: on the wire a match without fields is one that nothing meets.

use std::{net::IpAddr, sync::Arc};

use mesh_common::api::istio::security::{
    self as api, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};

use super::{
    Index, Policy,
    inputs::swap,
    selection::{Chooser, EVERYWHERE},
    service::octets,
};
use crate::manifest::{
    self, Account, Action, AuthorizationPolicy, Block, Labels, NsName, Operation, Pattern, Port, Source, Test,
};

impl Index {
    pub(super) fn take_authorization(&mut self, name: NsName, policy: Option<&Arc<AuthorizationPolicy>>) {
        let before = swap(&mut self.inputs.authorizations, &name, policy.cloned());
        let selector = |policy: Option<&Arc<AuthorizationPolicy>>| policy.and_then(|p| p.selector().cloned());
        let (was, is) = (selector(before.as_ref()), selector(policy));
        if was != is {
            let chooser = Chooser::Authorization(name.clone());
            let root = *name.namespace == *self.mesh.root_namespace;
            let within = if root { EVERYWHERE.into() } else { Arc::clone(&name.namespace) };
            self.choose(&chooser, &within, is.as_ref());
        }
        self.policies.push(Policy::Authorization(name));
    }

    /// Files a selector, and marks whom it chose and whom it chooses.
    pub(super) fn choose(&mut self, chooser: &Chooser, within: &Arc<str>, selector: Option<&Labels>) {
        let nothing = Labels::new();
        self.mark_chosen_by(chooser);
        self.inputs.selection.set_selector(chooser, within, selector.unwrap_or(&nothing));
        self.mark_chosen_by(chooser);
    }

    pub(super) fn mark_chosen_by(&mut self, chooser: &Chooser) {
        self.inputs.selection.chosen(chooser).into_iter().for_each(|origin| self.workloads.push(origin));
    }

    pub(super) fn authorization(&self, name: &NsName) -> Option<Authorization> {
        let policy = self.inputs.authorizations.get(name)?;
        let scope = if policy.selector().is_some() {
            Scope::WorkloadSelector
        } else if *name.namespace == *self.mesh.root_namespace {
            Scope::Global
        } else {
            Scope::Namespace
        };
        Some(convert(policy, scope))
    }
}

/// The policy with the scope that its place gives it.
fn convert(policy: &AuthorizationPolicy, scope: Scope) -> Authorization {
    let (rules, namespace) = (&policy.spec.rules, &policy.metadata.namespace);
    let (action, rules) = match policy.spec.action {
        Action::Allow => {
            let judged = rules.iter().filter(|rule| rule.http().is_empty());
            (api::Action::Allow, judged.map(|rule| convert_rule(rule, namespace)).collect())
        }
        // The last two are refused where manifests are read.
        Action::Deny | Action::Audit | Action::Custom => {
            (api::Action::Deny, rules.iter().map(|rule| convert_rule(rule, namespace)).collect())
        }
    };
    Authorization {
        name: policy.metadata.name.clone(),
        namespace: namespace.clone(),
        scope: scope.into(),
        action: action.into(),
        rules,
        dry_run: policy.is_dry_run(),
        http: policy.spec.rules.iter().any(|rule| !rule.http().is_empty()),
    }
}

fn convert_rule(rule: &manifest::Rule, namespace: &str) -> Rule {
    let to = rule.operations().map(operation).collect();
    let from = rule.sources().map(|source| self::source(source, namespace)).collect();
    let when = rule.when.iter().map(|condition| vec![test(&condition.test)]);
    Rule { clauses: [to, from].into_iter().chain(when).filter_map(clause).collect() }
}

/// One of the matches must hold; `None` when that is always so.
fn clause(matches: Vec<Match>) -> Option<Clause> {
    let always = matches.is_empty() || matches.contains(&Match::default());
    (!always).then_some(Clause { matches })
}

fn operation(operation: &Operation) -> Match {
    Match {
        destination_ports: ports(&operation.ports),
        not_destination_ports: ports(&operation.not_ports),
        ..Match::default()
    }
}

fn source(source: &Source, namespace: &str) -> Match {
    Match {
        principals: texts(&source.principals),
        not_principals: texts(&source.not_principals),
        namespaces: texts(&source.namespaces),
        not_namespaces: texts(&source.not_namespaces),
        source_ips: blocks(&source.ip_blocks),
        not_source_ips: blocks(&source.not_ip_blocks),
        service_accounts: accounts(&source.service_accounts, namespace),
        not_service_accounts: accounts(&source.not_service_accounts, namespace),
        ..Match::default()
    }
}

fn test(test: &Test) -> Match {
    let nothing = Match::default();
    match test {
        Test::SourceIp(yes, no) => Match { source_ips: blocks(yes), not_source_ips: blocks(no), ..nothing },
        Test::SourceNamespace(yes, no) => {
            Match { namespaces: texts(yes), not_namespaces: texts(no), ..nothing }
        }
        Test::SourcePrincipal(yes, no) => {
            Match { principals: texts(yes), not_principals: texts(no), ..nothing }
        }
        Test::DestinationIp(yes, no) => {
            Match { destination_ips: blocks(yes), not_destination_ips: blocks(no), ..nothing }
        }
        Test::DestinationPort(yes, no) => {
            Match { destination_ports: ports(yes), not_destination_ports: ports(no), ..nothing }
        }
        Test::Http => nothing,
    }
}

fn ports(ports: &[Port]) -> Vec<u32> {
    ports.iter().map(|Port(port)| u32::from(*port)).collect()
}

fn blocks(blocks: &[Block]) -> Vec<api::Address> {
    let block = |Block { address, length }: &Block| api::Address {
        address: octets(IpAddr::clone(address)),
        length: u32::from(*length),
    };
    blocks.iter().map(block).collect()
}

fn texts(patterns: &[Pattern]) -> Vec<StringMatch> {
    let kind = |pattern: &Pattern| match pattern {
        Pattern::Exact(text) => MatchType::Exact(text.clone()),
        Pattern::Prefix(text) => MatchType::Prefix(text.clone()),
        Pattern::Suffix(text) => MatchType::Suffix(text.clone()),
        Pattern::Presence => MatchType::Presence(()),
    };
    patterns.iter().map(|pattern| StringMatch { match_type: Some(kind(pattern)) }).collect()
}

fn accounts(accounts: &[Account], own: &str) -> Vec<ServiceAccountMatch> {
    let account = |account: &Account| ServiceAccountMatch {
        namespace: account.namespace.as_deref().unwrap_or(own).to_owned(),
        service_account: account.name.clone(),
    };
    accounts.iter().map(account).collect()
}

#[cfg(test)]
mod tests;
