use std::collections::{HashMap, HashSet};

use super::*;

/// One sample: name, labels, value.
type Sample = (String, Vec<(String, String)>, f64);

/// Reads Prometheus' text format (version 0.0.4) strictly; panics on what a scraper would refuse.
fn parse(text: &str) -> Vec<Sample> {
    assert!(text.ends_with('\n'));
    let (mut kinds, mut helped, mut samples) = (HashMap::new(), HashSet::new(), Vec::<Sample>::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect(line);
            assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect(line);
            assert!(["counter", "gauge", "summary"].contains(&kind), "{line}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
        } else {
            assert!(!line.starts_with('#') && !line.is_empty(), "{line}");
            let sample = sample(line);
            let base = sample.0.strip_suffix("_sum").or(sample.0.strip_suffix("_count")).unwrap_or(&sample.0);
            let kind = kinds.get(&sample.0).or_else(|| kinds.get(base)).expect(line);
            assert_eq!(kind == "counter", sample.0.ends_with("_total"), "{line}");
            assert!(!samples.iter().any(|s| (&s.0, &s.1) == (&sample.0, &sample.1)), "twice: {line}");
            samples.push(sample);
        }
    }
    samples
}

fn sample(line: &str) -> Sample {
    let name_end = line.find(['{', ' ']).expect(line);
    let name = &line[..name_end];
    assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':'), "{line}");
    let mut labels = Vec::new();
    let mut rest = &line[name_end..];
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").expect(line);
            assert!(label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{line}");
            let (value, after) = quoted(after);
            labels.push((label.to_owned(), value));
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').expect(line).parse().expect(line);
    (name.to_owned(), labels, value)
}

fn quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.push(match chars.next().unwrap().1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    panic!("not closed: {text}");
}

fn connections() -> Connections {
    Connections {
        source: Peer {
            workload: "client".into(),
            namespace: "shop".into(),
            principal: "spiffe://cluster.local/ns/shop/sa/client".into(),
        },
        service: "web.shop.svc.cluster.local".into(),
        service_name: "web".into(),
        service_namespace: "shop".into(),
        destination: Peer { workload: "web-1".into(), namespace: "shop".into(), principal: String::new() },
        response_flags: String::new(),
        opened: 5,
        closed: 4,
        failed: 0,
        bytes_sent: 100,
        bytes_received: 2_000,
        retransmits: 1,
        connect_seconds: 0.25,
        connect_count: 5,
    }
}

fn value(samples: &[Sample], name: &str) -> f64 {
    let found: Vec<_> = samples.iter().filter(|s| s.0 == name).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found[0].2
}

#[test]
fn an_agent_that_knows_nothing_is_scraped() {
    let samples = parse(&render(&View::default()));
    assert_eq!(value(&samples, "mesh_agent_xds_connected"), 0.0);
    assert_eq!(value(&samples, "mesh_agent_map_write_failures_total"), 0.0);
    assert!(!samples.iter().any(|s| s.0.starts_with("istio_")));
}

#[test]
fn connections_have_istios_names_and_labels() {
    let samples = parse(&render(&View { connections: vec![connections()], ..View::default() }));
    for (name, wanted) in [
        ("istio_tcp_connections_opened_total", 5.0),
        ("istio_tcp_connections_closed_total", 4.0),
        // Istio counts from the server: it sent what the client received.
        ("istio_tcp_sent_bytes_total", 2_000.0),
        ("istio_tcp_received_bytes_total", 100.0),
        ("mesh_agent_retransmits_total", 1.0),
        ("mesh_agent_connect_seconds_sum", 0.25),
        ("mesh_agent_connect_seconds_count", 5.0),
    ] {
        assert_eq!(value(&samples, name), wanted, "{name}");
    }
    let opened = samples.iter().find(|s| s.0 == "istio_tcp_connections_opened_total").unwrap();
    let names: Vec<_> = opened.1.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, TCP_LABELS);
    let labels: HashMap<_, _> = opened.1.iter().cloned().collect();
    for (label, wanted) in [
        ("reporter", "source"),
        ("source_workload", "client"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/client"),
        ("destination_service", "web.shop.svc.cluster.local"),
        ("destination_service_name", "web"),
        ("destination_workload", "web-1"),
        ("request_protocol", "tcp"),
        ("connection_security_policy", "unknown"),
        ("response_flags", "-"),
    ] {
        assert_eq!(labels[label], wanted, "{label}");
    }
}

#[test]
fn equal_labels_are_summed() {
    let samples =
        parse(&render(&View { connections: vec![connections(), connections()], ..View::default() }));
    assert_eq!(value(&samples, "istio_tcp_connections_opened_total"), 10.0);
    assert_eq!(value(&samples, "mesh_agent_connect_seconds_count"), 10.0);
}

#[test]
fn what_is_not_known_says_so() {
    let unknown = Connections { opened: 1, ..Connections::default() };
    let samples = parse(&render(&View { connections: vec![unknown], ..View::default() }));
    let opened = samples.iter().find(|s| s.0 == "istio_tcp_connections_opened_total").unwrap();
    assert!(opened.1.contains(&("source_workload".to_owned(), "unknown".to_owned())));
}

#[test]
fn hostile_names_cannot_break_the_format() {
    let hostile = "a\"} 1\nistio_fake 99\\";
    let mut connections = connections();
    connections.source.workload = hostile.to_owned();
    let view = View {
        connections: vec![connections],
        reasons: vec![(hostile.to_owned(), 3)],
        maps: vec![MapUse { name: hostile.to_owned(), entries: 1, capacity: 2 }],
        ..View::default()
    };
    let samples = parse(&render(&view));
    assert!(!samples.iter().any(|s| s.0 == "istio_fake"));
    let reason = samples.iter().find(|s| s.0 == "mesh_agent_datapath_reasons_total").unwrap();
    assert_eq!(reason.1, [("reason".to_owned(), hostile.to_owned())]);
}

#[test]
fn the_agents_own_figures_are_there() {
    let view = View {
        reasons: vec![("no_backend".into(), 2), ("passed".into(), 9)],
        maps: vec![MapUse { name: "SERVICES".into(), entries: 7, capacity: 16 }],
        xds_connected: true,
        xds_rejected: 3,
        services: 4,
        workloads: 5,
        map_write_failures: 6,
        refused_credentials: 7,
        certificates: Certificates {
            states: vec![("ready", 8), ("expired", 1)],
            fetches: vec![("issued", 9)],
            earliest_expiry: Some(12.5),
        },
        ..View::default()
    };
    let samples = parse(&render(&view));
    for (name, wanted) in [
        ("mesh_agent_map_entries", 7.0),
        ("mesh_agent_map_capacity", 16.0),
        ("mesh_agent_xds_connected", 1.0),
        ("mesh_agent_xds_rejected_total", 3.0),
        ("mesh_agent_services", 4.0),
        ("mesh_agent_workloads", 5.0),
        ("mesh_agent_map_write_failures_total", 6.0),
        ("mesh_agent_refused_credentials_total", 7.0),
        ("mesh_agent_certificate_fetches_total", 9.0),
        ("mesh_agent_certificate_expiry_seconds", 12.5),
        ("mesh_agent_build_info", 1.0),
    ] {
        assert_eq!(value(&samples, name), wanted, "{name}");
    }
    let states: f64 = samples.iter().filter(|s| s.0 == "mesh_agent_certificates").map(|s| s.2).sum();
    assert_eq!(states, 9.0);
    let reasons = samples.iter().filter(|s| s.0 == "mesh_agent_datapath_reasons_total").count();
    assert_eq!(reasons, 2);
}
