use super::super::fixtures::{
    extend_service, extend_workload, of_service, of_workload, parsed, parsed_workload, ports, resource,
    service, workload,
};
use super::*;

const WEB: &str = "shop/web.shop.svc.cluster.local";
const POD: &str = "Kubernetes//Pod/shop/web-1";

fn refused(resource: &xds::Resource) -> String {
    decode_one(resource.clone(), &mut Interner::new("node-a")).unwrap_err().reason
}

fn refused_service(change: impl FnOnce(&mut wire::Service)) -> String {
    let mut message = service(WEB, &["10.96.0.1"], &[(80, 8080)]);
    change(&mut message);
    refused(&of_service(message, "1"))
}

fn refused_workload(change: impl FnOnce(&mut wire::Workload)) -> String {
    let mut message = workload(POD, "10.244.0.1", "node-a", &[WEB]);
    change(&mut message);
    refused(&of_workload(message, "1"))
}

fn good_service(message: wire::Service) -> Arc<Service> {
    match parsed(&of_service(message, "1")).resource {
        Resource::Service(service) => service,
        Resource::Workload(_) => panic!("a workload"),
    }
}

#[test]
fn a_service_is_read() {
    let extension = ext::ServiceExtension {
        algorithm: ext::Algorithm::Maglev.into(),
        affinity_timeout_seconds: 10_800,
        udp_ports: ports(&[(53, 5353), (80, 0)]),
    };
    let mut message =
        extend_service(service(WEB, &["10.96.0.1", "fd00::1"], &[(80, 8080), (81, 0)]), &extension);
    message.load_balancing = Some(wire::LoadBalancing {
        routing_preference: vec![wire_lb::Scope::Network.into(), wire_lb::Scope::Zone.into()],
        mode: wire_lb::Mode::Failover.into(),
        health_policy: wire_lb::HealthPolicy::AllowAll.into(),
    });
    let service = good_service(message);
    assert_eq!(&*service.key, WEB);
    assert_eq!(*service.addresses, ["10.96.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    let port = |port, protocol, target| ServicePort { port, protocol, target };
    let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
    let wanted =
        [port(80, tcp, Some(8080)), port(81, tcp, None), port(53, udp, Some(5353)), port(80, udp, None)];
    assert_eq!(*service.ports, wanted);
    assert_eq!(service.algorithm, Algorithm::Maglev);
    assert_eq!(service.affinity_seconds, 10_800);
    assert_eq!(*service.preference, [Scope::Network, Scope::Zone]);
    assert_eq!((service.mode, service.allow_unready), (Mode::Failover, true));
}

#[test]
fn a_plain_service_has_the_defaults() {
    let service = good_service(service(WEB, &[], &[]));
    assert_eq!((service.algorithm, service.affinity_seconds), (Algorithm::WeightedRandom, 0));
    assert_eq!((service.mode, service.allow_unready), (Mode::Any, false));
}

#[test]
fn a_service_to_pass_through_has_no_address_to_translate() {
    let mut message = service(WEB, &["10.96.0.1"], &[(80, 8080)]);
    message.load_balancing =
        Some(wire::LoadBalancing { mode: wire_lb::Mode::Passthrough.into(), ..Default::default() });
    assert_eq!(good_service(message).addresses.len(), 0);
}

#[test]
fn what_a_workload_sends_may_be_meshed_where_what_it_takes_is_not() {
    let read = |tunnel: wire::TunnelProtocol, outbound_meshed| {
        let message = wire::Workload {
            tunnel_protocol: tunnel.into(),
            ..workload(POD, "10.244.0.1", "node-a", &[WEB])
        };
        let extension = ext::WorkloadExtension { outbound_meshed, ..Default::default() };
        let workload = parsed_workload(extend_workload(message, &extension));
        (workload.meshed, workload.outbound_meshed)
    };
    assert_eq!(read(wire::TunnelProtocol::Hbone, false), (true, true));
    assert_eq!(read(wire::TunnelProtocol::None, true), (false, true));
    assert_eq!(read(wire::TunnelProtocol::None, false), (false, false));
}

#[test]
fn a_workload_is_read() {
    let other = "shop/other.shop.svc.cluster.local";
    let mut message = workload(POD, "10.244.0.1", "node-a", &[WEB, other]);
    message.services.insert(WEB.to_owned(), wire::PortList { ports: ports(&[(81, 9081), (80, 8080)]) });
    message.status = wire::WorkloadStatus::Unhealthy.into();
    message.network_mode = wire::NetworkMode::HostNetwork.into();
    message.capacity = Some(7);
    message.service_account = "web".to_owned();
    message.trust_domain = "mesh.example".to_owned();
    message.locality = Some(wire::Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() });
    let extension = ext::WorkloadExtension {
        pod_uid: "uid".to_owned(),
        cgroup: "a/b".to_owned(),
        unready_in: vec![other.to_owned()],
        terminating_in: vec![WEB.to_owned()],
        udp_services: [(WEB.to_owned(), wire::PortList { ports: ports(&[(80, 5080)]) })].into(),
        outbound_meshed: true,
        outdone: true,
    };
    let workload = parsed_workload(extend_workload(message, &extension));
    assert!(!workload.outbound_meshed, "it shares the network of its node");
    assert!(workload.outdone);
    assert_eq!((&*workload.uid(), &*workload.name), (POD, "web-1"));
    assert_eq!(
        (&*workload.account().namespace, &*workload.account().service_account, &*workload.node),
        ("shop", "web", "node-a")
    );
    assert_eq!(&*workload.account().trust_domain, "mesh.example");
    assert_eq!((workload.healthy, workload.host_network, workload.weight), (false, true, 7));
    assert_eq!((&*workload.locality.region, &*workload.locality.subzone), ("r", "s"));
    assert_eq!((workload.pod_uid.as_deref(), workload.cgroup.as_deref()), (Some("uid"), Some("a/b")));
    let mapping = |port, protocol, target| PortMapping { port, protocol, target };
    let web = workload.membership(WEB).unwrap();
    let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
    assert_eq!(*web.ports, [mapping(80, tcp, 8080), mapping(80, udp, 5080), mapping(81, tcp, 9081)]);
    assert_eq!((web.unready, web.terminating), (false, true));
    let other = workload.membership(other).unwrap();
    assert_eq!((other.ports.len(), other.unready, other.terminating), (0, true, false));
    assert!(workload.membership("shop/none").is_none());
}

#[test]
fn weight_is_one_when_absent_and_may_be_zero() {
    assert_eq!(parsed_workload(workload(POD, "10.0.0.1", "", &[])).weight, 1);
    let message = wire::Workload { capacity: Some(0), ..workload(POD, "10.0.0.1", "", &[]) };
    assert_eq!(parsed_workload(message).weight, 0);
}

#[test]
fn cgroups_of_other_nodes_are_not_kept() {
    let extension = ext::WorkloadExtension { pod_uid: "u".into(), cgroup: "c".into(), ..Default::default() };
    let on = |node| parsed_workload(extend_workload(workload(POD, "10.0.0.1", node, &[]), &extension));
    assert_eq!((on("node-b").pod_uid.as_deref(), on("node-b").cgroup.as_deref()), (None, None));
    assert_eq!((on("node-a").pod_uid.as_deref(), on("").cgroup.as_deref()), (Some("u"), Some("c")));
}

#[test]
fn wrong_ports_are_refused_by_field() {
    for (service_port, target, field) in [
        (0, 80, "service.ports[1].service_port"),
        (65_536, 80, "service.ports[1].service_port"),
        (u32::MAX, 80, "service.ports[1].service_port"),
        (81, 65_536, "service.ports[1].target_port"),
        (80, 9090, "service.ports[1].service_port: 80/TCP is there twice"),
    ] {
        let reason = refused_service(|s| s.ports = ports(&[(80, 8080), (service_port, target)]));
        assert!(reason.starts_with(field), "{reason}");
    }
    let udp = ext::ServiceExtension { udp_ports: ports(&[(53, 1), (53, 2)]), ..Default::default() };
    let reason = refused(&of_service(extend_service(service(WEB, &[], &[]), &udp), "1"));
    assert!(reason.contains("udp_ports[1]") && reason.contains("53/UDP"), "{reason}");
    for (list, field) in [
        (ports(&[(0, 1)]), "[0].service_port"),
        (ports(&[(1, 0)]), "[0].target_port"),
        (ports(&[(1, 70_000)]), "[0].target_port"),
        (ports(&[(1, 1), (1, 2)]), "[1].service_port"),
    ] {
        let reason =
            refused_workload(|w| _ = w.services.insert(WEB.to_owned(), wire::PortList { ports: list }));
        assert!(reason.starts_with("workload.services[") && reason.contains(field), "{reason}");
    }
}

#[test]
fn wrong_addresses_are_refused_by_field() {
    for length in [0, 3, 5, 15, 17, 100] {
        let reason = refused_service(|s| s.addresses[0].address = vec![1; length]);
        assert!(reason.starts_with("service.addresses[0]: "), "{reason}");
        let reason = refused_workload(|w| w.addresses.push(vec![1; length]));
        assert!(reason.starts_with("workload.addresses[1]: "), "{reason}");
    }
}

#[test]
fn unknown_enum_values_are_refused_by_field() {
    let balancing = |change: fn(&mut wire::LoadBalancing)| {
        refused_service(|s| change(s.load_balancing.insert(wire::LoadBalancing::default())))
    };
    for (reason, field) in [
        (balancing(|b| b.mode = 9), "service.load_balancing.mode"),
        (balancing(|b| b.health_policy = 9), "service.load_balancing.health_policy"),
        (balancing(|b| b.routing_preference = vec![1, 7]), "service.load_balancing.routing_preference"),
        (balancing(|b| b.routing_preference = vec![0]), "service.load_balancing.routing_preference"),
        (refused_workload(|w| w.status = 5), "workload.status"),
        (refused_workload(|w| w.network_mode = -1), "workload.network_mode"),
        (
            refused(&of_service(
                extend_service(
                    service(WEB, &[], &[]),
                    &ext::ServiceExtension { algorithm: 4, ..Default::default() },
                ),
                "1",
            )),
            "mesh.dev/service.algorithm",
        ),
    ] {
        assert!(reason.starts_with(field) && reason.contains("unknown value"), "{reason}");
    }
}

#[test]
fn what_nothing_here_reads_may_have_any_value() {
    let mut message = service(WEB, &["10.96.0.1"], &[(80, 8080)]);
    message.ports[0].app_protocol = 77;
    message.ip_families = 77;
    good_service(message);
    let mut message = workload(POD, "10.0.0.1", "", &[]);
    message.workload_type = 77;
    parsed_workload(message);
}

#[test]
fn what_a_workload_of_this_node_is_an_instance_of_is_kept_once_for_all_of_them() {
    let extension = ext::WorkloadExtension { pod_uid: "u".into(), ..Default::default() };
    let mut interner = Interner::new("node-a");
    let mut on = |node: &str, name: &str, kind: i32| {
        let mut message = workload(&format!("c//Pod/shop/{name}"), "10.0.0.1", node, &[]);
        (message.workload_name, message.workload_type) = ("web".to_owned(), kind);
        (message.canonical_name, message.canonical_revision) = ("shop".to_owned(), "v2".to_owned());
        let resource = of_workload(extend_workload(message, &extension), "1");
        match decode_one(resource, &mut interner).unwrap().resource {
            Resource::Workload(workload) => workload,
            Resource::Service(_) => panic!("a service"),
        }
    };
    let deployment = wire::WorkloadType::Deployment.into();
    let [one, other] = ["web-1", "web-2"].map(|name| on("node-a", name, deployment).app.clone().unwrap());
    assert!(Arc::ptr_eq(&one, &other));
    let wanted = App {
        controller: Controller::Deployment,
        name: "web".into(),
        service: "shop".into(),
        version: "v2".into(),
    };
    assert_eq!(*one, wanted);
    // Workloads of another node share what they have in common, as without it.
    let [one, other] = ["web-3", "web-4"].map(|name| on("node-b", name, deployment));
    assert!(one.app.is_none() && Arc::ptr_eq(&one.place, &other.place));
    for (kind, wanted) in [
        (wire::WorkloadType::Cronjob.into(), Controller::CronJob),
        (wire::WorkloadType::Job.into(), Controller::Job),
        (wire::WorkloadType::Pod.into(), Controller::Pod),
        // Nothing is decided by it, so nothing is refused for it.
        (77, Controller::Pod),
    ] {
        assert_eq!(on("node-a", "web-1", kind).app.as_ref().unwrap().controller, wanted);
    }
    let refused = refused_workload(|w| {
        *w = extend_workload(std::mem::take(w), &extension);
        w.node = "node-a".to_owned();
        w.canonical_name = "x".repeat(2_000);
    });
    assert!(refused.starts_with("workload.canonical_name"), "{refused}");
}

#[test]
fn mutual_tls_is_for_workloads_with_an_address_of_their_own() {
    let mut message = workload(POD, "10.0.0.1", "node-a", &[]);
    assert!(!parsed_workload(message.clone()).meshed);
    message.tunnel_protocol = wire::TunnelProtocol::LegacyIstioMtls.into();
    assert!(!parsed_workload(message.clone()).meshed);
    message.tunnel_protocol = wire::TunnelProtocol::Hbone.into();
    assert!(parsed_workload(message.clone()).meshed);
    message.network_mode = wire::NetworkMode::HostNetwork.into();
    assert!(!parsed_workload(message).meshed);
}

#[test]
fn names_have_to_match_the_content() {
    let mut named = of_service(service(WEB, &[], &[]), "1");
    named.name = "shop/other".to_owned();
    assert!(refused(&named).starts_with("name: "));
    for (reason, field) in [
        (refused_service(|s| s.hostname.clear()), "service.hostname"),
        (refused_service(|s| s.namespace.clear()), "service.namespace"),
        (refused_service(|s| s.namespace = "a/b".to_owned()), "service.namespace"),
        (refused_workload(|w| w.uid.clear()), "workload.uid"),
        (refused_workload(|w| w.uid = "x".repeat(2_000)), "workload.uid"),
        (refused_workload(|w| w.tunnel_protocol = 77), "workload.tunnel_protocol"),
        (refused_workload(|w| w.node = "a\nb".to_owned()), "workload.node"),
        (
            refused_workload(|w| _ = w.services.insert(String::new(), wire::PortList::default())),
            "workload.services",
        ),
    ] {
        assert!(reason.starts_with(field), "{reason}");
    }
}

#[test]
fn states_in_services_of_others_are_refused() {
    let strange = ext::WorkloadExtension { unready_in: vec!["shop/other".to_owned()], ..Default::default() };
    let reason = refused(&of_workload(extend_workload(workload(POD, "10.0.0.1", "", &[WEB]), &strange), "1"));
    assert!(reason.starts_with("mesh.dev/workload.unready_in"), "{reason}");
}

#[test]
fn wrong_envelopes_are_refused() {
    let good = of_service(service(WEB, &[], &[]), "1");
    let with = |change: fn(&mut xds::Resource)| {
        let mut resource = good.clone();
        change(&mut resource);
        refused(&resource)
    };
    assert_eq!(with(|r| r.resource = None), "resource: missing");
    assert!(with(|r| r.resource.as_mut().unwrap().type_url = "x/y".into()).starts_with("resource.type_url"));
    assert!(with(|r| r.resource.as_mut().unwrap().value = vec![0xff; 40]).starts_with("resource.value"));
    assert!(with(|r| r.resource.as_mut().unwrap().value.truncate(5)).starts_with("resource.value"));
    assert!(with(|r| r.resource.as_mut().unwrap().value.clear()).starts_with("type: "));
    let mut message = service(WEB, &[], &[]);
    message.extensions = vec![wire::Extension { name: SERVICE_EXTENSION.into(), config: None }];
    assert!(refused(&of_service(message.clone(), "1")).contains("config: missing"));
    let config = prost_types::Any { type_url: "x".into(), value: Vec::new() };
    message.extensions[0].config = Some(config);
    assert!(refused(&of_service(message.clone(), "1")).contains("config.type_url"));
    let config = prost_types::Any { type_url: SERVICE_EXTENSION_TYPE.into(), value: vec![0xff] };
    message.extensions[0].config = Some(config);
    assert!(refused(&of_service(message.clone(), "1")).contains("config.value"));
    message.extensions[0].name = "somebody.else".to_owned();
    good_service(message);
}

#[test]
fn one_bad_resource_leaves_the_others() {
    let bad = resource("bad\n", "1", wire::address::Type::Workload(wire::Workload::default()));
    let good =
        [of_service(service(WEB, &[], &[]), "a"), of_workload(workload(POD, "10.0.0.1", "", &[]), "b")];
    let [first, second] = good;
    let (taken, rejected) = decode([first, bad, second], &mut Interner::new("n"));
    assert_eq!(taken.iter().map(|v| &*v.name).collect::<Vec<_>>(), [WEB, POD]);
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0].name, "bad\u{fffd}");
}

