use jsonwebtoken::{EncodingKey, Header, encode};
use rcgen::{KeyPair, PublicKeyData as _};
use serde_json::{Value, json};

use super::*;

const NOW: u64 = 2_000_000_000;

struct Issuer {
    key: KeyPair,
    keys: TokenKeys,
}

fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        (0..=chunk.len()).for_each(|i| out.push(char::from(ALPHABET[(word >> (18 - 6 * i) & 63) as usize])));
    }
    out
}

fn issuer() -> Issuer {
    let key = KeyPair::generate().unwrap();
    let point = key.der_bytes();
    let (x, y) = (base64url(&point[1..33]), base64url(&point[33..]));
    let secret = base64url(point);
    let set = json!({"keys": [
        {"kty": "EC", "crv": "P-256", "kid": "k1", "alg": "ES256", "use": "sig", "x": x, "y": y},
        {"kty": "oct", "kid": "shared", "k": secret},
    ]});
    Issuer { key, keys: TokenKeys::parse(&set.to_string()).unwrap() }
}

fn rules() -> TokenRules {
    TokenRules {
        issuer: "https://issuer".into(),
        audience: "istio-ca".into(),
        service_accounts: vec!["mesh-system/mesh-agent".into()],
    }
}

fn claims() -> Value {
    json!({
        "iss": "https://issuer", "aud": ["istio-ca"], "exp": NOW + 3600, "nbf": NOW - 60, "iat": NOW - 60,
        "sub": "system:serviceaccount:mesh-system:mesh-agent",
        "kubernetes.io": {"namespace": "mesh-system", "node": {"name": "node-a", "uid": "u"}},
    })
}

fn header(algorithm: Algorithm, kid: &str) -> Header {
    Header { kid: Some(kid.to_owned()), ..Header::new(algorithm) }
}

impl Issuer {
    fn sign(&self, claims: &Value) -> String {
        let key = EncodingKey::from_ec_der(self.key.serialized_der());
        encode(&header(Algorithm::ES256, "k1"), claims, &key).unwrap()
    }

    fn judge(&self, token: &str) -> Result<Accepted, BadToken> {
        judge(token, &rules(), &self.keys, UNIX_EPOCH + Duration::from_secs(NOW))
    }

    fn node(&self, token: &str) -> Result<String, BadToken> {
        self.judge(token).map(|accepted| accepted.node)
    }
}

#[test]
fn a_token_of_a_pod_on_a_node_is_accepted() {
    let issuer = issuer();
    assert_eq!(issuer.node(&issuer.sign(&claims())), Ok("node-a".to_owned()));
    let mut one = claims();
    one["aud"] = json!("istio-ca");
    one.as_object_mut().unwrap().remove("nbf");
    assert_eq!(issuer.node(&issuer.sign(&one)), Ok("node-a".to_owned()));
}

#[test]
fn a_token_is_good_until_it_expires_and_clocks_may_be_apart() {
    let issuer = issuer();
    let until = |exp: Value| {
        let mut claims = claims();
        claims["exp"] = exp;
        let accepted = issuer.judge(&issuer.sign(&claims)).ok()?;
        Some(accepted.until.duration_since(UNIX_EPOCH).unwrap())
    };
    assert_eq!(until(json!(NOW + 60)), Some(Duration::from_secs(NOW + 70)));
    assert_eq!(until(json!(NOW as f64 - 4.5)), Some(Duration::from_secs_f64(NOW as f64 + 5.5)));
    assert_eq!(until(json!(1e300)), None, "it would never end");
}

