//! The control plane and its agents.

use mesh_common::api::mesh::v1::StatusResponse;
use serde_json::json;

use crate::table::{Table, View};

pub(crate) fn status(status: StatusResponse) -> anyhow::Result<View> {
    let mut control =
        Table::new(&["CONTROL PLANE", "UP", "REVISION", "SERVICES", "WORKLOADS", "FILE ERRORS"]);
    control.row([
        status.version.clone(),
        format!("{}s", status.uptime_seconds),
        status.revision.to_string(),
        status.services.to_string(),
        status.workloads.to_string(),
        status.file_errors.len().to_string(),
    ]);
    let columns =
        ["NODE", "VERSION", "ADDRESS", "CONNECTED", "SYNCED", "LAG", "LATE", "REJECTED", "LAST REJECTION"];
    let mut agents = Table::new(&columns);
    for agent in &status.agents {
        agents.row([
            agent.node.clone(),
            agent.version.clone(),
            agent.address.clone(),
            format!("{}s", agent.connected_seconds),
            if agent.synced { "yes" } else { "no" }.to_owned(),
            agent.lag.to_string(),
            format!("{}ms", agent.lag_milliseconds),
            agent.rejected.to_string(),
            agent.last_rejection.clone(),
        ]);
    }
    let mut tables = vec![control, agents];
    if !status.file_errors.is_empty() {
        let mut errors = Table::new(&["FILE", "DOCUMENT", "FIELD", "REASON"]);
        for error in &status.file_errors {
            let document = if error.document == 0 { String::new() } else { error.document.to_string() };
            errors.row([error.file.clone(), document, error.field.clone(), error.reason.clone()]);
        }
        tables.push(errors);
    }
    let agents = status.agents.iter().map(|agent| {
        json!({
            "node": agent.node, "version": agent.version, "address": agent.address,
            "connected_seconds": agent.connected_seconds, "synced": agent.synced, "lag": agent.lag,
            "lag_milliseconds": agent.lag_milliseconds, "acknowledged_revision": agent.acknowledged_revision,
            "rejected": agent.rejected, "last_rejection": agent.last_rejection,
        })
    });
    let errors = status.file_errors.iter().map(|error| {
        json!({"file": error.file, "document": error.document, "field": error.field, "reason": error.reason})
    });
    let data = json!({
        "version": status.version,
        "uptime_seconds": status.uptime_seconds,
        "revision": status.revision,
        "services": status.services,
        "workloads": status.workloads,
        "agents": agents.collect::<Vec<_>>(),
        "file_errors": errors.collect::<Vec<_>>(),
    });
    Ok(View { data, tables })
}
