//! What would come of a connection.

use mesh_common::api::{
    SERVICE_EXTENSION,
    mesh::v1::{ExplainResponse, ServiceExtension, explained_backend::Path},
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
    let mut head = Table::new(&["SOURCE", "SERVICE", "ALGORITHM", "LOCALITY"]);
    head.row([
        answer.source.clone(),
        format!("{}/{}", service.namespace, service.hostname),
        choice.0.to_owned(),
        choice.1.clone(),
    ]);
    let columns =
        ["BACKEND", "NODE", "ADDRESS", "STATE", "PATH", "WHY", "ALLOWED", "VERDICT", "POLICY", "RULE"];
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
            path(backend.path()).to_owned(),
            backend.why.clone(),
            if backend.allowed { "yes" } else { "no" }.to_owned(),
            backend.verdict.clone(),
            backend.policy.clone(),
            backend.rule.map(|rule| rule.to_string()).unwrap_or_default(),
        ]);
        backends.push(json!({
            "workload": backend.workload, "node": backend.node, "address": address, "state": backend.state,
            "path": path(backend.path()), "why": backend.why, "allowed": backend.allowed,
            "verdict": backend.verdict, "policy": backend.policy, "rule": backend.rule,
        }));
    }
    let data = json!({
        "source": answer.source,
        "service": format!("{}/{}", service.namespace, service.hostname),
        "algorithm": choice.0,
        "locality": choice.1,
        "backends": backends,
    });
    Ok(View { data, tables: vec![head, table] })
}

fn path(path: Path) -> &'static str {
    match path {
        Path::Plaintext => "plaintext",
        Path::Kernel => "kernel",
        Path::Mtls => "mtls",
        Path::Refused => "refused",
    }
}
