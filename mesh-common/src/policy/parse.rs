//! From the wire into the model.

use std::fmt;
use std::net::IpAddr;

use super::{Account, Action, Block, Clause, Match, Policy, Rule, Scope, Text};
use crate::api::istio::security as wire;
use crate::api::istio::security::string_match::MatchType;

/// Longest name or pattern: a SPIFFE id may have so many bytes.
const TEXT_LIMIT: usize = 2048;
/// Verdicts in the kernel name rules by 16 bits.
const RULE_LIMIT: usize = 1 << 16;

/// Why a policy is not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// Which field.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

impl std::error::Error for Invalid {}

impl Invalid {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

impl TryFrom<i32> for Scope {
    type Error = Invalid;

    fn try_from(number: i32) -> Result<Self, Invalid> {
        let unknown = |_error| Invalid::new("scope", format!("unknown value {number}"));
        Ok(match wire::Scope::try_from(number).map_err(unknown)? {
            wire::Scope::Global => Self::Global,
            wire::Scope::Namespace => Self::Namespace,
            wire::Scope::WorkloadSelector => Self::Selector,
        })
    }
}

impl TryFrom<&wire::Authorization> for Policy {
    type Error = Invalid;

    fn try_from(message: &wire::Authorization) -> Result<Self, Invalid> {
        let unknown = |_error| Invalid::new("action", format!("unknown value {}", message.action));
        let action = match wire::Action::try_from(message.action).map_err(unknown)? {
            wire::Action::Allow => Action::Allow,
            wire::Action::Deny => Action::Deny,
        };
        if message.rules.len() > RULE_LIMIT {
            return Err(Invalid::new(
                "rules",
                format!("{}, at most {RULE_LIMIT} can be", message.rules.len()),
            ));
        }
        Ok(Self {
            namespace: segment("namespace", &message.namespace)?,
            name: segment("name", &message.name)?,
            scope: Scope::try_from(message.scope)?,
            action,
            dry_run: message.dry_run,
            http: message.http,
            rules: each("rules", &message.rules, rule)?,
        })
    }
}

fn rule(field: &str, message: &wire::Rule) -> Result<Rule, Invalid> {
    Ok(Rule { clauses: each(&format!("{field}.clauses"), &message.clauses, clause)? })
}

fn clause(field: &str, message: &wire::Clause) -> Result<Clause, Invalid> {
    Ok(Clause { matches: each(&format!("{field}.matches"), &message.matches, one_match)? })
}

fn one_match(field: &str, message: &wire::Match) -> Result<Match, Invalid> {
    let texts = |name: &str, list: &[wire::StringMatch]| each(&format!("{field}.{name}"), list, text);
    let blocks = |name: &str, list: &[wire::Address]| each(&format!("{field}.{name}"), list, block);
    let ports = |name: &str, list: &[u32]| each(&format!("{field}.{name}"), list, port);
    let accounts =
        |name: &str, list: &[wire::ServiceAccountMatch]| each(&format!("{field}.{name}"), list, account);
    Ok(Match {
        namespaces: texts("namespaces", &message.namespaces)?,
        not_namespaces: texts("not_namespaces", &message.not_namespaces)?,
        principals: texts("principals", &message.principals)?,
        not_principals: texts("not_principals", &message.not_principals)?,
        source_ips: blocks("source_ips", &message.source_ips)?,
        not_source_ips: blocks("not_source_ips", &message.not_source_ips)?,
        destination_ips: blocks("destination_ips", &message.destination_ips)?,
        not_destination_ips: blocks("not_destination_ips", &message.not_destination_ips)?,
        destination_ports: ports("destination_ports", &message.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &message.not_destination_ports)?,
        service_accounts: accounts("service_accounts", &message.service_accounts)?,
        not_service_accounts: accounts("not_service_accounts", &message.not_service_accounts)?,
    })
}

fn each<M, T>(
    field: &str,
    list: &[M],
    read: impl Fn(&str, &M) -> Result<T, Invalid>,
) -> Result<Box<[T]>, Invalid> {
    list.iter().enumerate().map(|(at, message)| read(&format!("{field}[{at}]"), message)).collect()
}

fn text(field: &str, message: &wire::StringMatch) -> Result<Text, Invalid> {
    let kind = message.match_type.as_ref();
    match kind.ok_or_else(|| Invalid::new(field, "of no known kind"))? {
        MatchType::Exact(text) => Ok(Text::Exact(bounded(field, text)?)),
        MatchType::Prefix(text) => Ok(Text::Prefix(bounded(field, text)?)),
        MatchType::Suffix(text) => Ok(Text::Suffix(bounded(field, text)?)),
        MatchType::Presence(_) => Ok(Text::Present),
    }
}

fn block(field: &str, message: &wire::Address) -> Result<Block, Invalid> {
    let bytes = message.address.as_slice();
    let address: IpAddr = if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        v4.into()
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        v6.into()
    } else {
        return Err(Invalid::new(
            format!("{field}.address"),
            format!("{} bytes are no address (4 or 16)", bytes.len()),
        ));
    };
    u8::try_from(message.length).ok().and_then(|length| Block::new(address, length)).ok_or_else(|| {
        Invalid::new(format!("{field}.length"), format!("{address} has no {} bits", message.length))
    })
}

fn port(field: &str, number: &u32) -> Result<u16, Invalid> {
    match u16::try_from(*number) {
        Ok(port) if port > 0 => Ok(port),
        Ok(_) | Err(_) => Err(Invalid::new(field, format!("{number} is not a port (1 to 65535)"))),
    }
}

fn account(field: &str, message: &wire::ServiceAccountMatch) -> Result<Account, Invalid> {
    Ok(Account {
        namespace: bounded(&format!("{field}.namespace"), &message.namespace)?,
        name: bounded(&format!("{field}.service_account"), &message.service_account)?,
    })
}

/// A part of the policy's own name, which is `NAMESPACE/NAME`.
fn segment(field: &str, text: &str) -> Result<Box<str>, Invalid> {
    if text.contains('/') {
        return Err(Invalid::new(field, "holds a slash"));
    }
    bounded(field, text)
}

fn bounded(field: &str, text: &str) -> Result<Box<str>, Invalid> {
    if text.is_empty() {
        return Err(Invalid::new(field, "empty"));
    }
    if text.len() > TEXT_LIMIT {
        return Err(Invalid::new(field, format!("{} bytes long, the limit is {TEXT_LIMIT}", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(Invalid::new(field, "holds control characters"));
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests;
