//! What every object begins with.

use std::{fmt, sync::Arc};

use serde::Deserialize;

use super::{
    check::{Checks, is_label, is_subdomain},
    value::{Labels, nullable},
};

/// `metadata`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Meta {
    #[serde(deserialize_with = "nullable")]
    pub(crate) name: String,
    /// `default` when the manifest names none; empty for kinds without namespace.
    #[serde(deserialize_with = "nullable")]
    pub(crate) namespace: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) uid: String,
    #[serde(deserialize_with = "nullable")]
    pub(crate) labels: Labels,
    #[serde(deserialize_with = "nullable")]
    pub(crate) annotations: Labels,
    pub(crate) creation_timestamp: Option<String>,
    pub(crate) deletion_timestamp: Option<String>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) owner_references: Vec<Owner>,
}

/// Who made the object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Owner {
    pub(crate) kind: String,
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) controller: bool,
}

impl Meta {
    /// Fills the namespace in and checks the names.
    pub(super) fn check(&mut self, namespaced: bool, checks: &mut Checks) {
        if self.name.is_empty() {
            checks.refuse("metadata.name", "is missing");
        } else {
            let good = is_subdomain(&self.name);
            checks.require(good, "metadata.name", format!("{:?} is not a DNS name in lower case", self.name));
        }
        if !namespaced {
            self.namespace.clear();
        } else if self.namespace.is_empty() {
            "default".clone_into(&mut self.namespace);
        } else {
            let good = is_label(&self.namespace);
            checks.require(good, "metadata.namespace", format!("{:?} is not a DNS label", self.namespace));
        }
    }

    pub(crate) fn ns_name(&self) -> NsName {
        NsName { namespace: self.namespace.as_str().into(), name: self.name.as_str().into() }
    }
}

/// Namespace and name; the namespace is empty for kinds that have none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NsName {
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl NsName {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}
