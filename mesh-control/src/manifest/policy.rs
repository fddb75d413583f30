//! TrafficPolicy of mesh.dev, ours: what no standard kind says. Unknown fields are refused, since they can only be typos.

use serde::Deserialize;

use super::{Meta, check::Checks};

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct TrafficPolicy {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default)]
    pub(crate) spec: TrafficPolicySpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct TrafficPolicySpec {
    pub(crate) target_refs: Vec<PolicyTarget>,
    pub(crate) balancer: Option<BalancerSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct PolicyTarget {
    #[serde(default)]
    group: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    pub(crate) name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct BalancerSpec {
    algorithm: Option<Balancer>,
}

/// How a backend is picked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum Balancer {
    #[default]
    WeightedRandom,
    RoundRobin,
    LeastConnections,
    Maglev,
}

impl TrafficPolicy {
    pub(crate) fn algorithm(&self) -> Option<Balancer> {
        self.spec.balancer?.algorithm
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        checks.require(!self.spec.target_refs.is_empty(), "spec.targetRefs", "is missing or empty");
        for (i, target) in self.spec.target_refs.iter().enumerate() {
            let field = |name: &str| format!("spec.targetRefs[{i}].{name}");
            checks.require(
                target.group.is_empty(),
                field("group"),
                format!("{:?} is not \"\"", target.group),
            );
            checks.require(
                target.kind == "Service",
                field("kind"),
                format!("{:?} is not Service", target.kind),
            );
            checks.require(!target.name.is_empty(), field("name"), "is missing");
            if self.spec.target_refs[..i].iter().any(|earlier| earlier.name == target.name) {
                checks.refuse(field("name"), format!("{:?} is targeted twice", target.name));
            }
        }
        if self.spec.balancer.is_none() {
            checks.refuse("spec.balancer", "is missing: the policy says nothing");
        } else if self.algorithm().is_none() {
            checks.refuse("spec.balancer.algorithm", "is missing");
        }
    }
}
