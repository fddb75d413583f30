//! PeerAuthentication of security.istio.io: whether workloads accept plaintext.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, de};

use super::{
    Meta,
    check::Checks,
    selector::LabelSelector,
    value::{Labels, nullable},
};

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct PeerAuthentication {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    spec: PeerSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PeerSpec {
    selector: Option<LabelSelector>,
    #[serde(deserialize_with = "nullable")]
    mtls: MutualTls,
    port_level_mtls: Option<BTreeMap<Port, MutualTls>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MutualTls {
    #[serde(deserialize_with = "nullable")]
    mode: PeerMode,
}

/// What a workload accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum PeerMode {
    /// As the next wider policy says.
    #[default]
    Unset,
    /// Mutual TLS is not offered.
    Disable,
    Permissive,
    Strict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Port(u16);

impl PeerMode {
    /// What the wider policy says where this one says nothing.
    pub(crate) fn or(self, wider: impl FnOnce() -> Self) -> Self {
        if self == Self::Unset { wider() } else { self }
    }
}

impl PeerAuthentication {
    /// Labels of the workloads that it is for; `None`: for all of its namespace, or of the mesh.
    pub(crate) fn selector(&self) -> Option<&Labels> {
        self.spec.selector.as_ref().map(|s| &s.match_labels).filter(|labels| !labels.is_empty())
    }

    pub(crate) fn mode(&self) -> PeerMode {
        self.spec.mtls.mode
    }

    /// Modes of single ports, in their order.
    pub(crate) fn ports(&self) -> impl Iterator<Item = (u16, PeerMode)> {
        self.spec.port_level_mtls.iter().flatten().map(|(port, mtls)| (port.0, mtls.mode))
    }

    /// Sorts the oldest first, those without a time last, then by name.
    pub(crate) fn age(&self) -> (bool, Option<&str>, &str) {
        let time = self.metadata.creation_timestamp.as_deref();
        (time.is_none(), time, &self.metadata.name)
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        if let Some(selector) = &self.spec.selector {
            selector.check(checks);
        }
        let Some(ports) = &self.spec.port_level_mtls else { return };
        checks.require(!ports.is_empty(), "spec.portLevelMtls", "is empty: leave it out");
        let reason = "needs spec.selector: ports are of workloads, not of namespaces";
        checks.require(self.selector().is_some(), "spec.portLevelMtls", reason);
        for (Port(port), _) in ports.iter().filter(|(_, mtls)| mtls.mode == PeerMode::Disable) {
            let reason = "DISABLE of a single port counts as PERMISSIVE, since peers cannot be told of it";
            checks.note(format!("spec.portLevelMtls[{port}].mode"), reason);
        }
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(PortVisitor)
    }
}

struct PortVisitor;

impl de::Visitor<'_> for PortVisitor {
    type Value = Port;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number from 1 to 65535")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Port, E> {
        match u16::try_from(number) {
            Ok(port) if port != 0 => Ok(Port(port)),
            Ok(_) | Err(_) => Err(E::invalid_value(de::Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Port, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
        }
    }

    /// A key in JSON is a string.
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Port, E> {
        match text.parse::<u64>() {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }
}
