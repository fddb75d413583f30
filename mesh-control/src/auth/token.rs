//! JWTs, as Kubernetes gives service accounts. Pure: time is an argument.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    jwk::{AlgorithmParameters, JwkSet},
};
use serde::Deserialize;

use crate::identity::is_name;

/// How far clocks may be apart.
const LEEWAY: Duration = Duration::from_secs(10);
/// Longer tokens are not looked at.
const MAX_LENGTH: usize = 16 << 10;
/// Only signatures by a key that nobody else holds: a public key is no secret to make an HMAC with.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::EdDSA,
];

/// Whose tokens are accepted.
#[derive(Clone, Debug)]
pub(crate) struct TokenRules {
    pub(crate) issuer: String,
    pub(crate) audience: String,
    /// `NAMESPACE/NAME`
    pub(crate) service_accounts: Vec<String>,
}

/// Keys of the issuer.
pub(crate) struct TokenKeys(Vec<(String, Option<String>, DecodingKey)>);

/// Why a token is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadToken {
    #[error("no such join token, and no JWTs are accepted here")]
    Unknown,
    #[error("is no JWT")]
    Malformed,
    #[error("its algorithm is not accepted")]
    Algorithm,
    #[error("its key is not known")]
    Key,
    #[error("its signature is wrong")]
    Signature,
    #[error("is of another issuer")]
    Issuer,
    #[error("is for another audience")]
    Audience,
    #[error("has expired")]
    Expired,
    #[error("is not valid yet")]
    NotYet,
    #[error("is of a service account that may not join")]
    ServiceAccount,
    #[error("names no node")]
    NoNode,
}

impl BadToken {
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Unknown => "token_unknown",
            Self::Malformed => "token_malformed",
            Self::Algorithm => "token_algorithm",
            Self::Key => "token_key",
            Self::Signature => "token_signature",
            Self::Issuer => "token_issuer",
            Self::Audience => "token_audience",
            Self::Expired => "token_expired",
            Self::NotYet => "token_not_yet",
            Self::ServiceAccount => "token_service_account",
            Self::NoNode => "token_no_node",
        }
    }
}

#[derive(Debug, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Audience,
    exp: f64,
    #[serde(default)]
    nbf: f64,
    #[serde(rename = "kubernetes.io", default)]
    kubernetes: Kubernetes,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
struct Kubernetes {
    node: Option<NodeClaim>,
}

#[derive(Debug, Deserialize)]
struct NodeClaim {
    name: String,
}

impl TokenKeys {
    /// Reads a JWKS; symmetric keys and keys without a name are of no use.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let set: JwkSet = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut keys = Vec::new();
        for key in &set.keys {
            let Some(name) = key.common.key_id.clone() else { continue };
            if matches!(key.algorithm, AlgorithmParameters::OctetKey(_)) {
                continue;
            }
            let decoding = DecodingKey::from_jwk(key).map_err(|error| format!("key {name}: {error}"))?;
            keys.push((name, key.common.key_algorithm.map(|algorithm| algorithm.to_string()), decoding));
        }
        if keys.is_empty() { Err("holds no public key with a kid".to_owned()) } else { Ok(Self(keys)) }
    }
}

/// What a token is good for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// The node that it is bound to.
    pub(crate) node: String,
    /// When it is no longer accepted; none: later than can be told.
    pub(crate) until: SystemTime,
}

/// Whether a token is accepted, and what for.
pub(crate) fn judge(
    token: &str,
    rules: &TokenRules,
    keys: &TokenKeys,
    now: SystemTime,
) -> Result<Accepted, BadToken> {
    accept(verify(token, keys)?, rules, now)
}

/// Verifies the signature and nothing else.
fn verify(token: &str, keys: &TokenKeys) -> Result<Claims, BadToken> {
    if token.len() > MAX_LENGTH || token.split('.').count() != 3 {
        return Err(BadToken::Malformed);
    }
    // An algorithm that is not known, `none` among them, makes the header unreadable.
    let header = decode_header(token).map_err(|_unreadable| BadToken::Algorithm)?;
    if !ALGORITHMS.contains(&header.alg) {
        return Err(BadToken::Algorithm);
    }
    let named = keys.0.iter().find(|(name, ..)| Some(name) == header.kid.as_ref());
    let (_, only, key) = named.ok_or(BadToken::Key)?;
    if only.as_ref().is_some_and(|only| *only != format!("{:?}", header.alg))
        || key.family() != header.alg.family()
    {
        return Err(BadToken::Algorithm);
    }
    let mut validation = Validation::new(header.alg);
    // Claims are judged below, by a clock that is an argument.
    validation.required_spec_claims.clear();
    (validation.validate_exp, validation.validate_aud) = (false, false);
    let decoded = decode::<Claims>(token, key, &validation);
    decoded.map(|data| data.claims).map_err(|error| {
        // Claims are read only after the signature was found good.
        let unreadable = matches!(error.kind(), jsonwebtoken::errors::ErrorKind::Json(_));
        if unreadable { BadToken::Malformed } else { BadToken::Signature }
    })
}

/// What would be made of such claims under a good signature; none: they cannot be read.
#[cfg(any(test, fuzzing))]
pub(crate) fn claimed(
    json: &[u8],
    rules: &TokenRules,
    now: SystemTime,
) -> Option<Result<Accepted, BadToken>> {
    serde_json::from_slice(json).ok().map(|claims| accept(claims, rules, now))
}

fn accept(claims: Claims, rules: &TokenRules, now: SystemTime) -> Result<Accepted, BadToken> {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let leeway = LEEWAY.as_secs_f64();
    if claims.iss != rules.issuer {
        return Err(BadToken::Issuer);
    }
    let for_us = match &claims.aud {
        Audience::One(audience) => *audience == rules.audience,
        Audience::Many(audiences) => audiences.contains(&rules.audience),
    };
    if !for_us {
        return Err(BadToken::Audience);
    }
    if seconds >= claims.exp + leeway {
        return Err(BadToken::Expired);
    }
    if seconds + leeway < claims.nbf {
        return Err(BadToken::NotYet);
    }
    let account = claims.sub.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let account = account.map(|(namespace, name)| format!("{namespace}/{name}"));
    if !account.is_some_and(|account| rules.service_accounts.contains(&account)) {
        return Err(BadToken::ServiceAccount);
    }
    let node = claims.kubernetes.node.map(|node| node.name);
    let node = node.filter(|name| is_name(name)).ok_or(BadToken::NoNode)?;
    // One that no clock can tell would never end.
    let end = Duration::try_from_secs_f64(claims.exp + leeway).map_err(|_beyond| BadToken::Malformed)?;
    let until = UNIX_EPOCH.checked_add(end).ok_or(BadToken::Malformed)?;
    Ok(Accepted { node, until })
}

#[cfg(test)]
mod tests;
