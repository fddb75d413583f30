//! Metrics of the node proxy.

use super::family::{Families, Kind};

/// Figures of the node proxy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Proxy {
    /// Connections of workloads, and to them.
    pub sides: Vec<Side>,
    /// Pods by state.
    pub pods: Vec<(&'static str, u64)>,
    /// Connections of workloads that got no route, by why.
    pub no_routes: Vec<(&'static str, u64)>,
    /// Tunnels that wait for the next connection.
    pub idle_tunnels: u64,
    /// Bytes in large buffers.
    pub buffer_bytes: u64,
    /// Times that a pod's listeners could not be opened.
    pub listen_failures: u64,
    /// Times that a pod's network namespace could not be entered or guarded.
    pub namespace_failures: u64,
    /// Times that an application could not be shown its real client.
    pub unshown_clients: u64,
    /// Looks for the next event before sleeping, by outcome.
    pub busy_polls: Vec<(&'static str, u64)>,
    /// Time of these looks, in seconds.
    pub busy_poll_seconds: f64,
}

/// Of one side.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Side {
    /// `outbound` or `inbound`.
    pub name: &'static str,
    /// Connections now.
    pub connections: u64,
    /// Connections that were accepted.
    pub accepted: u64,
    /// Connections, or streams of a tunnel, by how they ended or why they were refused.
    pub outcomes: Vec<(&'static str, u64)>,
    /// Bytes from applications.
    pub sent: u64,
    /// Bytes to applications.
    pub received: u64,
    /// Handshakes by outcome.
    pub handshakes: Vec<(&'static str, u64)>,
    /// Streams put on a tunnel that was there.
    pub reused: u64,
    /// Streams that went to another endpoint than the first.
    pub retried: u64,
    /// How often each limit was reached.
    pub limits: Vec<(&'static str, u64)>,
}

/// Name, help, what kind, and where the value is.
type Figure<T> = (&'static str, &'static str, Kind, fn(&T) -> u64);

const SIDES: [Figure<Side>; 6] = [
    (
        "mesh_agent_proxy_connections",
        "Connections in the proxy, tunnels among them: inbound ones, idle or not, and each stream of HTTP/2.",
        Kind::Gauge,
        |s| s.connections,
    ),
    ("mesh_agent_proxy_accepted_total", "Connections that the proxy accepted.", Kind::Counter, |s| {
        s.accepted
    }),
    ("mesh_agent_proxy_sent_bytes_total", "Bytes from applications.", Kind::Counter, |s| s.sent),
    ("mesh_agent_proxy_received_bytes_total", "Bytes to applications.", Kind::Counter, |s| s.received),
    (
        "mesh_agent_proxy_reused_tunnels_total",
        "Connections that needed no handshake of their own.",
        Kind::Counter,
        |s| s.reused,
    ),
    (
        "mesh_agent_proxy_retries_total",
        "Connections that went to another endpoint than the first.",
        Kind::Counter,
        |s| s.retried,
    ),
];

/// Name, help, label, and where the values are.
type Series<T> = (&'static str, &'static str, &'static str, fn(&T) -> &[(&'static str, u64)]);

const SERIES: [Series<Side>; 3] = [
    ("mesh_agent_proxy_outcomes_total", "Connections by how they ended.", "outcome", |s| &s.outcomes),
    ("mesh_agent_proxy_handshakes_total", "TLS handshakes by outcome.", "outcome", |s| &s.handshakes),
    ("mesh_agent_proxy_limit_reached_total", "Times that a pod reached a limit.", "limit", |s| &s.limits),
];

const FIGURES: [Figure<Proxy>; 5] = [
    ("mesh_agent_proxy_idle_tunnels", "Tunnels without a connection.", Kind::Gauge, |p| p.idle_tunnels),
    (
        "mesh_agent_proxy_buffer_bytes",
        "Memory of the large buffers of busy connections, and what came by HTTP/2 and is not read. Small buffers are not counted.",
        Kind::Gauge,
        |p| p.buffer_bytes,
    ),
    (
        "mesh_agent_proxy_listen_failures_total",
        "Times that a pod's listeners could not be opened.",
        Kind::Counter,
        |p| p.listen_failures,
    ),
    (
        "mesh_agent_proxy_namespace_failures_total",
        "Times that a pod's network namespace could not be entered or guarded.",
        Kind::Counter,
        |p| p.namespace_failures,
    ),
    (
        "mesh_agent_proxy_unshown_clients_total",
        "Connections whose application saw the proxy's address instead of its client's.",
        Kind::Counter,
        |p| p.unshown_clients,
    ),
];

pub(super) fn proxy(families: &mut Families, proxy: &Proxy) {
    for (name, help, kind, value) in SIDES {
        let family = families.family(name, help, kind);
        for side in &proxy.sides {
            family.add([("side", side.name)], value(side) as f64);
        }
    }
    for (name, help, label, values) in SERIES {
        let family = families.family(name, help, Kind::Counter);
        for side in &proxy.sides {
            for (value, count) in values(side) {
                family.add([("side", side.name), (label, *value)], *count as f64);
            }
        }
    }
    for (name, help, kind, value) in FIGURES {
        families.family(name, help, kind).add([], value(proxy) as f64);
    }
    let pods =
        families.family("mesh_agent_proxy_pods", "Workloads of this node by their proxy.", Kind::Gauge);
    for (state, count) in &proxy.pods {
        pods.add([("state", *state)], *count as f64);
    }
    let routes = families.family(
        "mesh_agent_proxy_no_route_total",
        "Connections of workloads that led nowhere.",
        Kind::Counter,
    );
    for (why, count) in &proxy.no_routes {
        routes.add([("reason", *why)], *count as f64);
    }
    let polls = families.family(
        "mesh_agent_proxy_busy_polls_total",
        "Times that a thread looked for the next event before it slept.",
        Kind::Counter,
    );
    for (outcome, count) in &proxy.busy_polls {
        polls.add([("outcome", *outcome)], *count as f64);
    }
    let spent = "Time that threads spent with looking for the next event.";
    let spent = families.family("mesh_agent_proxy_busy_poll_seconds_total", spent, Kind::Counter);
    spent.add([], proxy.busy_poll_seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_shows_up_with_its_labels() {
        let mut families = Families::default();
        let side = Side {
            name: "inbound",
            connections: 1,
            outcomes: vec![("ended", 2), ("policy", 3)],
            limits: vec![("connections", 4)],
            ..Side::default()
        };
        let figures = Proxy {
            sides: vec![side],
            pods: vec![("ready", 5)],
            no_routes: vec![("unknown-destination", 6)],
            idle_tunnels: 7,
            busy_polls: vec![("found", 8)],
            busy_poll_seconds: 0.5,
            ..Proxy::default()
        };
        proxy(&mut families, &figures);
        let text = families.text();
        for line in [
            r#"mesh_agent_proxy_connections{side="inbound"} 1"#,
            r#"mesh_agent_proxy_outcomes_total{outcome="policy",side="inbound"} 3"#,
            r#"mesh_agent_proxy_limit_reached_total{limit="connections",side="inbound"} 4"#,
            r#"mesh_agent_proxy_pods{state="ready"} 5"#,
            r#"mesh_agent_proxy_no_route_total{reason="unknown-destination"} 6"#,
            "mesh_agent_proxy_idle_tunnels 7",
            r#"mesh_agent_proxy_busy_polls_total{outcome="found"} 8"#,
            "mesh_agent_proxy_busy_poll_seconds_total 0.5",
        ] {
            let found = text.lines().any(|found| {
                let sorted = |line: &str| {
                    let mut parts: Vec<String> = line.split(['{', ',', '}']).map(str::to_owned).collect();
                    parts.sort();
                    parts
                };
                sorted(found) == sorted(line)
            });
            assert!(found, "{line} in {text}");
        }
    }
}
