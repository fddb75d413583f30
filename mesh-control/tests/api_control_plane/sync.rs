//! What a new subscriber is sent: services and workloads in full.

use mesh_common::api::istio::workload::{
    IpFamilies, NetworkMode, Workload, WorkloadStatus, load_balancing::Mode,
};

use crate::{manifests::*, world::World};

#[tokio::test]
async fn pods_without_slices_are_chosen_by_the_selector() {
    let documents = [web(), pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), node("node-a", "z1")];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let subscriber = world.subscriber().await;
    assert_eq!(subscriber.held.len(), 3);
    let (service, _) = subscriber.service(WEB);
    assert_eq!(service.addresses[0].address, [10, 96, 0, 1]);
    assert_eq!((service.ports[0].service_port, service.ports[0].target_port), (80, 8080));
    assert_eq!(
        (service.hostname.as_str(), service.ip_families()),
        ("web.shop.svc.cluster.local", IpFamilies::Ipv4Only)
    );
    let (workload, extension) = subscriber.workload(&pod_uid("a"));
    assert_eq!(workload.addresses, [[10, 0, 0, 1]]);
    assert_eq!((workload.node.as_str(), workload.service_account.as_str()), ("node-a", "web"));
    assert_eq!((workload.status(), extension.pod_uid.as_str()), (WorkloadStatus::Healthy, "uid-a"));
    let locality = workload.locality.unwrap();
    assert_eq!((locality.region.as_str(), locality.zone.as_str()), ("r1", "z1"));
    assert_eq!(subscriber.ports(&pod_uid("a"), WEB), [(80, 8080)]);
}

#[tokio::test]
async fn slices_replace_the_selector() {
    let slice =
        slice("web-1", "IPv4", &[pod_endpoint("a", "10.0.0.1", "ready: true")], "{name: http, port: 9090}");
    let documents = [web(), pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), slice];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let subscriber = world.subscriber().await;
    assert_eq!(subscriber.ports(&pod_uid("a"), WEB), [(80, 9090)]);
    let (left_out, _) = subscriber.workload(&pod_uid("b"));
    assert!(left_out.services.is_empty());
    assert_eq!(subscriber.held.len(), 3);
}

#[tokio::test]
async fn endpoints_without_a_pod_are_workloads_of_their_own() {
    let endpoints = [
        "{addresses: ['10.0.0.1'], nodeName: node-a, zone: z9}".to_owned(),
        pod_endpoint("unknown", "10.0.0.2", "ready: true"),
    ];
    let slice = slice("web-1", "IPv4", &endpoints, "{name: http, port: 8080}");
    let world = World::start(&[("all.yaml", &file(&[web(), slice, node("node-a", "z1")]))]).await;
    let mut subscriber = world.subscriber().await;
    let (workload, _) = subscriber.workload(&slice_uid("web-1", "10.0.0.1"));
    assert_eq!((workload.network_mode(), workload.node.as_str()), (NetworkMode::HostNetwork, "node-a"));
    assert_eq!(workload.locality.unwrap().zone, "z9");
    assert_eq!(subscriber.ports(&slice_uid("web-1", "10.0.0.2"), WEB), [(80, 8080)]);

    // When its pod becomes known, the pod takes the endpoint's place.
    world.write("pod.yaml", &pod("unknown", "10.0.0.2"));
    let told = subscriber.next().await;
    assert_eq!((told.put, told.removed), (vec![pod_uid("unknown")], vec![slice_uid("web-1", "10.0.0.2")]));
    assert_eq!(subscriber.ports(&pod_uid("unknown"), WEB), [(80, 8080)]);
    world.remove("pod.yaml");
    let told = subscriber.next().await;
    assert_eq!((told.put, told.removed), (vec![slice_uid("web-1", "10.0.0.2")], vec![pod_uid("unknown")]));
}

#[tokio::test]
async fn named_ports_are_looked_up_in_each_pod() {
    let web =
        service("web", "clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: http}]");
    let ports = ", containers: [{name: c, ports: [{name: http, containerPort: 8081}]}]";
    let documents = [web, pod_with("a", "10.0.0.1", "", ports, "True"), pod("b", "10.0.0.2")];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let subscriber = world.subscriber().await;
    assert_eq!(subscriber.service(WEB).0.ports[0].target_port, 0);
    assert_eq!(subscriber.ports(&pod_uid("a"), WEB), [(80, 8081)]);
    // A pod without the port is a member that does not serve it.
    assert_eq!(subscriber.ports(&pod_uid("b"), WEB), []);
}

