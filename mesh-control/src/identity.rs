//! SPIFFE identities of this mesh: workloads and nodes. Pure.

use std::{fmt, str::FromStr};

/// Who a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Identity {
    /// `spiffe://TRUST_DOMAIN/ns/NS/sa/SA`
    Workload { trust_domain: String, namespace: String, service_account: String },
    /// `spiffe://TRUST_DOMAIN/mesh.dev/node/NAME`, which cannot be taken for a workload.
    Node { trust_domain: String, name: String },
}

/// A text that is no identity of this mesh.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "is neither spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT nor spiffe://TRUST_DOMAIN/mesh.dev/node/NAME"
)]
pub(crate) struct NoIdentity;

/// Longest name that Kubernetes gives.
const MAX_NAME: usize = 253;

/// Whether a text can be one segment of an identity: so no identity can be written in two ways.
pub(crate) fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    !text.is_empty() && text.len() <= MAX_NAME && text != "." && text != ".." && text.bytes().all(allowed)
}

impl FromStr for Identity {
    type Err = NoIdentity;

    fn from_str(text: &str) -> Result<Self, NoIdentity> {
        let path = text.strip_prefix("spiffe://").ok_or(NoIdentity)?;
        let segments: Vec<&str> = path.split('/').collect();
        if !segments.iter().all(|segment| is_name(segment)) {
            return Err(NoIdentity);
        }
        match segments[..] {
            [trust_domain, "ns", namespace, "sa", service_account] => Ok(Self::Workload {
                trust_domain: trust_domain.to_owned(),
                namespace: namespace.to_owned(),
                service_account: service_account.to_owned(),
            }),
            [trust_domain, "mesh.dev", "node", name] => {
                Ok(Self::Node { trust_domain: trust_domain.to_owned(), name: name.to_owned() })
            }
            _ => Err(NoIdentity),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload { trust_domain, namespace, service_account } => {
                write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
            }
            Self::Node { trust_domain, name } => write!(f, "spiffe://{trust_domain}/mesh.dev/node/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_read_as_they_are_written() {
        for text in ["spiffe://cluster.local/ns/shop/sa/web", "spiffe://td/mesh.dev/node/node-a.x"] {
            assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_nearly_an_identity_is_none() {
        for text in [
            "",
            "spiffe://",
            "http://td/ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a%2Fb/sa/c",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/mesh.dev/node/",
            "spiffe://td/mesh.dev/node/a/b",
            "spiffe://u@td/ns/a/sa/b",
            "spiffe://td:1/ns/a/sa/b",
        ] {
            assert_eq!(text.parse::<Identity>(), Err(NoIdentity), "{text}");
        }
    }
}
