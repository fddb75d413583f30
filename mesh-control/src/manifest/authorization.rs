//! AuthorizationPolicy of security.istio.io: who may connect to whom. What only an HTTP proxy could judge is recognised,
//! so that it can be counted as unmet; what is not known at all is refused, since a condition left out would widen a rule.

mod condition;
mod rule;

use serde::{Deserialize, Deserializer, de::IgnoredAny};

pub(crate) use condition::{Account, Block, Condition, Pattern, Port, Test};
pub(crate) use rule::{Operation, Rule, Source};

use super::{Meta, check::Checks, selector::LabelSelector, value::Labels, value::nullable};

/// Annotation of a policy that is only tried: logged and counted, never enforced.
const DRY_RUN: &str = "istio.io/dry-run";
/// Agents number the rules of a policy with 16 bits.
const MAX_RULES: usize = 1 << 16;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct AuthorizationPolicy {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) spec: AuthorizationSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct AuthorizationSpec {
    selector: Option<LabelSelector>,
    target_ref: Option<Present>,
    #[serde(deserialize_with = "nullable")]
    target_refs: Vec<Present>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) action: Action,
    provider: Option<Present>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Action {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

/// Something is there, and what it says does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Present;

impl<'de> Deserialize<'de> for Present {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(d).map(|_| Self)
    }
}

impl AuthorizationPolicy {
    /// Labels of the workloads that it is for; `None`: for all of its namespace, or of the mesh.
    pub(crate) fn selector(&self) -> Option<&Labels> {
        self.spec.selector.as_ref().map(|s| &s.match_labels).filter(|labels| !labels.is_empty())
    }

    /// It is only tried.
    pub(crate) fn is_dry_run(&self) -> bool {
        self.metadata.annotations.get(DRY_RUN).and_then(|text| truth(text)).unwrap_or(false)
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        let spec = &self.spec;
        if let Some(text) = self.metadata.annotations.get(DRY_RUN) {
            let field = format!("metadata.annotations[{DRY_RUN}]");
            checks.require(truth(text).is_some(), field, format!("{text:?} is neither true nor false"));
        }
        if let Some(selector) = &spec.selector {
            selector.check(checks);
        }
        const TARGETS: &str = "is not supported yet: choose workloads by spec.selector";
        checks.require(spec.target_ref.is_none(), "spec.targetRef", TARGETS);
        checks.require(spec.target_refs.is_empty(), "spec.targetRefs", TARGETS);
        match spec.action {
            Action::Allow | Action::Deny => {
                let reason = "is for the action CUSTOM, which is not supported";
                checks.require(spec.provider.is_none(), "spec.provider", reason);
            }
            Action::Audit | Action::Custom => {
                checks.refuse("spec.action", "AUDIT and CUSTOM are not supported: use ALLOW or DENY");
            }
        }
        if spec.action == Action::Deny && spec.rules.is_empty() {
            checks.refuse("spec.rules", "is empty: DENY would deny nothing; one empty rule, {}, denies all");
        }
        let few = spec.rules.len() <= MAX_RULES;
        checks.require(few, "spec.rules", format!("holds more than {MAX_RULES} rules"));
        for (i, rule) in spec.rules.iter().enumerate() {
            let at = format!("spec.rules[{i}]");
            rule.check(&at, checks);
            let http = rule.http();
            if !http.is_empty() {
                let meant = match spec.action {
                    Action::Allow => "the rule allows nothing",
                    Action::Deny | Action::Audit | Action::Custom => "the rule denies as if they held",
                };
                let http = http.join(", ");
                checks.note(at, format!("HTTP is not inspected, which {http} would need: {meant}"));
            }
        }
    }
}

/// As Go's `strconv.ParseBool` reads it.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
