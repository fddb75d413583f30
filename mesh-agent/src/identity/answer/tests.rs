use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType};

use super::*;
use crate::identity::request::Request;
use crate::identity::testing::{Authority, leaf};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DAY: Duration = Duration::from_secs(86_400);

/// A request for [`WEB`], and an authority to answer it.
struct World {
    authority: Authority,
    request: Request,
}

impl World {
    fn new() -> Self {
        Self { authority: Authority::new("root"), request: Request::new(WEB).unwrap() }
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = leaf(&[WEB], DAY);
        change(&mut params);
        self.authority.sign(&self.request.csr, params)
    }

    fn good(&self) -> Vec<String> {
        vec![self.leaf(|_| {}), self.authority.pem()]
    }

    fn check(&self, chain: &[String]) -> Result<Answer, BadAnswer> {
        self.check_at(chain, SystemTime::now())
    }

    fn check_at(&self, chain: &[String], now: SystemTime) -> Result<Answer, BadAnswer> {
        check(chain, Arc::clone(&self.request.key), Some(WEB), now)
    }

    /// Why the answer with a leaf that was changed so is refused.
    fn refused(&self, change: impl FnOnce(&mut CertificateParams)) -> BadAnswer {
        self.check(&[self.leaf(change), self.authority.pem()]).unwrap_err()
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[test]
fn a_good_answer_is_taken() {
    let world = World::new();
    let answer = world.check(&world.good()).unwrap();
    assert_eq!((&*answer.uri, answer.certified.cert.len(), answer.roots.store.len()), (WEB, 1, 1));
    let left = answer.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(left <= DAY && left > DAY - Duration::from_secs(60), "{left:?}");
    assert!(answer.not_before < SystemTime::now());
    assert!(answer.number.len() >= 8 && answer.number.bytes().all(|b| b.is_ascii_hexdigit()));
}

#[test]
fn intermediates_may_come_one_an_element_or_together() {
    let root = Authority::new("root");
    let upper = root.intermediate("upper");
    let world = World { authority: upper.intermediate("lower"), request: Request::new(WEB).unwrap() };
    let (leaf, lower) = (world.leaf(|_| {}), world.authority.pem());
    let old = Authority::new("old").pem();
    for chain in [
        vec![leaf.clone(), lower.clone(), upper.pem(), root.pem()],
        vec![format!("{leaf}{lower}"), upper.pem(), format!("{old}{}", root.pem())],
    ] {
        assert_eq!(world.check(&chain).unwrap().certified.cert.len(), 3);
    }
    let without = [leaf, lower, root.pem()];
    assert!(matches!(world.check(&without), Err(BadAnswer::Chain(_))));
}

#[test]
fn too_little_is_no_answer() {
    let world = World::new();
    assert_eq!(world.check(&[]).unwrap_err(), BadAnswer::TooShort(0));
    assert_eq!(world.check(&[world.leaf(|_| {})]).unwrap_err(), BadAnswer::TooShort(1));
    let [leaf, root] = world.good().try_into().unwrap();
    for empty in [String::new(), "\n".to_owned(), "no PEM".to_owned()] {
        assert!(matches!(world.check(&[empty.clone(), root.clone()]), Err(BadAnswer::Pem(0, _))));
        assert!(matches!(world.check(&[leaf.clone(), empty]), Err(BadAnswer::Pem(1, _))));
    }
}

#[test]
fn what_is_not_a_certificate_is_refused() {
    let world = World::new();
    let [leaf, root] = world.good().try_into().unwrap();
    let key = KeyPair::generate().unwrap().serialize_pem();
    let reason = world.check(&[format!("{leaf}{key}"), root.clone()]).unwrap_err().to_string();
    assert!(reason.contains("cert_chain[0]") && reason.contains("certificates only"), "{reason}");
    let cut = leaf[..leaf.len() / 2].to_owned();
    assert!(matches!(world.check(&[cut, root.clone()]), Err(BadAnswer::Pem(0, _))));
    let odd = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
    assert!(matches!(world.check(&[odd.clone(), root.clone()]), Err(BadAnswer::Leaf(_))));
    assert!(matches!(world.check(&[leaf.clone(), odd]), Err(BadAnswer::Root(_))));
    let bytes = "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n".to_owned();
    assert!(matches!(world.check(&[leaf, bytes]), Err(BadAnswer::Pem(1, _))));
}

#[test]
fn too_much_is_refused() {
    let world = World::new();
    let [leaf, root] = world.good().try_into().unwrap();
    let long = format!("{root}{}", " ".repeat(BYTES));
    assert_eq!(world.check(&[leaf.clone(), long]).unwrap_err(), BadAnswer::TooLarge(1));
    let many = root.repeat(CERTIFICATES + 1);
    assert!(world.check(&[leaf.clone(), many]).is_err());
    let elements: Vec<String> = std::iter::repeat_n(root.clone(), CERTIFICATES + 2).collect();
    assert!(matches!(world.check(&elements), Err(BadAnswer::TooLarge(_))));
    // Each once is enough.
    assert_eq!(world.check(&[leaf, root.repeat(3)]).unwrap().roots.store.len(), 1);
}

#[test]
fn a_certificate_for_another_key_is_refused() {
    let world = World::new();
    let other = KeyPair::generate().unwrap();
    let chain = [world.authority.sign_key(&other, leaf(&[WEB], DAY)), world.authority.pem()];
    assert_eq!(world.check(&chain).unwrap_err(), BadAnswer::OtherKey);
}

#[test]
fn a_certificate_for_somebody_else_is_refused() {
    let world = World::new();
    let db = "spiffe://cluster.local/ns/shop/sa/db";
    let error = world.refused(|leaf| leaf.subject_alt_names = vec![uri(db)]);
    assert_eq!(error, BadAnswer::OtherIdentity { found: db.to_owned(), wanted: WEB.to_owned() });
    for odd in [&format!("{WEB}/"), &WEB.to_uppercase(), "spiffe://other.domain/ns/shop/sa/web"] {
        let error = world.refused(|leaf| leaf.subject_alt_names = vec![uri(odd)]);
        assert!(matches!(error, BadAnswer::OtherIdentity { .. }), "{odd}: {error}");
    }
}

#[test]
fn one_uri_is_a_name_and_two_are_none() {
    let world = World::new();
    let db = "spiffe://cluster.local/ns/shop/sa/db";
    assert_eq!(world.refused(|leaf| leaf.subject_alt_names.push(uri(db))), BadAnswer::Names(2));
    assert_eq!(world.refused(|leaf| leaf.subject_alt_names.push(uri(WEB))), BadAnswer::Names(2));
    assert_eq!(world.refused(|leaf| leaf.subject_alt_names.clear()), BadAnswer::Names(0));
    let dns = || SanType::DnsName("web".try_into().unwrap());
    assert_eq!(world.refused(|leaf| leaf.subject_alt_names = vec![dns()]), BadAnswer::Names(0));
    // The standard permits other kinds of names beside the URI.
    let both = world.leaf(|leaf| leaf.subject_alt_names.push(dns()));
    assert!(world.check(&[both, world.authority.pem()]).is_ok());
}

#[test]
fn certificates_out_of_their_time_are_refused() {
    let world = World::new();
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let expired = world.refused(|leaf| leaf.not_after = (now - hour / 60).into());
    assert_eq!(expired, BadAnswer::Expired);
    assert_eq!(world.refused(|leaf| leaf.not_after = now.into()), BadAnswer::Expired);
    let early = world.refused(|leaf| leaf.not_before = (now + hour).into());
    assert!(matches!(early, BadAnswer::NotYetValid(_)), "{early}");
    let backwards = world.refused(|leaf| {
        (leaf.not_before, leaf.not_after) = ((now + hour).into(), (now - hour).into());
    });
    assert!(matches!(backwards, BadAnswer::NotYetValid(_)), "{backwards}");
    // The same by a clock that is wrong here.
    let good = world.good();
    assert!(matches!(world.check_at(&good, now - hour), Err(BadAnswer::NotYetValid(_))));
    assert_eq!(world.check_at(&good, now + DAY * 2).unwrap_err(), BadAnswer::Expired);
    assert!(matches!(world.check_at(&good, UNIX_EPOCH), Err(BadAnswer::NotYetValid(_))));
    assert!(matches!(world.check_at(&good, UNIX_EPOCH - hour), Err(BadAnswer::NotYetValid(_))));
}

#[test]
fn a_chain_to_another_root_is_refused() {
    let world = World::new();
    let leaf = world.leaf(|_| {});
    // Of the same name, even.
    for other in [Authority::new("root"), Authority::new("other")] {
        let error = world.check(&[leaf.clone(), other.pem()]).unwrap_err();
        assert!(matches!(error, BadAnswer::Chain(_)), "{error}");
    }
    // It vouches for itself.
    let alone = world.check(&[leaf.clone(), leaf]).unwrap_err();
    assert!(matches!(alone, BadAnswer::Chain(_) | BadAnswer::Root(_)), "{alone}");
}

#[test]
fn a_leaf_that_no_peer_would_take_is_refused() {
    let world = World::new();
    for usages in [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth] {
        let error = world.refused(|leaf| leaf.extended_key_usages = vec![usages]);
        assert!(matches!(error, BadAnswer::Chain(_)), "{error}");
    }
    let error = world.refused(|leaf| leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert!(matches!(error, BadAnswer::Chain(_)), "{error}");
}

#[test]
fn roots_are_the_same_in_any_order() {
    let [a, b] = ["a", "b"].map(|name| Authority::new(name).pem());
    let bundle = |text: &str| Bundle::new(certificates(text.as_bytes()).unwrap()).unwrap();
    assert_eq!(bundle(&format!("{a}{b}")), bundle(&format!("{b}\n{a}{b}")));
    assert_ne!(bundle(&a), bundle(&b));
    assert_ne!(bundle(&a), bundle(&format!("{a}{b}")));
}

#[test]
fn bytes_at_random_are_refused_and_never_panic() {
    let root = Authority::new("root");
    let world = World { authority: root.intermediate("lower"), request: Request::new(WEB).unwrap() };
    let good = [world.leaf(|_| {}), world.authority.pem(), root.pem()];
    assert!(world.check(&good).is_ok());
    // xorshift: the same changes in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below
    };
    let now = SystemTime::now();
    let mut wrong = 0;
    for round in 0..6_000 {
        let mut chain = good.clone();
        let at = random(chain.len());
        if round % 2 == 0 {
            // In the text.
            let mut text = chain[at].clone().into_bytes();
            for _ in 0..=random(3) {
                let byte = random(text.len());
                text[byte] = b" \n-=+/Aaz09B\x7f"[random(13)];
            }
            chain[at] = String::from_utf8(text).unwrap();
        } else {
            // In the certificate itself.
            let mut der = certificates(chain[at].as_bytes()).unwrap()[0].to_vec();
            for _ in 0..=random(3) {
                let byte = random(der.len());
                der[byte] = random(256) as u8;
            }
            der.truncate(if random(8) == 0 { random(der.len()) } else { der.len() });
            chain[at] = armour(&der);
        }
        match world.check_at(&chain, now) {
            // What does not change the meaning (white space, the same byte) is as good as before.
            Ok(answer) => assert_eq!((&*answer.uri, answer.roots.store.len()), (WEB, 1)),
            Err(_) => wrong += 1,
        }
    }
    assert!(wrong > 5_000, "{wrong}");
}

fn armour(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for chunk in der.chunks(3) {
        let word =
            chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let sextet = word >> (18 - 6 * digit) & 63;
            text.push(if digit <= chunk.len() { char::from(ALPHABET[sextet as usize]) } else { '=' });
        }
    }
    text.push_str("\n-----END CERTIFICATE-----\n");
    text
}
