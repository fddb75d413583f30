use super::*;

fn faults(text: &str) -> Vec<(u32, String, String)> {
    let faults = parse(text).expect_err("refused");
    faults.into_iter().map(|f| (f.document, f.field, f.reason)).collect()
}

/// The only fault's field and reason.
fn fault(text: &str) -> (String, String) {
    let faults = faults(text);
    assert_eq!(faults.len(), 1, "{faults:?}");
    (faults[0].1.clone(), faults[0].2.clone())
}

fn service(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}\n")
}

#[test]
fn documents_are_counted_without_the_empty_ones() {
    let text = "---\n# only a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n\n---\n\
                apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n...\n%YAML 1.1\n---\n\
                {\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"c\"}}\n";
    let parsed = parse(text).unwrap();
    let found: Vec<_> = parsed.objects.iter().map(|o| (o.document, o.object.meta().name.as_str())).collect();
    assert_eq!(found, [(1, "a"), (2, "b"), (3, "c")]);
}

#[test]
fn nothing_is_in_an_empty_file() {
    assert!(parse("").unwrap().is_empty());
    assert!(parse("# nothing\n---\n---\n").unwrap().is_empty());
}

#[test]
fn json_documents_follow_each_other_and_lists_are_unpacked() {
    let namespace =
        |name: &str| format!(r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"name":"{name}"}}}}"#);
    let text = format!("{}\n{}", namespace("a"), namespace("b"));
    assert_eq!(parse(&text).unwrap().len(), 2);
    let list =
        format!(r#"{{"apiVersion":"v1","kind":"List","items":[{},{}]}}"#, namespace("a"), namespace("b"));
    assert_eq!(parse(&list).unwrap().len(), 2);
}

#[test]
fn a_fault_in_a_list_names_its_item() {
    let text =
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: A_B}}\n";
    assert_eq!(fault(text).0, "items[0].metadata.name");
}

#[test]
fn a_fault_names_document_field_and_reason() {
    let text = format!(
        "{}---\n{}",
        service("{clusterIP: 10.0.0.1, ports: [{port: 80}]}"),
        service("{ports: [{port: 70000}]}")
    );
    let (document, field, reason) = faults(&text).remove(0);
    assert_eq!((document, field.as_str()), (2, "spec.ports[0].port"));
    assert!(reason.contains("70000"), "{reason}");
}

#[test]
fn every_fault_of_a_file_is_told() {
    let text =
        service("{clusterIP: ten, ports: [{port: 0, name: a}, {port: 80, name: a}, {port: 80, name: A}]}");
    let fields: Vec<_> = faults(&text).into_iter().map(|f| f.1).collect();
    let expected = [
        "spec.clusterIP",
        "spec.ports[0].port",
        "spec.ports[1].name",
        "spec.ports[2].port",
        "spec.ports[2].name",
    ];
    assert_eq!(fields, expected);
}

#[test]
fn the_same_port_number_may_serve_tcp_and_udp() {
    let ports = "{clusterIP: 10.0.0.1, ports: [{port: 53, name: t}, {port: 53, name: u, protocol: UDP}]}";
    assert_eq!(parse(&service(ports)).unwrap().len(), 1);
}

#[test]
fn a_service_needs_addresses_of_different_families() {
    let (field, _) = fault(&service("{clusterIPs: [10.0.0.1, 10.0.0.2], ports: [{port: 80}]}"));
    assert_eq!(field, "spec.clusterIPs");
    let (field, _) = fault(&service("{clusterIPs: [10.0.0.1], ipFamilies: [IPv6], ports: [{port: 80}]}"));
    assert_eq!(field, "spec.ipFamilies");
    let (field, _) = fault(&service("{clusterIP: 10.0.0.2, clusterIPs: [10.0.0.1], ports: [{port: 80}]}"));
    assert_eq!(field, "spec.clusterIPs[0]");
    let (field, _) = fault(&service("{clusterIP: 0.0.0.0, ports: [{port: 80}]}"));
    assert_eq!(field, "spec.clusterIP");
}

#[test]
fn a_target_port_is_a_number_or_a_name() {
    assert!(parse(&service("{clusterIP: None, ports: [{port: 80, targetPort: http}]}")).is_ok());
    for bad in ["0", "70000", "-1", "Not_A_Name"] {
        let text = service(&format!("{{clusterIP: None, ports: [{{port: 80, targetPort: {bad}}}]}}"));
        assert_eq!(fault(&text).0, "spec.ports[0].targetPort", "{bad}");
    }
}

#[test]
fn affinity_has_a_default_and_bounds() {
    let seconds = |spec: &str| {
        let parsed = parse(&service(spec)).unwrap();
        let Object::Service(service) = &parsed.objects[0].object else { panic!("{parsed:?}") };
        service.affinity_seconds()
    };
    assert_eq!(seconds("{clusterIP: None}"), 0);
    assert_eq!(seconds("{clusterIP: None, sessionAffinity: ClientIP}"), 10_800);
    let config = |n: u32| {
        format!(
            "{{clusterIP: None, sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {n}}}}}}}"
        )
    };
    assert_eq!(seconds(&config(7)), 7);
    assert_eq!(fault(&service(&config(0))).0, "spec.sessionAffinityConfig.clientIP.timeoutSeconds");
}

#[test]
fn null_is_absent() {
    let text = service("{clusterIP: None, ports: null, selector: null, sessionAffinity: null}");
    assert_eq!(parse(&text).unwrap().len(), 1);
}

#[test]
fn broken_yaml_is_placed_by_its_line_in_the_file() {
    let text = format!("{}---\nkind: [\n", service("{clusterIP: None}"));
    let (document, field, reason) = faults(&text).remove(0);
    assert_eq!((document, field.as_str()), (2, ""));
    assert!(reason.contains("line 7") || reason.contains("line 8"), "{reason}");
}

