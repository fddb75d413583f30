//! Policies as received: understood, or refused with all that can be known of whom they are for.
//!
//! A policy that is not understood is kept as well, since it may be a refusal for anybody: whoever it is for is denied
//! everything until it is understood or removed.

use std::sync::Arc;

use mesh_common::api::AUTHORIZATION_TYPE;
use mesh_common::api::envoy::service::discovery::v3 as xds;
use mesh_common::api::istio::security as wire;
use mesh_common::policy::{Policy, Scope};
use prost::Message;

use super::decode::printable;
use super::model::Rejected;

/// A policy of the control plane's.
#[derive(Debug, Clone, PartialEq)]
pub struct Authorization {
    /// Its resource name, `NAMESPACE/NAME` where it is understood.
    pub name: Arc<str>,
    /// What it says.
    pub content: Content,
    /// As it came, for the copy on disk.
    resource: xds::Resource,
}

/// What a policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// This.
    Understood(Policy),
    /// Nobody knows.
    Refused {
        /// Why, naming the field.
        reason: String,
        /// Whom it is for.
        reach: Reach,
    },
}

/// Whom a policy that is not understood is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// Its scope could be read.
    Known {
        /// The scope.
        scope: Scope,
        /// The namespace that it is of.
        namespace: Box<str>,
    },
    /// Not even that: every workload of this namespace, or every one of all where no workload is known in it.
    Unknown {
        /// By the resource name.
        namespace: Option<Box<str>>,
    },
}

/// What one response changes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PolicyUpdate {
    /// New and changed policies, and those that are resent as they were.
    pub updated: Vec<Arc<Authorization>>,
    /// Names of policies that are gone.
    pub removed: Vec<String>,
}

impl PolicyUpdate {
    /// Those that are not understood, and why.
    pub fn rejected(&self) -> Vec<Rejected> {
        self.updated.iter().filter_map(|policy| policy.rejected()).collect()
    }
}

impl Authorization {
    /// Reads a policy, which never fails: see [`Content::Refused`].
    pub fn read(resource: xds::Resource) -> Self {
        let content = match parse(&resource) {
            Ok(policy) => Content::Understood(policy),
            Err((reason, reach)) => Content::Refused { reason, reach },
        };
        Self { name: resource.name.as_str().into(), content, resource }
    }

    /// The policy, if it is understood.
    pub fn understood(&self) -> Option<&Policy> {
        match &self.content {
            Content::Understood(policy) => Some(policy),
            Content::Refused { .. } => None,
        }
    }

    /// Why it is refused, if it is not understood.
    pub fn rejected(&self) -> Option<Rejected> {
        match &self.content {
            Content::Understood(_) => None,
            Content::Refused { reason, .. } => {
                Some(Rejected { name: printable(&self.name), reason: reason.clone() })
            }
        }
    }

    /// The version to tell when a stream begins. None for what is not understood, so that it is sent again.
    pub fn version(&self) -> &str {
        match &self.content {
            Content::Understood(_) => &self.resource.version,
            Content::Refused { .. } => "",
        }
    }

    /// As it came.
    pub(super) fn resource(&self) -> &xds::Resource {
        &self.resource
    }
}

fn parse(resource: &xds::Resource) -> Result<Policy, (String, Reach)> {
    let by_name = || {
        let namespace = resource.name.split_once('/').map(|(namespace, _)| namespace);
        Reach::Unknown { namespace: namespace.filter(|text| !text.is_empty()).map(Into::into) }
    };
    let blind = |reason: String| (reason, by_name());
    let any = resource.resource.as_ref().ok_or_else(|| blind("resource: missing".to_owned()))?;
    if any.type_url != AUTHORIZATION_TYPE {
        let url = printable(&any.type_url);
        return Err(blind(format!("resource.type_url: {url:?}, wanted {AUTHORIZATION_TYPE}")));
    }
    let message = wire::Authorization::decode(any.value.as_slice())
        .map_err(|error| blind(format!("resource.value: {error}")))?;
    if [&*message.namespace, "/", &*message.name].concat() != resource.name {
        let (namespace, name) = (printable(&message.namespace), printable(&message.name));
        return Err(blind(format!("name: the resource is {namespace:?} / {name:?} by its content")));
    }
    Policy::try_from(&message).map_err(|invalid| {
        let reach = match Scope::try_from(message.scope) {
            Ok(scope) => Reach::Known { scope, namespace: message.namespace.as_str().into() },
            Err(_unknown) => by_name(),
        };
        (invalid.to_string(), reach)
    })
}

#[cfg(test)]
mod tests;
