//! What an agent tells of its node, in tables. The data is passed on as it came.

use serde_json::Value;

use crate::table::{Table, View};

pub(crate) fn services(data: Value) -> anyhow::Result<View> {
    let columns = [
        "SERVICE",
        "ADDRESS",
        "ALGORITHM",
        "AFFINITY",
        "GENERATION",
        "BACKEND",
        "WEIGHT",
        "OPEN",
        "WORKLOAD",
    ];
    let mut table = Table::new(&columns);
    for service in items(&data) {
        let address = format!("{}/{}", joined(service), text(service, "protocol"));
        let affinity = match text(service, "affinity_seconds").as_str() {
            "" | "0" => String::new(),
            seconds => format!("{seconds}s"),
        };
        let head = [
            text(service, "service"),
            address,
            text(service, "algorithm"),
            affinity,
            text(service, "generation"),
        ];
        let backends: Vec<_> = items(&service["backends"]).collect();
        if backends.is_empty() {
            let none = ["none".to_owned(), String::new(), String::new(), String::new()];
            table.row(head.into_iter().chain(none));
            continue;
        }
        for backend in backends {
            let fields = ["weight", "open_connections", "workload"].map(|name| text(backend, name));
            table.row(head.clone().into_iter().chain([joined(backend)]).chain(fields));
        }
    }
    Ok(View { data, tables: vec![table] })
}

pub(crate) fn workloads(data: Value) -> anyhow::Result<View> {
    let mut table = Table::new(&["NAMESPACE", "NAME", "ACCOUNT", "PROXY", "IDENTITY", "CGROUP", "PATH"]);
    for workload in items(&data) {
        let head =
            ["namespace", "name", "service_account", "proxy", "identity"].map(|name| text(workload, name));
        let cgroups: Vec<_> = items(&workload["cgroups"]).collect();
        if cgroups.is_empty() {
            table.row(head.clone().into_iter().chain(["none".to_owned(), String::new()]));
        }
        for cgroup in cgroups {
            table.row(head.clone().into_iter().chain(["id", "path"].map(|name| text(cgroup, name))));
        }
    }
    Ok(View { data, tables: vec![table] })
}

pub(crate) fn certificates(data: Value) -> anyhow::Result<View> {
    let mut table = Table::new(&["IDENTITY", "STATE", "SERIAL", "NOT AFTER", "RENEWAL", "LAST ERROR"]);
    for certificate in items(&data) {
        let fields = ["identity", "state", "serial_number", "not_after", "renewal", "last_error"];
        table.row(fields.map(|name| text(certificate, name)));
    }
    Ok(View { data, tables: vec![table] })
}

pub(crate) fn denials(data: Value) -> anyhow::Result<View> {
    // By a dry run nothing was refused.
    let mode = |of: &Value| if of["dry_run"] == true { "dry run" } else { "enforced" }.to_owned();
    let mut counts = Table::new(&["POLICY", "SIDE", "DENIALS", "MODE"]);
    for count in items(&data["counts"]) {
        let [policy, side, denials] = ["policy", "side", "denials"].map(|name| text(count, name));
        counts.row([policy, side, denials, mode(count)]);
    }
    let mut last = Table::new(&["TIME", "SIDE", "FROM", "TO", "AT", "POLICY", "RULE", "CAUSE", "MODE"]);
    for denial in items(&data["last"]) {
        // Who it is, as well as that is known: by its place in the mesh, by its identity, by its address.
        let who = |end: &Value| {
            let known = ["workload", "identity", "address"].map(|name| text(end, name));
            known.into_iter().find(|name| !name.is_empty()).unwrap_or_default()
        };
        let (source, destination) = (&denial["source"], &denial["destination"]);
        last.row([
            text(denial, "time"),
            text(denial, "side"),
            who(source),
            who(destination),
            text(destination, "address"),
            text(denial, "policy"),
            text(denial, "rule"),
            text(denial, "cause"),
            mode(denial),
        ]);
    }
    Ok(View { data, tables: vec![counts, last] })
}

pub(crate) fn stats(data: Value) -> anyhow::Result<View> {
    let columns = [
        "SOURCE",
        "SERVICE",
        "BACKEND",
        "OUTCOME",
        "CONNECTIONS",
        "CLOSED",
        "SENT",
        "RECEIVED",
        "RETRANSMITS",
        "CONNECT MEAN",
    ];
    let mut connections = Table::new(&columns);
    for connection in items(&data["connections"]) {
        let fields = [
            "source",
            "service",
            "backend",
            "outcome",
            "connections",
            "closed",
            "bytes_sent",
            "bytes_received",
            "retransmits",
        ];
        let number = |name: &str| connection[name].as_f64().unwrap_or(0.0);
        let (sum, count) = (number("connect_seconds_sum"), number("connect_seconds_count"));
        let mean = if count > 0.0 { format!("{:.0}us", sum / count * 1e6) } else { String::new() };
        connections.row(fields.map(|name| text(connection, name)).into_iter().chain([mean]));
    }
    let mut reasons = Table::new(&["REASON", "COUNT"]);
    for reason in items(&data["reasons"]) {
        reasons.row(["reason", "count"].map(|name| text(reason, name)));
    }
    let tables = vec![connections, reasons, maps(&data)];
    Ok(View { data, tables })
}

pub(crate) fn status(data: Value) -> anyhow::Result<View> {
    let mut node = Table::new(&[
        "NODE",
        "VERSION",
        "READY",
        "CONTROL PLANE",
        "CONNECTED",
        "SNAPSHOT",
        "SERVICES",
        "WORKLOADS",
        "WRITE FAILURES",
        "LAST ERROR",
    ]);
    let (control, snapshot) = (&data["control_plane"], &data["snapshot"]);
    node.row([
        text(&data, "node"),
        text(&data, "version"),
        text(&data, "ready"),
        text(control, "address"),
        text(control, "connected"),
        text(snapshot, "source"),
        text(snapshot, "services"),
        text(snapshot, "workloads"),
        text(&data, "write_failures"),
        text(control, "last_error"),
    ]);
    let mut programs = Table::new(&["PROGRAM", "ATTACHED", "ID"]);
    for program in items(&data["programs"]) {
        programs.row(["name", "attach", "id"].map(|name| text(program, name)));
    }
    let mut tables = vec![node, programs, maps(&data)];
    let refused: Vec<_> = items(&data["rejected"])
        .map(|item| (item, "name"))
        .chain(items(&data["refused"]).map(|item| (item, "service")))
        .collect();
    if !refused.is_empty() {
        let mut table = Table::new(&["NOT IN FORCE", "REASON"]);
        for (item, name) in refused {
            table.row([text(item, name), text(item, "reason")]);
        }
        tables.push(table);
    }
    Ok(View { data, tables })
}

fn maps(data: &Value) -> Table {
    let mut table = Table::new(&["MAP", "ENTRIES", "CAPACITY"]);
    for map in items(&data["maps"]) {
        table.row(["name", "entries", "capacity"].map(|name| text(map, name)));
    }
    table
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A field as text; absent is empty.
fn text(value: &Value, name: &str) -> String {
    match &value[name] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => other.to_string(),
    }
}

/// `address:port`, with brackets around IPv6.
fn joined(value: &Value) -> String {
    let (address, port) = (text(value, "address"), text(value, "port"));
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}