#[test]
fn claims_that_do_not_fit_are_refused_each_for_its_reason() {
    let issuer = issuer();
    for (claim, value, expected) in [
        ("iss", json!("https://other"), BadToken::Issuer),
        ("iss", json!(["https://issuer"]), BadToken::Malformed),
        ("aud", json!(["api"]), BadToken::Audience),
        ("aud", json!([]), BadToken::Audience),
        ("aud", json!("istio-ca2"), BadToken::Audience),
        ("aud", Value::Null, BadToken::Malformed),
        ("exp", json!(NOW - 11), BadToken::Expired),
        ("exp", json!(-1), BadToken::Expired),
        ("exp", json!("never"), BadToken::Malformed),
        ("exp", Value::Null, BadToken::Malformed),
        ("nbf", json!(NOW + 11), BadToken::NotYet),
        ("sub", json!("system:serviceaccount:mesh-system:other"), BadToken::ServiceAccount),
        ("sub", json!("system:serviceaccount:other:mesh-agent"), BadToken::ServiceAccount),
        ("sub", json!("mesh-system:mesh-agent"), BadToken::ServiceAccount),
        ("sub", json!("system:serviceaccount:mesh-system/mesh-agent"), BadToken::ServiceAccount),
        ("kubernetes.io", json!({}), BadToken::NoNode),
        ("kubernetes.io", json!({"node": {"name": ""}}), BadToken::NoNode),
        ("kubernetes.io", json!({"node": {"name": "a/b"}}), BadToken::NoNode),
    ] {
        let mut changed = claims();
        changed[claim] = value.clone();
        assert_eq!(issuer.node(&issuer.sign(&changed)), Err(expected), "{claim}: {value}");
    }
    // Clocks may be a little apart.
    let mut early = claims();
    (early["exp"], early["nbf"]) = (json!(NOW - 5), json!(NOW + 5));
    assert!(issuer.node(&issuer.sign(&early)).is_ok());
}

#[test]
fn signatures_that_are_none_are_refused() {
    let (ours, other) = (issuer(), issuer());
    assert_eq!(ours.node(&other.sign(&claims())), Err(BadToken::Signature));
    let good = ours.sign(&claims());
    let (head, rest) = good.split_once('.').unwrap();
    let (body, signature) = rest.split_once('.').unwrap();
    let mut forged = claims();
    forged["kubernetes.io"]["node"]["name"] = json!("node-b");
    let forged = base64url(forged.to_string().as_bytes());
    assert_eq!(ours.node(&format!("{head}.{forged}.{signature}")), Err(BadToken::Signature));
    assert_eq!(ours.node(&format!("{head}.{body}.")), Err(BadToken::Signature));
    for alg in ["none", "None", "NONE", "ES256K", ""] {
        let head = base64url(json!({"alg": alg, "typ": "JWT", "kid": "k1"}).to_string().as_bytes());
        assert_eq!(ours.node(&format!("{head}.{body}.")), Err(BadToken::Algorithm), "{alg}");
    }
    // The public key is known to everybody, and is no secret to sign with.
    let secret = EncodingKey::from_secret(ours.key.der_bytes());
    for kid in ["k1", "shared"] {
        let token = encode(&header(Algorithm::HS256, kid), &claims(), &secret).unwrap();
        assert_eq!(ours.node(&token), Err(BadToken::Algorithm), "{kid}");
    }
    let key = EncodingKey::from_ec_der(ours.key.serialized_der());
    let unnamed = encode(&Header::new(Algorithm::ES256), &claims(), &key).unwrap();
    assert_eq!(ours.node(&unnamed), Err(BadToken::Key));
    for kid in ["k2", "shared"] {
        let token = encode(&header(Algorithm::ES256, kid), &claims(), &key).unwrap();
        assert_eq!(ours.node(&token), Err(BadToken::Key), "{kid}");
    }
    for text in ["", "a", "a.b", "a.b.c.d", &"x".repeat(MAX_LENGTH + 1)] {
        assert_eq!(ours.node(text), Err(BadToken::Malformed));
    }
}

#[test]
fn a_set_without_a_usable_key_is_refused() {
    for text in ["", "{}", r#"{"keys": []}"#, r#"{"keys": [{"kty": "oct", "kid": "a", "k": "AAAA"}]}"#] {
        assert!(TokenKeys::parse(text).is_err(), "{text}");
    }
}
