//! Names of identities, parsed once at the edge.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const SCHEME: &str = "spiffe://";
/// By the SPIFFE standard: of a trust domain, and of a whole id.
const TRUST_DOMAIN_LIMIT: usize = 255;
const LIMIT: usize = 2048;

/// Identity of a workload: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Where the namespace begins in `uri`, and the service account.
    namespace: u16,
    account: u16,
}

/// Why a text is no identity of a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no identity of a workload (spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT): {reason}"
)]
pub struct InvalidSpiffeId {
    text: String,
    reason: &'static str,
}

impl SpiffeId {
    /// The identity of a service account.
    pub fn new(trust_domain: &str, namespace: &str, account: &str) -> Result<Self, InvalidSpiffeId> {
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{account}");
        let wrong = |reason| {
            // Bounded: it may come from a control plane, and goes into logs.
            let text = uri.chars().take(200).collect();
            Err(InvalidSpiffeId { text, reason })
        };
        if uri.len() > LIMIT {
            return wrong("it is longer than 2048 bytes");
        }
        if let Err(reason) = check_trust_domain(trust_domain) {
            return wrong(reason);
        }
        if !is_segment(namespace) {
            return wrong("the namespace is empty, or holds more than letters, digits, '-', '_' and '.'");
        }
        if !is_segment(account) {
            return wrong(
                "the service account is empty, or holds more than letters, digits, '-', '_' and '.'",
            );
        }
        let start = SCHEME.len() + trust_domain.len() + "/ns/".len();
        let at = |offset: usize| u16::try_from(offset).ok();
        match (at(start), at(start + namespace.len() + "/sa/".len())) {
            (Some(namespace), Some(account)) => Ok(Self { uri: uri.into(), namespace, account }),
            (None, _) | (_, None) => wrong("it is longer than 2048 bytes"),
        }
    }

    /// Who vouches for it.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.namespace) - "/ns/".len()]
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.namespace)..usize::from(self.account) - "/sa/".len()]
    }

    /// Its service account.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.account)..]
    }

    /// The whole, as it stands in a certificate.
    pub fn as_str(&self) -> &str {
        &self.uri
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        let wrong = |reason| InvalidSpiffeId { text: text.chars().take(200).collect(), reason };
        let path = text.strip_prefix(SCHEME).ok_or_else(|| wrong("it does not begin with spiffe://"))?;
        let parts: Vec<&str> = path.splitn(6, '/').collect();
        match parts.as_slice() {
            [trust_domain, "ns", namespace, "sa", account] => Self::new(trust_domain, namespace, account),
            _ => Err(wrong("its path is not /ns/NAMESPACE/sa/SERVICE_ACCOUNT")),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

/// Whether that is the identity of a node of this mesh, and of the one of that name:
/// `spiffe://TRUST_DOMAIN/mesh.dev/node/NAME`.
pub fn names_node(uri: &str, node: &str) -> bool {
    let parts: Option<Vec<&str>> = uri.strip_prefix(SCHEME).map(|path| path.splitn(5, '/').collect());
    match parts.as_deref() {
        Some([trust_domain, "mesh.dev", "node", name]) => {
            check_trust_domain(trust_domain).is_ok() && *name == node
        }
        Some(_) | None => false,
    }
}

fn check_trust_domain(text: &str) -> Result<(), &'static str> {
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
    match text {
        "" => Err("the trust domain is empty"),
        long if long.len() > TRUST_DOMAIN_LIMIT => Err("the trust domain is longer than 255 bytes"),
        odd if !odd.bytes().all(allowed) => {
            Err("the trust domain holds more than lower-case letters, digits, '.', '-' and '_'")
        }
        _ => Ok(()),
    }
}

fn is_segment(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_has_three_parts() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web.front".parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "shop", "web.front")
        );
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web.front");
        assert_eq!(id, SpiffeId::new("cluster.local", "shop", "web.front").unwrap());
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe:///ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td:1/ns/a/sa/b",
            "spiffe://u@td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe://td//ns/a/sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a/sa/.",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a/sa/b#x",
            "spiffe://td/ns/a%2f/sa/b",
            "spiffe://td/ns/a/sa/b\n",
            " spiffe://td/ns/a/sa/b",
            "spiffe://td/ns/ä/sa/b",
            "spiffe://td/mesh.dev/node/a",
            &format!("spiffe://{}/ns/a/sa/b", "t".repeat(256)),
            &format!("spiffe://td/ns/a/sa/{}", "b".repeat(2048)),
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
        let error = SpiffeId::new("td", "a/b", "c").unwrap_err().to_string();
        assert!(error.contains("the namespace"), "{error}");
    }

    #[test]
    fn a_node_is_known_by_its_name() {
        assert!(names_node("spiffe://cluster.local/mesh.dev/node/node-a", "node-a"));
        for other in [
            "spiffe://cluster.local/mesh.dev/node/node-b",
            "spiffe://cluster.local/mesh.dev/node/node-a/x",
            "spiffe://cluster.local/mesh.dev/node/",
            "spiffe:///mesh.dev/node/node-a",
            "spiffe://cluster.local/ns/istio-system/sa/ztunnel",
            "node-a",
        ] {
            assert!(!names_node(other, "node-a"), "{other}");
        }
    }
}
