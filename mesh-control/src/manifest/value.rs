//! Small values that several kinds share.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, de};

/// Labels, annotations, selectors.
pub(crate) type Labels = BTreeMap<String, String>;

/// `null` reads as absent, as it does in Kubernetes.
pub(super) fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    d: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

/// Transport of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Protocol {
    #[default]
    Tcp,
    Udp,
    /// Known to Kubernetes, not balanced here.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Where a service port leads: a number, or the name of a container port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetPort {
    Number(u16),
    Name(String),
}

impl<'de> Deserialize<'de> for TargetPort {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(TargetPortVisitor)
    }
}

struct TargetPortVisitor;

impl de::Visitor<'_> for TargetPortVisitor {
    type Value = TargetPort;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number from 1 to 65535 or the name of a container port")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<TargetPort, E> {
        match u16::try_from(number) {
            Ok(port) if port != 0 => Ok(TargetPort::Number(port)),
            Ok(_) | Err(_) => Err(E::invalid_value(de::Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<TargetPort, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
        }
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<TargetPort, E> {
        if super::check::is_label(name) {
            Ok(TargetPort::Name(name.to_owned()))
        } else {
            Err(E::invalid_value(de::Unexpected::Str(name), &self))
        }
    }
}
