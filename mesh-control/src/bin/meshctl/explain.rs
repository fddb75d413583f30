//! What would come of a connection.

use mesh_common::api::{
    SERVICE_EXTENSION,
    mesh::v1::{Algorithm, ExplainResponse, ServiceExtension, explained_backend::Path},
};
use serde_json::json;

use crate::{
    resources::{algorithm, extension, locality_rule},
    table::{Table, View},
};

pub(crate) fn explain(answer: ExplainResponse) -> anyhow::Result<View> {
    let service = answer.service.unwrap_or_default();
    let own: ServiceExtension = extension(&service.extensions, SERVICE_EXTENSION)?;
    let choice = (algorithm(own.algorithm()), locality_rule(&service));
    let affinity = affinity(&own);
    let mut head = Table::new(&["SOURCE", "SERVICE", "ALGORITHM", "LOCALITY", "AFFINITY"]);
    head.row([
        answer.source.clone(),
        format!("{}/{}", service.namespace, service.hostname),
        choice.0.to_owned(),
        choice.1.clone(),
        affinity.clone(),
    ]);
    let columns = [
        "BACKEND", "NODE", "ADDRESS", "STATE", "SHARE", "CHOICE", "PATH", "WHY", "ALLOWED", "VERDICT",
        "POLICY", "RULE",
    ];
    let mut table = Table::new(&columns);
    let mut backends = Vec::new();
    for backend in &answer.backends {
        let address = if backend.address.contains(':') {
            format!("[{}]:{}", backend.address, backend.port)
        } else {
            format!("{}:{}", backend.address, backend.port)
        };
        table.row([
            backend.workload.clone(),
            backend.node.clone(),
            address.clone(),
            backend.state.clone(),
            backend.share.map(share).unwrap_or_default(),
            backend.choice.clone(),
            path(backend.path()).to_owned(),
            backend.why.clone(),
            if backend.allowed { "yes" } else { "no" }.to_owned(),
            backend.verdict.clone(),
            backend.policy.clone(),
            backend.rule.map(|rule| rule.to_string()).unwrap_or_default(),
        ]);
        backends.push(json!({
            "workload": backend.workload, "node": backend.node, "address": address, "state": backend.state,
            "share": backend.share, "choice": backend.choice,
            "path": path(backend.path()), "why": backend.why, "allowed": backend.allowed,
            "verdict": backend.verdict, "policy": backend.policy, "rule": backend.rule,
        }));
    }
    let data = json!({
        "source": answer.source,
        "service": format!("{}/{}", service.namespace, service.hostname),
        "algorithm": choice.0,
        "locality": choice.1,
        "affinity": affinity,
        "backends": backends,
    });
    Ok(View { data, tables: vec![head, table] })
}

/// What keeps a client with one backend.
fn affinity(service: &ServiceExtension) -> String {
    match (service.affinity_timeout_seconds, service.algorithm()) {
        (0, Algorithm::Maglev) => "a client stays with one while the same serve".to_owned(),
        (0, Algorithm::WeightedRandom | Algorithm::RoundRobin | Algorithm::LeastConnections) => String::new(),
        (seconds, _) => format!("a client stays with one until it has not connected for {seconds} s"),
    }
}

/// In percent, with one decimal where that says something.
fn share(part: f64) -> String {
    let percent = format!("{:.1}", part * 100.0);
    match percent.strip_suffix(".0") {
        Some("0") => "<0.1 %".to_owned(),
        Some(whole) => format!("{whole} %"),
        None => format!("{percent} %"),
    }
}

fn path(path: Path) -> &'static str {
    match path {
        Path::Plaintext => "plaintext",
        Path::Kernel => "kernel",
        Path::Mtls => "mtls",
        Path::Refused => "refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percents() {
        for (part, shown) in
            [(1.0, "100 %"), (0.5, "50 %"), (1.0 / 3.0, "33.3 %"), (0.001, "0.1 %"), (0.000_01, "<0.1 %")]
        {
            assert_eq!(share(part), shown);
        }
    }

    #[test]
    fn what_keeps_a_client_is_said() {
        let of = |algorithm: Algorithm, seconds| {
            affinity(&ServiceExtension {
                algorithm: algorithm.into(),
                affinity_timeout_seconds: seconds,
                udp_ports: Vec::new(),
            })
        };
        assert_eq!(of(Algorithm::RoundRobin, 0), "");
        assert!(of(Algorithm::Maglev, 0).contains("while the same serve"));
        assert!(of(Algorithm::Maglev, 60).contains("60 s") && of(Algorithm::RoundRobin, 60).contains("60 s"));
    }
}
