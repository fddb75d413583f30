//! Readiness, locality, affinity, algorithm.

use mesh_common::api::{
    istio::workload::{
        WorkloadStatus,
        load_balancing::{HealthPolicy, Mode, Scope},
    },
    mesh::v1::Algorithm,
};

use crate::{manifests::*, world::World};

fn policy(name: &str, service: &str, algorithm: &str) -> String {
    format!(
        "apiVersion: mesh.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{targetRefs: [{{group: '', kind: Service, name: {service}}}], balancer: {{algorithm: {algorithm}}}}}\n"
    )
}

#[tokio::test]
async fn unready_and_terminating_are_told_per_service() {
    // `web` goes by slices, `all` by the selector and publishes whatever is there.
    let all = service(
        "all",
        "clusterIP: 10.96.0.2, selector: {app: web}, publishNotReadyAddresses: true, ports: [{port: 80}]",
    );
    let endpoints = [
        pod_endpoint("a", "10.0.0.1", "ready: true"),
        pod_endpoint("b", "10.0.0.2", "ready: false, serving: true, terminating: true"),
        pod_endpoint("c", "10.0.0.3", "ready: false, serving: false, terminating: true"),
        pod_endpoint("d", "10.0.0.4", "ready: false"),
    ];
    let slice = slice("web-1", "IPv4", &endpoints, "{name: http, port: 8080}");
    let pods = [("a", 1), ("b", 2), ("c", 3), ("d", 4)].map(|(name, n)| pod(name, &format!("10.0.0.{n}")));
    let world = World::start(&[("all.yaml", &file(&[web(), all, slice, pods.join("---\n")]))]).await;
    let subscriber = world.subscriber().await;
    let lists = |name: &str| {
        let (workload, extension) = subscriber.workload(&pod_uid(name));
        (workload.status(), extension.unready_in, extension.terminating_in)
    };
    let (healthy, web, none) = (WorkloadStatus::Healthy, vec![WEB.to_owned()], vec![]);
    assert_eq!(lists("a"), (healthy, none.clone(), none.clone()));
    assert_eq!(lists("b"), (healthy, none.clone(), web.clone()));
    assert_eq!(lists("c"), (healthy, web.clone(), none.clone()));
    assert_eq!(lists("d"), (healthy, web, none));
    let (service, _) = subscriber.service("shop/all.shop.svc.cluster.local");
    assert_eq!(service.load_balancing.unwrap().health_policy(), HealthPolicy::AllowAll);
}

#[tokio::test]
async fn a_workload_that_is_ready_nowhere_is_unhealthy() {
    let documents = [
        web(),
        pod_with("unready", "10.0.0.1", "", "", "False"),
        pod_with("leaving", "10.0.0.2", ", deletionTimestamp: '2026-01-01T00:00:00Z'", "", "True"),
    ];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let subscriber = world.subscriber().await;
    let (workload, extension) = subscriber.workload(&pod_uid("unready"));
    assert_eq!((workload.status(), extension.terminating_in.len()), (WorkloadStatus::Unhealthy, 0));
    let (workload, extension) = subscriber.workload(&pod_uid("leaving"));
    assert_eq!(
        (workload.status(), extension.terminating_in),
        (WorkloadStatus::Unhealthy, vec![WEB.to_owned()])
    );
}

#[tokio::test]
async fn locality_rules_are_written_as_the_workload_api_has_them() {
    let rule =
        |name: &str, spec: &str| service(name, &format!("clusterIP: None, ports: [{{port: 80}}]{spec}"));
    let documents = [
        rule("plain", ""),
        rule("local", ", internalTrafficPolicy: Local, trafficDistribution: PreferClose"),
        rule("close", ", trafficDistribution: PreferClose"),
        rule("zone", ", trafficDistribution: PreferSameZone"),
        rule("node", ", trafficDistribution: PreferSameNode"),
    ];
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let subscriber = world.subscriber().await;
    let rule = |name: &str| {
        let (service, _) = subscriber.service(&format!("shop/{name}.shop.svc.cluster.local"));
        service.load_balancing.map(|b| (b.routing_preference().collect::<Vec<_>>(), b.mode()))
    };
    let zone = vec![Scope::Network, Scope::Region, Scope::Zone];
    assert_eq!(rule("plain"), None);
    assert_eq!(rule("local"), Some((vec![Scope::Node], Mode::Strict)));
    assert_eq!(rule("close"), Some((zone.clone(), Mode::Failover)));
    assert_eq!(rule("zone"), Some((zone.clone(), Mode::Failover)));
    assert_eq!(rule("node"), Some(([zone, vec![Scope::Subzone, Scope::Node]].concat(), Mode::Failover)));
}

#[tokio::test]
async fn affinity_and_algorithm_change_the_service_alone() {
    let world = World::start(&[("web.yaml", &web()), ("pod.yaml", &pod("a", "10.0.0.1"))]).await;
    let mut subscriber = world.subscriber().await;
    assert_eq!(subscriber.service(WEB).1.algorithm(), Algorithm::WeightedRandom);

    world.write("policy.yaml", &policy("p", "web", "Maglev"));
    assert_eq!(subscriber.next().await.put, [WEB]);
    assert_eq!(subscriber.service(WEB).1.algorithm(), Algorithm::Maglev);

    world.write("web.yaml", &web().replace("ports:", "sessionAffinity: ClientIP, ports:"));
    assert_eq!(subscriber.next().await.put, [WEB]);
    let (_, extension) = subscriber.service(WEB);
    assert_eq!((extension.affinity_timeout_seconds, extension.algorithm()), (10_800, Algorithm::Maglev));

    world.remove("policy.yaml");
    assert_eq!(subscriber.next().await.put, [WEB]);
    assert_eq!(subscriber.service(WEB).1.algorithm(), Algorithm::WeightedRandom);
}

#[tokio::test]
async fn of_two_policies_the_first_counts_and_the_other_is_reported() {
    let world = World::start(&[("web.yaml", &web()), ("b.yaml", &policy("b", "web", "Maglev"))]).await;
    let mut subscriber = world.subscriber().await;
    world.write("a.yaml", &policy("a", "web", "RoundRobin"));
    subscriber.next().await;
    assert_eq!(subscriber.service(WEB).1.algorithm(), Algorithm::RoundRobin);
    let (file, document, field, reason) = world.faults().await.remove(0);
    assert_eq!((file.as_str(), document, field.as_str()), ("b.yaml", 1, "spec.targetRefs[0]"));
    assert!(reason.contains("TrafficPolicy a"), "{reason}");
}