#[tokio::test]
async fn a_port_that_a_slice_lacks_is_not_served_by_it() {
    let web = service(
        "web",
        "clusterIP: 10.96.0.1, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 81, targetPort: 8081}]",
    );
    let one = slice("web-1", "IPv4", &[endpoint("10.0.0.1")], "{name: a, port: 8080}, {name: b, port: 8081}");
    let two = slice("web-2", "IPv4", &[endpoint("10.0.0.2")], "{name: a, port: 8080}");
    let world = World::start(&[("a.yaml", &file(&[web, one])), ("two.yaml", &two)]).await;
    let mut subscriber = world.subscriber().await;
    let targets = |service: mesh_common::api::istio::workload::Service| -> Vec<u32> {
        service.ports.iter().map(|port| port.target_port).collect()
    };
    assert_eq!(targets(subscriber.service(WEB).0), [8080, 0]);
    assert_eq!(subscriber.ports(&slice_uid("web-1", "10.0.0.1"), WEB), [(80, 8080), (81, 8081)]);
    assert_eq!(subscriber.ports(&slice_uid("web-2", "10.0.0.2"), WEB), [(80, 8080)]);
    world.remove("two.yaml");
    let told = subscriber.next().await;
    assert_eq!((told.put, told.removed), (vec![WEB.to_owned()], vec![slice_uid("web-2", "10.0.0.2")]));
    assert_eq!(targets(subscriber.service(WEB).0), [8080, 8081]);
}

#[tokio::test]
async fn tcp_and_udp_share_a_port_number() {
    let ports = "{name: t, port: 53, targetPort: 5353}, {name: u, port: 53, targetPort: 5300, protocol: UDP}";
    let dns = service("web", &format!("clusterIP: 10.96.0.10, selector: {{app: web}}, ports: [{ports}]"));
    let world = World::start(&[("all.yaml", &file(&[dns, pod("a", "10.0.0.1")]))]).await;
    let subscriber = world.subscriber().await;
    let (service, extension) = subscriber.service(WEB);
    let pair = |port: &mesh_common::api::istio::workload::Port| (port.service_port, port.target_port);
    assert_eq!(service.ports.iter().map(pair).collect::<Vec<_>>(), [(53, 5353)]);
    assert_eq!(extension.udp_ports.iter().map(pair).collect::<Vec<_>>(), [(53, 5300)]);
    assert_eq!(subscriber.ports(&pod_uid("a"), WEB), [(53, 5353)]);
    let (_, extension) = subscriber.workload(&pod_uid("a"));
    assert_eq!(pair(&extension.udp_services[WEB].ports[0]), (53, 5300));
}

#[tokio::test]
async fn both_families_are_served() {
    let web = service(
        "web",
        "clusterIPs: [10.96.0.1, 'fd00::1'], ports: [{name: http, port: 80, targetPort: 8080}]",
    );
    let four = slice("web-4", "IPv4", &[pod_endpoint("a", "10.0.0.1", "")], "{name: http, port: 8080}");
    let six = slice(
        "web-6",
        "IPv6",
        &[pod_endpoint("a", "fd01::1", ""), endpoint("fd01::2")],
        "{name: http, port: 8080}",
    );
    let a =
        pod("a", "10.0.0.1").replace("podIPs: [{ip: 10.0.0.1}]", "podIPs: [{ip: 10.0.0.1}, {ip: 'fd01::1'}]");
    let world = World::start(&[("all.yaml", &file(&[web, four, six, a]))]).await;
    let subscriber = world.subscriber().await;
    let (service, _) = subscriber.service(WEB);
    assert_eq!(service.addresses.iter().map(|a| a.address.len()).collect::<Vec<_>>(), [4, 16]);
    assert_eq!(service.ip_families(), IpFamilies::Dual);
    let (workload, _) = subscriber.workload(&pod_uid("a"));
    assert_eq!(workload.addresses.iter().map(Vec::len).collect::<Vec<_>>(), [4, 16]);
    assert_eq!(subscriber.ports(&slice_uid("web-6", "fd01::2"), WEB), [(80, 8080)]);
}

#[tokio::test]
async fn headless_services_have_no_address_and_aliases_are_not_sent() {
    let headless = service("web", "clusterIP: None, selector: {app: web}, ports: [{port: 80}]");
    let alias = service(
        "alias",
        "type: ExternalName, externalName: example.com, selector: {app: web}, ports: [{port: 80}]",
    );
    let world = World::start(&[("all.yaml", &file(&[headless, alias, pod("a", "10.0.0.1")]))]).await;
    let subscriber = world.subscriber().await;
    assert_eq!(subscriber.held.keys().collect::<Vec<_>>(), [&pod_uid("a"), WEB]);
    assert!(subscriber.service(WEB).0.addresses.is_empty());
    assert_eq!(subscriber.workload(&pod_uid("a")).0.services.len(), 1);
}

