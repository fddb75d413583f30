//! Prometheus metrics, rendered from plain data at each scrape.
//!
//! The figures live in kernel maps and in the agent's state; copying them into a registry of live counters would only add
//! a second place where they can be wrong. Names and labels are Istio's where they mean the same.

mod family;
mod policy;
mod proxy;
mod view;

pub use policy::Policy;
pub use proxy::{Proxy, Side as ProxySide};
pub use view::{Certificates, Connections, MapUse, Peer, View};

use family::{Families, Kind};

/// Content type of [`render`]'s text.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Istio's labels of a TCP metric, in its order.
const TCP_LABELS: [&str; 12] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_workload",
    "destination_workload_namespace",
    "request_protocol",
    "connection_security_policy",
    "response_flags",
];

/// The text that a scrape gets.
pub fn render(view: &View) -> String {
    let mut families = Families::default();
    connections(&mut families, view);
    agent(&mut families, view);
    certificates(&mut families, &view.certificates);
    policy::policy(&mut families, &view.policy);
    proxy::proxy(&mut families, &view.proxy);
    families.text()
}

/// Name, help, and where the value is.
type Figure<T> = (&'static str, &'static str, fn(&T) -> u64);

fn connections(families: &mut Families, view: &View) {
    let counters: [Figure<Connections>; 6] = [
        ("istio_tcp_connections_opened_total", "TCP connections opened.", |c| c.opened),
        ("istio_tcp_connections_closed_total", "TCP connections closed.", |c| c.closed),
        ("istio_tcp_connections_failed_total", "TCP connections refused, or that could not be made.", |c| {
            c.failed
        }),
        (
            "istio_tcp_sent_bytes_total",
            "Bytes that the destination sent, as Istio counts: in responses.",
            |c| c.bytes_received,
        ),
        ("istio_tcp_received_bytes_total", "Bytes that the destination received: in requests.", |c| {
            c.bytes_sent
        }),
        ("mesh_agent_retransmits_total", "TCP segments that had to be sent again.", |c| c.retransmits),
    ];
    for (name, help, value) in counters {
        let family = families.family(name, help, Kind::Counter);
        for connections in &view.connections {
            let labels = tcp_labels(connections);
            // A series that never counted anything is left out, or each one would show up in all six.
            if value(connections) > 0 || name == "istio_tcp_connections_opened_total" {
                family.add(TCP_LABELS.into_iter().zip(labels), value(connections) as f64);
            }
        }
    }
    let family = families.family(
        "mesh_agent_connect_seconds",
        "Time from the SYN to the established connection.",
        Kind::Summary,
    );
    for connections in view.connections.iter().filter(|c| c.connect_count > 0) {
        let labels = TCP_LABELS.into_iter().zip(tcp_labels(connections));
        family.add_summary(labels, connections.connect_seconds, connections.connect_count);
    }
}

fn tcp_labels(of: &Connections) -> [&str; 12] {
    [
        "source",
        unknown(&of.source.workload),
        unknown(&of.source.namespace),
        unknown(&of.source.principal),
        unknown(&of.service),
        unknown(&of.service_name),
        unknown(&of.service_namespace),
        unknown(&of.destination.workload),
        unknown(&of.destination.namespace),
        "tcp",
        // As Istio has it at the source, which does not see what is carried how.
        "unknown",
        if of.response_flags.is_empty() { "-" } else { &of.response_flags },
    ]
}

fn unknown(text: &str) -> &str {
    if text.is_empty() { "unknown" } else { text }
}

