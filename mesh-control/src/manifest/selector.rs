//! `selector` of the kinds of security.istio.io.

use serde::Deserialize;

use super::{
    check::Checks,
    value::{Labels, nullable},
};

/// Labels that a workload must have. Unknown fields are refused: a condition that is not understood would choose too many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct LabelSelector {
    #[serde(deserialize_with = "nullable")]
    pub(crate) match_labels: Labels,
}

impl LabelSelector {
    pub(super) fn check(&self, checks: &mut Checks) {
        for (key, value) in &self.match_labels {
            let field = format!("spec.selector.matchLabels[{key}]");
            checks.require(!key.is_empty(), &field, "has no key");
            let wildcard = key.contains('*') || value.contains('*');
            checks.require(!wildcard, &field, format!("{value:?}: wildcards select nothing here"));
        }
    }
}
