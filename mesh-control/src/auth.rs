//! Who calls: by the certificate of a node, by a join token, or by a JWT. Pure: time is an argument.

mod join;
mod token;

use std::{sync::Arc, time::SystemTime};

use rustls::pki_types::CertificateDer;
use tonic::{Request, Status};

pub(crate) use join::JoinTokens;
pub(crate) use token::{TokenKeys, TokenRules};
#[cfg(any(test, fuzzing))]
pub(crate) use token::{claimed, judge as judge_token};

use crate::{
    ca::{NotTrusted, Trust},
    connections::Peer,
    identity::{Identity, is_name},
};

/// What a caller shows.
#[derive(Clone, Default)]
pub(crate) struct Credentials {
    certificates: Option<Arc<Vec<CertificateDer<'static>>>>,
    bearer: Option<String>,
    /// The header `mesh-node`.
    node: Option<String>,
}

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The node it stands for; unknown with a token for any node and without a name.
    pub(crate) node: Option<String>,
    /// When what it shows expires; a join token never does.
    pub(crate) until: Option<Expiry>,
}

/// The end of a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expiry {
    pub(crate) at: SystemTime,
    /// How the caller is refused from then on.
    pub(crate) refusal: Refusal,
}

/// Why a caller is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("neither a certificate of a node nor a bearer token is shown")]
    Anonymous,
    #[error("certificate: {0}")]
    Certificate(String),
    #[error("certificate: the list that would say whether it is revoked has lapsed")]
    Lapsed,
    #[error("token: neither a known join token nor a JWT that is accepted: {0}")]
    Token(#[from] token::BadToken),
    #[error("token is of node {bound}, not of {claimed}")]
    OtherNode { bound: String, claimed: String },
    #[error("header mesh-node: {0:?} is no name of a node")]
    NodeName(String),
}

impl Refusal {
    /// As it is counted.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Certificate(_) => "certificate",
            Self::Lapsed => "revocation_list",
            Self::Token(bad) => bad.reason(),
            Self::OtherNode { .. } => "other_node",
            Self::NodeName(_) => "node_name",
        }
    }
}

/// What callers are judged by.
pub(crate) struct Rules<'a> {
    pub(crate) trust: &'a Trust,
    pub(crate) trust_domain: &'a str,
    pub(crate) joins: &'a JoinTokens,
    pub(crate) tokens: Option<(&'a TokenRules, &'a TokenKeys)>,
}

impl Credentials {
    /// What came with a request.
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        let text = |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok());
        let bearer = text("authorization").and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
        });
        Self {
            certificates: Peer::of(request).and_then(|peer| peer.certificates.clone()),
            bearer,
            node: text("mesh-node").map(str::to_owned),
        }
    }

    /// Decides who the caller is.
    pub(crate) fn judge(&self, rules: &Rules<'_>, now: SystemTime) -> Result<Caller, Refusal> {
        let caller = self.caller(rules, now)?;
        match (&caller.node, &self.node) {
            (Some(bound), Some(claimed)) if bound != claimed => {
                Err(Refusal::OtherNode { bound: bound.clone(), claimed: claimed.clone() })
            }
            (Some(_) | None, Some(_) | None) => Ok(caller),
        }
    }

    fn caller(&self, rules: &Rules<'_>, now: SystemTime) -> Result<Caller, Refusal> {
        let mut listed = None;
        if let Some(certificates) = &self.certificates {
            let verified = rules.trust.verify(certificates, now)?;
            listed = verified.listed_until.map(|at| Expiry { at, refusal: Refusal::Lapsed });
            match (verified.identity, &self.bearer) {
                (Identity::Node { trust_domain, name }, _) if trust_domain == rules.trust_domain => {
                    let refusal = Refusal::Certificate("it has expired".to_owned());
                    let until = Expiry { at: verified.not_after, refusal };
                    return Ok(Caller { node: Some(name), until: first(listed, Some(until)) });
                }
                // A workload's certificate says nothing about the node; a token may.
                (_, Some(_)) => {}
                (other, None) => {
                    let reason = format!("{other} is no node of trust domain {}", rules.trust_domain);
                    return Err(Refusal::Certificate(reason));
                }
            }
        }
        let token = self.bearer.as_deref().ok_or(Refusal::Anonymous)?;
        match rules.joins.node_of(token) {
            Some(join::Node::One(node)) => Ok(Caller { node: Some(node.to_owned()), until: listed }),
            Some(join::Node::Any) => match &self.node {
                Some(name) if !is_name(name) => Err(Refusal::NodeName(name.chars().take(64).collect())),
                named => Ok(Caller { node: named.clone(), until: listed }),
            },
            None => {
                let (token_rules, keys) = rules.tokens.ok_or(token::BadToken::Unknown)?;
                let accepted = token::judge(token, token_rules, keys, now)?;
                let until = Expiry { at: accepted.until, refusal: token::BadToken::Expired.into() };
                Ok(Caller { node: Some(accepted.node), until: first(listed, Some(until)) })
            }
        }
    }
}

/// Whichever comes first.
fn first(one: Option<Expiry>, other: Option<Expiry>) -> Option<Expiry> {
    one.into_iter().chain(other).min_by_key(|expiry| expiry.at)
}

impl From<NotTrusted> for Refusal {
    fn from(reason: NotTrusted) -> Self {
        match reason {
            NotTrusted::Lapsed => Self::Lapsed,
            NotTrusted::Other(reason) => Self::Certificate(reason),
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::unauthenticated(refusal.to_string())
    }
}