fn agent(families: &mut Families, view: &View) {
    let reasons = families.family(
        "mesh_agent_datapath_reasons_total",
        "Decisions of the kernel programs by their reason.",
        Kind::Counter,
    );
    for (reason, count) in &view.reasons {
        reasons.add([("reason", reason.as_str())], *count as f64);
    }
    let maps: [Figure<MapUse>; 2] = [
        ("mesh_agent_map_entries", "Entries in a kernel map.", |m| m.entries),
        ("mesh_agent_map_capacity", "Most entries that a kernel map can hold.", |m| m.capacity),
    ];
    for (name, help, value) in maps {
        let family = families.family(name, help, Kind::Gauge);
        for map in &view.maps {
            family.add([("map", map.name.as_str())], value(map) as f64);
        }
    }
    let counters = [
        (
            "mesh_agent_map_write_failures_total",
            "Writes to kernel maps that failed.",
            view.map_write_failures,
        ),
        (
            "mesh_agent_map_write_retries_total",
            "Writes to kernel maps that were tried again.",
            view.map_write_retries,
        ),
        (
            "mesh_agent_xds_rejected_total",
            "Resources of the control plane that were refused.",
            view.xds_rejected,
        ),
        (
            "mesh_agent_xds_disconnects_total",
            "Streams to the control plane that ended or failed.",
            view.xds_disconnects,
        ),
        (
            "mesh_agent_cgroup_overflows_total",
            "Times that events of the cgroup tree were lost and it was walked.",
            view.cgroup_overflows,
        ),
        (
            "mesh_agent_cgroup_polls_total",
            "Walks of the cgroup tree because not all of it can be watched.",
            view.cgroup_polls,
        ),
        (
            "mesh_agent_snapshot_save_failures_total",
            "Times that the snapshot could not be saved to disk.",
            view.snapshot_save_failures,
        ),
        (
            "mesh_agent_unsaved_changes_total",
            "Changes that were acknowledged to the control plane although the disk did not take them.",
            view.unsaved_changes,
        ),
        (
            "mesh_agent_refused_credentials_total",
            "Times that the control plane did not take this node's token or certificate.",
            view.refused_credentials,
        ),
    ];
    for (name, help, value) in counters {
        families.family(name, help, Kind::Counter).add([], value as f64);
    }
    let gauges = [
        (
            "mesh_agent_xds_connected",
            "Whether there is a stream to the control plane.",
            u64::from(view.xds_connected),
        ),
        ("mesh_agent_ready", "Whether the agent has a snapshot in force.", u64::from(view.ready)),
        ("mesh_agent_services", "Services known.", view.services),
        ("mesh_agent_workloads", "Workloads known.", view.workloads),
        ("mesh_agent_enrolled_cgroups", "Cgroups of this node that are a workload's.", view.enrolled_cgroups),
        (
            "mesh_agent_cgroup_watch_limited",
            "Whether a part of the cgroup tree cannot be watched.",
            u64::from(view.cgroup_watch_limited),
        ),
        (
            "mesh_agent_refused_services",
            "Services that are not in force because a map is full.",
            view.refused_services,
        ),
    ];
    for (name, help, value) in gauges {
        families.family(name, help, Kind::Gauge).add([], value as f64);
    }
    let info = families.family("mesh_agent_build_info", "Version of the agent.", Kind::Gauge);
    info.add([("version", env!("CARGO_PKG_VERSION"))], 1.0);
}

fn certificates(families: &mut Families, view: &Certificates) {
    let states = families.family("mesh_agent_certificates", "Certificates by state.", Kind::Gauge);
    for (state, count) in &view.states {
        states.add([("state", *state)], *count as f64);
    }
    let fetches = families.family(
        "mesh_agent_certificate_fetches_total",
        "Attempts to get a certificate by outcome.",
        Kind::Counter,
    );
    for (outcome, count) in &view.fetches {
        fetches.add([("outcome", *outcome)], *count as f64);
    }
    let expiry = families.family(
        "mesh_agent_certificate_expiry_seconds",
        "Time until the first of the certificates in use expires.",
        Kind::Gauge,
    );
    if let Some(seconds) = view.earliest_expiry {
        expiry.add([], seconds);
    }
}

#[cfg(test)]
mod tests;