#[tokio::test]
async fn finished_pods_are_not_sent_and_unscheduled_ones_neither() {
    let finished = pod("done", "10.0.0.9").replace("Running", "Succeeded");
    let pending =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop, labels: {app: web}}\nspec: {}\n";
    let scheduled = "apiVersion: v1\nkind: Pod\nmetadata: {name: s, namespace: shop, uid: u, labels: {app: web}}\nspec: {nodeName: n}\n";
    let documents = [web(), finished, pending.into(), scheduled.into()];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let subscriber = world.subscriber().await;
    assert_eq!(subscriber.held.keys().collect::<Vec<_>>(), [&pod_uid("s"), WEB]);
    // A pod is announced as soon as it has a node, long before it serves.
    let (workload, extension) = subscriber.workload(&pod_uid("s"));
    assert_eq!((workload.addresses.len(), workload.services.len(), extension.pod_uid.as_str()), (0, 0, "u"));
}

#[tokio::test]
async fn plain_hosts_take_part_by_entries() {
    let workload = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
        metadata: {name: vm, namespace: shop, annotations: {mesh.dev/cgroup: system.slice/web.service, mesh.dev/node: node-b}}\n\
        spec: {address: 10.1.0.1, labels: {app: web}, weight: 3, locality: r2/z2/s2, serviceAccount: vm, ports: {http: 9000}}\n";
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: db, namespace: shop}\n\
        spec:\n  hosts: [db.example.com]\n  addresses: [240.0.0.1]\n  resolution: STATIC\n\
        \x20 ports: [{number: 5432, name: tcp, protocol: TCP, targetPort: 15432}]\n\
        \x20 endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2, ports: {tcp: 6000}, locality: r9/z9}]\n";
    let selecting = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: sel, namespace: shop}\n\
        spec: {hosts: [sel.example.com], resolution: STATIC, ports: [{number: 80, name: http}], workloadSelector: {labels: {app: web}}}\n";
    let files = [web(), workload.into(), entry.into(), selecting.into(), pod("a", "10.0.0.1")];
    let world = World::start(&[("all.yaml", &file(&files))]).await;
    let subscriber = world.subscriber().await;
    let uid = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm";
    let (vm, extension) = subscriber.workload(uid);
    assert_eq!((vm.capacity, vm.node.as_str(), vm.service_account.as_str()), (Some(3), "node-b", "vm"));
    assert_eq!(extension.cgroup, "system.slice/web.service");
    assert_eq!(vm.locality.unwrap().subzone, "s2");
    assert_eq!(subscriber.ports(uid, WEB), [(80, 9000)]);
    assert_eq!(subscriber.ports(uid, "shop/sel.example.com"), [(80, 9000)]);
    assert_eq!(subscriber.ports(&pod_uid("a"), "shop/sel.example.com"), [(80, 80)]);
    let (db, _) = subscriber.service("shop/db.example.com");
    assert_eq!((db.addresses[0].address.as_slice(), db.ports[0].target_port), (&[240, 0, 0, 1][..], 15432));
    let inline = |ip| format!("Kubernetes/networking.istio.io/ServiceEntry/shop/db/{ip}");
    assert_eq!(subscriber.ports(&inline("192.0.2.1"), "shop/db.example.com"), [(5432, 15432)]);
    assert_eq!(subscriber.ports(&inline("192.0.2.2"), "shop/db.example.com"), [(5432, 6000)]);
}

#[tokio::test]
async fn an_entry_without_resolution_is_passed_through() {
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e, namespace: shop}\n\
        spec: {hosts: [e.example.com], addresses: [240.0.0.9], resolution: NONE, ports: [{number: 443, name: tls, protocol: TLS}]}\n";
    let world = World::start(&[("all.yaml", entry)]).await;
    let subscriber = world.subscriber().await;
    let (service, _) = subscriber.service("shop/e.example.com");
    assert_eq!(service.load_balancing.unwrap().mode(), Mode::Passthrough);
}

#[tokio::test]
async fn an_empty_directory_is_answered_and_json_is_read() {
    let world = World::start(&[]).await;
    let mut subscriber = world.subscriber().await;
    assert!(subscriber.held.is_empty());
    let json = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "j"}, "spec": {"nodeName": "n"}}"#;
    world.write("pod.json", json);
    assert_eq!(subscriber.next().await.put, ["Kubernetes//Pod/default/j"]);
    let (workload, _): (Workload, _) = subscriber.workload("Kubernetes//Pod/default/j");
    assert_eq!(workload.service_account, "");
}
