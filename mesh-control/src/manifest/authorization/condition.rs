//! The values that rules compare with, parsed where they are read.

use std::{fmt, net::IpAddr};

use serde::Deserialize;

use crate::manifest::{
    check::{is_label, is_subdomain},
    value::nullable,
};

/// No identity is as long; agents refuse what is longer.
const MAX_TEXT: usize = 2_048;

/// A text to compare with: `abc`, `abc*`, `*abc`, or `*` for any that is not empty.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence,
}

/// A block of addresses; one address is the block with all bits given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Block {
    /// Bits behind the prefix are zero.
    pub(crate) address: IpAddr,
    pub(crate) length: u8,
}

/// A port, written as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Port(pub(crate) u16);

/// `NAMESPACE/NAME`, or `NAME` in the policy's own namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Account {
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
}

/// An attribute of the connection and what it is compared with.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub(crate) struct Condition {
    key: String,
    pub(crate) test: Test,
}

/// What a condition compares: one of the first, and none of the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    SourceIp(Vec<Block>, Vec<Block>),
    SourceNamespace(Vec<Pattern>, Vec<Pattern>),
    SourcePrincipal(Vec<Pattern>, Vec<Pattern>),
    DestinationIp(Vec<Block>, Vec<Block>),
    DestinationPort(Vec<Port>, Vec<Port>),
    /// Only an HTTP proxy can tell.
    Http,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    #[serde(default)]
    key: String,
    #[serde(default, deserialize_with = "nullable")]
    values: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    not_values: Vec<String>,
}

impl Condition {
    /// The key, if only an HTTP proxy can judge by it.
    pub(super) fn http(&self) -> Option<&str> {
        (self.test == Test::Http).then_some(&self.key)
    }
}

impl Pattern {
    pub(super) fn names_scheme(&self) -> bool {
        match self {
            Self::Exact(text) | Self::Prefix(text) => text.starts_with("spiffe://"),
            Self::Suffix(_) | Self::Presence => false,
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.is_empty() {
            Err("is empty, which matches nothing")
        } else if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
            Err("is no name: it is too long or holds control characters")
        } else if text == "*" {
            Ok(Self::Presence)
        } else if let Some(suffix) = text.strip_prefix('*') {
            Ok(Self::Suffix(suffix.to_owned()))
        } else if let Some(prefix) = text.strip_suffix('*') {
            Ok(Self::Prefix(prefix.to_owned()))
        } else {
            Ok(Self::Exact(text))
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Presence => f.write_str("*"),
        }
    }
}

impl TryFrom<String> for Block {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bad = || format!("{text:?} is neither an IP address nor a block of them");
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text.as_str(), None),
        };
        let Ok(address) = address.parse::<IpAddr>() else { return Err(bad()) };
        let bits: u8 = if address.is_ipv4() { 32 } else { 128 };
        if address.to_canonical() != address {
            return Err(format!("{text:?} stands for IPv4 addresses: write them as such"));
        }
        let plain = |length: &&str| length.bytes().all(|b| b.is_ascii_digit()) && !length.is_empty();
        let length = match length {
            None => bits,
            Some(length) => match Some(length).filter(plain).and_then(|length| length.parse::<u8>().ok()) {
                Some(length) if length <= bits => length,
                Some(_) | None => return Err(bad()),
            },
        };
        let kept = |all: u128| {
            let host = u32::from(bits - length);
            all.checked_shr(host).unwrap_or(0).checked_shl(host).unwrap_or(0)
        };
        let address = match address {
            // The bits of the prefix fit in what they came from.
            IpAddr::V4(v4) => IpAddr::from((kept(u128::from(v4.to_bits())) as u32).to_be_bytes()),
            IpAddr::V6(v6) => IpAddr::from(kept(v6.to_bits()).to_be_bytes()),
        };
        Ok(Self { address, length })
    }
}

impl TryFrom<String> for Port {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.parse::<u16>() {
            Ok(port) if port != 0 && !text.starts_with('+') => Ok(Self(port)),
            Ok(_) | Err(_) => Err(format!("{text:?} is not a port from 1 to 65535")),
        }
    }
}

impl TryFrom<String> for Account {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text.as_str()),
        };
        if !is_subdomain(name) || namespace.is_some_and(|namespace| !is_label(namespace)) {
            return Err(format!("{text:?} is neither SERVICEACCOUNT nor NAMESPACE/SERVICEACCOUNT"));
        }
        Ok(Self { namespace: namespace.map(str::to_owned), name: name.to_owned() })
    }
}

impl TryFrom<Written> for Condition {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let Written { key, values, not_values } = written;
        if key.is_empty() {
            return Err("key is missing".to_owned());
        }
        if values.is_empty() && not_values.is_empty() {
            return Err(format!("{key}: values and notValues are both missing"));
        }
        let test = match key.as_str() {
            "source.ip" => Test::SourceIp(all(&key, "values", values)?, all(&key, "notValues", not_values)?),
            "source.namespace" => {
                Test::SourceNamespace(all(&key, "values", values)?, all(&key, "notValues", not_values)?)
            }
            "source.principal" => {
                Test::SourcePrincipal(all(&key, "values", values)?, all(&key, "notValues", not_values)?)
            }
            "destination.ip" => {
                Test::DestinationIp(all(&key, "values", values)?, all(&key, "notValues", not_values)?)
            }
            "destination.port" => {
                Test::DestinationPort(all(&key, "values", values)?, all(&key, "notValues", not_values)?)
            }
            key if is_http(key) => Test::Http,
            unknown => return Err(format!("key {unknown:?} is no known attribute")),
        };
        Ok(Self { key, test })
    }
}

/// Attributes that Istio knows and that a connection does not show.
fn is_http(key: &str) -> bool {
    const PLAIN: [&str; 7] = [
        "remote.ip",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "connection.sni",
        "source.serviceAccount",
        "source.trustDomain",
    ];
    let inner = |name: &str| key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']');
    let named = ["request.headers", "request.auth.claims"]
        .iter()
        .any(|name| inner(name).is_some_and(|i| !i.is_empty()));
    PLAIN.contains(&key) || named || key.starts_with("experimental.envoy.filters.")
}

fn all<T: TryFrom<String>>(key: &str, list: &str, texts: Vec<String>) -> Result<Vec<T>, String>
where
    T::Error: fmt::Display,
{
    let parse = |(i, text): (usize, String)| {
        T::try_from(text).map_err(|error| format!("{key}: {list}[{i}]: {error}"))
    };
    texts.into_iter().enumerate().map(parse).collect()
}
