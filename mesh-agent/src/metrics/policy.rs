//! Metrics of policy.

use super::family::{Families, Kind};

/// Figures of policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policy {
    /// Whether all policies have been named once.
    pub complete: bool,
    /// Policies by state.
    pub policies: Vec<(&'static str, u64)>,
    /// Workloads of this node that refuse everything, by why.
    pub refusing: Vec<(&'static str, u64)>,
    /// Verdicts that the kernel has no room for.
    pub left_out: u64,
    /// Workloads with addresses that the kernel does not know.
    pub unplaced: u64,
    /// Plans of which something could not be written.
    pub write_failures: u64,
    /// Refused connections by policy and side.
    pub denials: Vec<(String, &'static str, u64)>,
    /// Connections that policies in dry run would have refused, by policy and side.
    pub rehearsed: Vec<(String, &'static str, u64)>,
    /// Refused connections of which no more than that is known.
    pub untold_denials: u64,
    /// The same of connections that policies in dry run would have refused, by the proxy.
    pub untold_rehearsals: u64,
    /// Connections that were destroyed, and those that could not be, by why.
    pub destroyed: Vec<(&'static str, u64)>,
}

pub(super) fn policy(families: &mut Families, policy: &Policy) {
    let complete = families.family(
        "mesh_agent_policies_complete",
        "Whether all policies have come; until then every connection to a workload of this node is refused.",
        Kind::Gauge,
    );
    complete.add([], f64::from(u8::from(policy.complete)));
    for (name, help, kind, label, values) in [
        ("mesh_agent_policies", "Policies.", Kind::Gauge, "state", &policy.policies),
        (
            "mesh_agent_policy_refusing_workloads",
            "Workloads of this node that refuse everything.",
            Kind::Gauge,
            "reason",
            &policy.refusing,
        ),
        (
            "mesh_agent_connections_destroyed_total",
            "Connections ended since they may no longer be, or that could not be.",
            Kind::Counter,
            "reason",
            &policy.destroyed,
        ),
    ] {
        let family = families.family(name, help, kind);
        for (value, count) in values {
            family.add([(label, *value)], *count as f64);
        }
    }
    for (name, help, kind, value) in [
        (
            "mesh_agent_policy_verdicts_left_out",
            "Cases that the kernel has no room for.",
            Kind::Gauge,
            policy.left_out,
        ),
        (
            "mesh_agent_unplaced_workloads",
            "Workloads with addresses that the kernel has no room for: they are reached as if they were outside the mesh.",
            Kind::Gauge,
            policy.unplaced,
        ),
        (
            "mesh_agent_policy_write_failures_total",
            "Changes of policy of which something could not be written.",
            Kind::Counter,
            policy.write_failures,
        ),
        (
            "mesh_agent_policy_denials_untold_total",
            "Connections refused by policy of which there was no time, or no room, to say more.",
            Kind::Counter,
            policy.untold_denials,
        ),
        (
            "mesh_agent_policy_dry_run_denials_untold_total",
            "Connections that policies in dry run would have refused, of which there was no time to say more.",
            Kind::Counter,
            policy.untold_rehearsals,
        ),
    ] {
        families.family(name, help, kind).add([], value as f64);
    }
    for (name, help, counts) in [
        ("mesh_agent_policy_denials_total", "Connections refused by policy.", &policy.denials),
        (
            "mesh_agent_policy_dry_run_denials_total",
            "Connections let in that policies in dry run would have refused.",
            &policy.rehearsed,
        ),
    ] {
        let family = families.family(name, help, Kind::Counter);
        for (name, side, count) in counts {
            family.add([("policy", name.as_str()), ("side", *side)], *count as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_shows_up_with_its_labels() {
        let mut families = Families::default();
        let figures = Policy {
            complete: true,
            policies: vec![("in-force", 1)],
            refusing: vec![("awaited", 2)],
            left_out: 3,
            unplaced: 7,
            write_failures: 4,
            denials: vec![("shop/deny".to_owned(), "client", 5)],
            rehearsed: vec![("shop/trial".to_owned(), "server", 9)],
            untold_denials: 8,
            untold_rehearsals: 10,
            destroyed: vec![("policy", 6)],
        };
        policy(&mut families, &figures);
        let text = families.text();
        for line in [
            "mesh_agent_policies_complete 1",
            r#"mesh_agent_policies{state="in-force"} 1"#,
            r#"mesh_agent_policy_refusing_workloads{reason="awaited"} 2"#,
            "mesh_agent_policy_verdicts_left_out 3",
            "mesh_agent_unplaced_workloads 7",
            "mesh_agent_policy_write_failures_total 4",
            "mesh_agent_policy_denials_untold_total 8",
            "mesh_agent_policy_dry_run_denials_untold_total 10",
            r#"mesh_agent_policy_denials_total{policy="shop/deny",side="client"} 5"#,
            r#"mesh_agent_policy_dry_run_denials_total{policy="shop/trial",side="server"} 9"#,
            r#"mesh_agent_connections_destroyed_total{reason="policy"} 6"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