#[test]
fn foreign_kinds_are_skipped_with_a_note() {
    let text = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: x}}\n---\n{}",
        service("{clusterIP: None}")
    );
    let parsed = parse(&text).unwrap();
    assert_eq!(parsed.len(), 1);
    assert_eq!((parsed.notes[0].document, parsed.notes[0].field.as_str()), (1, "kind"));
    assert!(parsed.notes[0].reason.contains("Deployment"));
}

#[test]
fn wrong_versions_and_kinds_of_our_own_group_are_refused() {
    assert_eq!(fault("apiVersion: v2\nkind: Service\nmetadata: {name: a}\n").0, "apiVersion");
    assert_eq!(fault("apiVersion: mesh.dev/v1alpha1\nkind: TraficPolicy\nmetadata: {name: a}\n").0, "kind");
    assert_eq!(fault("kind: Service\nmetadata: {name: a}\n").0, "apiVersion");
    assert_eq!(fault("apiVersion: v1\nmetadata: {name: a}\n").0, "kind");
    assert_eq!(fault("- a\n- b\n").1, "is not an object");
}

#[test]
fn an_object_twice_in_a_file_is_refused() {
    let text = format!("{0}---\n{0}", service("{clusterIP: None}"));
    assert_eq!(fault(&text).0, "metadata.name");
}

#[test]
fn policies_refuse_unknown_fields() {
    let policy = |spec: &str| {
        format!("apiVersion: mesh.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: p}}\nspec: {spec}\n")
    };
    let target = "targetRefs: [{group: '', kind: Service, name: web}]";
    assert!(parse(&policy(&format!("{{{target}, balancer: {{algorithm: Maglev}}}}"))).is_ok());
    let (field, reason) = fault(&policy(&format!("{{{target}, balancer: {{algorithm: Random}}}}")));
    assert_eq!(field, "spec.balancer.algorithm");
    assert!(reason.contains("Maglev"), "{reason}");
    let (field, reason) = fault(&policy(&format!("{{{target}, balancer: {{algoritm: Maglev}}}}")));
    assert!(field.starts_with("spec.balancer") && reason.contains("algoritm"), "{field}: {reason}");
}

#[test]
fn slices_are_checked_against_their_family() {
    let slice = |rest: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s, labels: {{kubernetes.io/service-name: web}}}}\n{rest}\n"
        )
    };
    assert!(parse(&slice("addressType: IPv6\nendpoints: [{addresses: ['fd00::1']}]")).is_ok());
    assert_eq!(
        fault(&slice("addressType: IPv6\nendpoints: [{addresses: [10.0.0.1]}]")).0,
        "endpoints[0].addresses[0]"
    );
    assert_eq!(fault(&slice("addressType: IPv4\nendpoints: [{}]")).0, "endpoints[0].addresses");
    assert_eq!(fault(&slice("endpoints: []")).0, "addressType");
}

#[test]
fn workload_entries_are_addresses_that_stay_in_their_subtree() {
    let entry = |annotation: &str, address: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: w, annotations: {{mesh.dev/cgroup: {annotation}}}}}\nspec: {{address: '{address}'}}\n"
        )
    };
    assert!(parse(&entry("/system.slice/a.service", "10.0.0.1")).is_ok());
    assert_eq!(fault(&entry("a", "vm.example.com")).0, "spec.address");
    assert_eq!(fault(&entry("a/../../b", "10.0.0.1")).0, "metadata.annotations[mesh.dev/cgroup]");
}

#[test]
fn service_entries_need_what_they_resolve_to() {
    let entry = |spec: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e}}\nspec: {spec}\n"
        )
    };
    let base = "hosts: [a.example.com], ports: [{number: 80, name: http, protocol: HTTP}]";
    assert!(
        parse(&entry(&format!("{{{base}, resolution: STATIC, endpoints: [{{address: 10.0.0.1}}]}}"))).is_ok()
    );
    assert_eq!(fault(&entry(&format!("{{{base}, resolution: DNS}}"))).0, "spec.resolution");
    assert_eq!(
        fault(&entry(&format!("{{{base}, resolution: NONE, endpoints: [{{address: 10.0.0.1}}]}}"))).0,
        "spec.endpoints"
    );
    assert_eq!(fault(&entry(&format!("{{{base}, addresses: [10.0.0.0/8]}}"))).0, "spec.addresses[0]");
    let twice = "resolution: STATIC, endpoints: [{address: 10.0.0.1}, {address: 10.0.0.1}]";
    assert_eq!(fault(&entry(&format!("{{{base}, {twice}}}"))).0, "spec.endpoints[1].address");
}

#[test]
fn unchanged_documents_are_not_parsed_again() {
    let mut cache = Cache::default();
    let text = |port: u16| {
        format!(
            "{}---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: a}}\n",
            service(&format!("{{clusterIP: None, ports: [{{port: {port}}}]}}"))
        )
    };
    let meta = |parsed: &Parsed| {
        let Object::Name(_, meta) = &parsed.objects[1].object else { panic!("{parsed:?}") };
        std::sync::Arc::clone(meta)
    };
    let before = parse_with(&text(80), &mut cache).unwrap();
    let after = parse_with(&text(81), &mut cache).unwrap();
    assert!(std::sync::Arc::ptr_eq(&meta(&before), &meta(&after)));
    assert_ne!(before.objects[0].object, after.objects[0].object);
}

#[test]
fn aliases_cannot_blow_a_document_up() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let line = (0..10).map(|_| format!("*a{}", i - 1)).collect::<Vec<_>>().join(", ");
        text.push_str(&format!("a{i}: &a{i} [{line}]\n"));
    }
    assert!(parse(&text).is_err());
}