#[test]
fn bytes_at_random_are_refused_and_never_panic() {
    // xorshift: the same bytes in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let good = of_workload(workload(POD, "10.0.0.1", "node-a", &[WEB]), "1");
    let mut wrong = 0;
    for _ in 0..20_000 {
        let mut resource = good.clone();
        let value = &mut resource.resource.as_mut().unwrap().value;
        for _ in 0..3 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let at = state as usize % value.len();
            value[at] = (state >> 32) as u8;
        }
        wrong += usize::from(decode_one(resource, &mut Interner::new("n")).is_err());
    }
    assert!(wrong > 10_000, "{wrong}");
}

#[test]
fn policies_are_kept_once_each_and_in_order() {
    let names = |names: &[&str]| {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let pod = workload(POD, "10.0.0.7", "node-a", &[]);
        of_workload(wire::Workload { authorization_policies: names, ..pod }, "1")
    };
    let Resource::Workload(read) = parsed(&names(&["b/x", "a/y", "b/x"])).resource else {
        panic!("a service")
    };
    let read: Vec<&str> = read.policies().iter().map(|name| &**name).collect();
    assert_eq!(read, ["a/y", "b/x"]);
    let wrong = decode_one(names(&["a/y", ""]), &mut Interner::new("n")).unwrap_err();
    assert!(wrong.reason.contains("workload.authorization_policies[1]: missing"), "{}", wrong.reason);
}

