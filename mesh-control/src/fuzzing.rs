//! For fuzz targets: parsers of what callers send, which nothing outside this crate needs.

mod agent;

use std::time::{Duration, UNIX_EPOCH};

pub use agent::agent_requests;

use crate::auth::{JoinTokens, TokenKeys, TokenRules, claimed};
use crate::ca::{key_of, public_key};

/// A certificate request, in PEM and without.
pub fn certificate_request(bytes: &[u8]) {
    let plain = key_of(bytes);
    assert!(plain.is_err() || !bytes.is_empty());
    if let Ok(text) = str::from_utf8(bytes) {
        // What is refused says why, and never with what was sent.
        if let Err(reason) = public_key(text) {
            assert!(reason.to_string().starts_with("csr: "), "{reason}");
        }
    }
}

/// A file of join tokens.
pub fn join_tokens(text: &str) {
    match JoinTokens::parse(text) {
        Ok(tokens) => assert!(tokens.len() <= text.lines().count()),
        Err(error) => assert!(error.to_string().starts_with("line ")),
    }
}

/// A set of keys, and a token that one of them might have signed.
pub fn token(keys: &str, token: &str) {
    let Ok(keys) = TokenKeys::parse(keys) else { return };
    let judged = crate::auth::judge_token(token, &rules(), &keys, UNIX_EPOCH);
    assert!(judged.is_err(), "nobody has signed that");
}

/// What a token claims, once its signature was found good.
pub fn claims(json: &[u8]) {
    let Some(judged) = claimed(json, &rules(), UNIX_EPOCH + Duration::from_secs(1 << 31)) else { return };
    if let Ok(accepted) = judged {
        assert!(crate::identity::is_name(&accepted.node), "{accepted:?}: no name of a node");
    }
}

fn rules() -> TokenRules {
    TokenRules { issuer: "i".to_owned(), audience: "a".to_owned(), service_accounts: vec!["n/s".to_owned()] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_targets_do_holds_for_good_input() {
        let key = rcgen::KeyPair::generate().unwrap();
        let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        certificate_request(request.der());
        certificate_request(request.pem().unwrap().as_bytes());
        join_tokens("node-a aaaaaaaaaaaaaaaa\n* bbbbbbbbbbbbbbbb # any\n");
        let good = r#"{"iss":"i","aud":["a"],"sub":"system:serviceaccount:n:s","exp":3e9,"kubernetes.io":{"node":{"name":"x"}}}"#;
        let judged = claimed(good.as_bytes(), &rules(), UNIX_EPOCH + Duration::from_secs(1 << 31));
        assert_eq!(judged.unwrap().unwrap().node, "x");
        claims(good.as_bytes());
    }
}