#[test]
fn what_is_written_for_the_disk_reads_the_same() {
    use super::super::encode::encode;
    let extension = ext::WorkloadExtension {
        pod_uid: "uid".to_owned(),
        unready_in: vec![WEB.to_owned()],
        udp_services: [(WEB.to_owned(), wire::PortList { ports: ports(&[(80, 5080)]) })].into(),
        ..Default::default()
    };
    let mut pod = extend_workload(workload(POD, "fd00::7", "node-a", &[WEB]), &extension);
    pod.capacity = Some(0);
    pod.trust_domain = "mesh.example".to_owned();
    pod.authorization_policies = vec!["shop/one".to_owned()];
    pod.network_mode = 1;
    let udp =
        ext::ServiceExtension { udp_ports: ports(&[(53, 0)]), algorithm: 2, affinity_timeout_seconds: 5 };
    let mut web = extend_service(service(WEB, &["10.96.0.1"], &[(80, 0)]), &udp);
    web.load_balancing = Some(wire::LoadBalancing { routing_preference: vec![4], mode: 1, health_policy: 1 });
    for sent in [of_workload(pod, "0abc"), of_service(web, "v2")] {
        let read = parsed(&sent);
        assert_eq!(parsed(&encode(&read.resource, &read.version)), read);
    }
}

#[test]
fn an_ipv4_address_mapped_into_ipv6_is_an_ipv4_address() {
    let service = good_service(service(WEB, &["::ffff:10.96.0.1"], &[(80, 8080)]));
    assert_eq!(*service.addresses, ["10.96.0.1".parse::<IpAddr>().unwrap()]);
}
