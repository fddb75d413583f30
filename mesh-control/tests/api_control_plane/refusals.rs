//! Policies that are refused, and what their author is told: the field, and that nothing of the file is in force.

use crate::{
    manifests::{file, peers, policy, web},
    world::World,
};

/// Kind, spec, field at fault, part of the reason.
const REFUSED: &[(&str, &str, &str, &str)] = &[
    ("a", "action: AUDIT, rules: [{}]", "spec.action", "AUDIT and CUSTOM are not supported"),
    (
        "a",
        "action: CUSTOM, provider: {name: x}, rules: [{}]",
        "spec.action",
        "AUDIT and CUSTOM are not supported",
    ),
    ("a", "action: BLOCK", "spec.action", "unknown variant `BLOCK`"),
    ("a", "action: DENY", "spec.rules", "is empty"),
    ("a", "provider: {name: x}", "spec.provider", "CUSTOM"),
    ("a", "targetRefs: [{kind: Service, name: web}]", "spec.targetRefs", "not supported yet"),
    ("a", "targetRef: {kind: Service, name: web}", "spec.targetRef", "not supported yet"),
    (
        "a",
        "selector: {matchExpressions: [{key: app, operator: Exists}]}",
        "spec.selector.matchExpressions",
        "unknown field",
    ),
    ("a", "selector: {matchLabels: {app: 'w*'}}", "spec.selector.matchLabels[app]", "wildcards"),
    ("a", "selector: {matchLabels: {'': web}}", "spec.selector.matchLabels[]", "has no key"),
    ("a", "rule: [{}]", "spec.rule", "unknown field"),
    ("a", "rules: [{form: []}]", "spec.rules[0].form", "unknown field"),
    ("a", "rules: [{from: []}]", "spec.rules[0].from", "is empty"),
    ("a", "rules: [{to: []}]", "spec.rules[0].to", "is empty"),
    ("a", "rules: [{from: [{}]}]", "spec.rules[0].from[0].source", "is empty"),
    ("a", "rules: [{from: [{source: {}}]}]", "spec.rules[0].from[0].source", "is empty"),
    ("a", "rules: [{to: [{operation: {}}]}]", "spec.rules[0].to[0].operation", "is empty"),
    (
        "a",
        "rules: [{from: [{source: {principal: [x]}}]}]",
        "spec.rules[0].from[0].source.principal",
        "unknown field",
    ),
    (
        "a",
        "rules: [{from: [{source: {principals: ['']}}]}]",
        "spec.rules[0].from[0].source.principals[0]",
        "is empty",
    ),
    (
        "a",
        "rules: [{from: [{source: {namespaces: [a, '']}}]}]",
        "spec.rules[0].from[0].source.namespaces[1]",
        "is empty",
    ),
    (
        "a",
        "rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]",
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "10.0.0.0/33",
    ),
    (
        "a",
        "rules: [{from: [{source: {ipBlocks: [10.0.0.0/-1]}}]}]",
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "neither",
    ),
    (
        "a",
        "rules: [{from: [{source: {ipBlocks: [10.0.0]}}]}]",
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "neither",
    ),
    (
        "a",
        "rules: [{from: [{source: {notIpBlocks: ['']}}]}]",
        "spec.rules[0].from[0].source.notIpBlocks[0]",
        "neither",
    ),
    (
        "a",
        "rules: [{from: [{source: {ipBlocks: ['::ffff:10.0.0.1']}}]}]",
        "spec.rules[0].from[0].source.ipBlocks[0]",
        "IPv4",
    ),
    (
        "a",
        "rules: [{from: [{source: {serviceAccounts: ['a/b/c']}}]}]",
        "spec.rules[0].from[0].source.serviceAccounts[0]",
        "a/b/c",
    ),
    (
        "a",
        "rules: [{from: [{source: {serviceAccounts: ['*']}}]}]",
        "spec.rules[0].from[0].source.serviceAccounts[0]",
        "neither",
    ),
    (
        "a",
        "rules: [{from: [{source: {serviceAccounts: [x], namespaces: [y]}}]}]",
        "spec.rules[0].from[0].source.serviceAccounts",
        "beside",
    ),
    (
        "a",
        "rules: [{to: [{operation: {ports: ['0']}}]}]",
        "spec.rules[0].to[0].operation.ports[0]",
        "not a port",
    ),
    (
        "a",
        "rules: [{to: [{operation: {ports: ['80', '70000']}}]}]",
        "spec.rules[0].to[0].operation.ports[1]",
        "70000",
    ),
    (
        "a",
        "rules: [{to: [{operation: {notPorts: [http]}}]}]",
        "spec.rules[0].to[0].operation.notPorts[0]",
        "http",
    ),
    (
        "a",
        "rules: [{to: [{operation: {ports: [80]}}]}]",
        "spec.rules[0].to[0].operation.ports[0]",
        "invalid type: integer",
    ),
    ("a", "rules: [{when: [{values: [x]}]}]", "spec.rules[0].when[0]", "key is missing"),
    ("a", "rules: [{when: [{key: source.ip}]}]", "spec.rules[0].when[0]", "both missing"),
    ("a", "rules: [{when: [{key: source.port, values: ['80']}]}]", "spec.rules[0].when[0]", "source.port"),
    (
        "a",
        "rules: [{when: [{key: destination.port, values: ['80'], notValues: ['0']}]}]",
        "spec.rules[0].when[0]",
        "notValues[0]",
    ),
    ("a", "rules: [{when: [{key: source.ip, values: [x]}]}]", "spec.rules[0].when[0]", "values[0]"),
    (
        "a",
        "rules: [{when: [{key: 'request.headers[]', values: [x]}]}]",
        "spec.rules[0].when[0]",
        "no known attribute",
    ),
    ("p", "mtls: {mode: ON}", "spec.mtls.mode", "unknown variant"),
    ("p", "mtls: {mod: STRICT}", "spec.mtls.mod", "unknown field"),
    ("p", "mtlS: {mode: STRICT}", "spec.mtlS", "unknown field"),
    ("p", "selector: {matchExpressions: []}", "spec.selector.matchExpressions", "unknown field"),
    ("p", "portLevelMtls: {80: {mode: STRICT}}", "spec.portLevelMtls", "needs spec.selector"),
    ("p", "selector: {matchLabels: {app: web}}, portLevelMtls: {}", "spec.portLevelMtls", "is empty"),
    (
        "p",
        "selector: {matchLabels: {app: web}}, portLevelMtls: {0: {mode: STRICT}}",
        "spec.portLevelMtls.0",
        "from 1 to 65535",
    ),
    (
        "p",
        "selector: {matchLabels: {app: web}}, portLevelMtls: {70000: {mode: STRICT}}",
        "spec.portLevelMtls.70000",
        "from 1 to 65535",
    ),
    (
        "p",
        "selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: on}}",
        "spec.portLevelMtls.80.mode",
        "unknown variant",
    ),
];

#[tokio::test]
async fn a_fault_names_its_field_and_nothing_of_its_file_is_in_force() {
    let text = |kind: &str, spec: &str| if kind == "a" { policy("bad", spec) } else { peers("bad", spec) };
    let bad: Vec<_> =
        (0..).zip(REFUSED).map(|(i, (kind, spec, ..))| (format!("{i:02}.yaml"), text(kind, spec))).collect();
    // A good object beside each bad one.
    let bad: Vec<_> = bad.into_iter().map(|(name, text)| (name, file(&[web(), text]))).collect();
    let files: Vec<_> = bad.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let world = World::start(&files).await;
    let faults = world.faults().await;
    assert_eq!(faults.len(), REFUSED.len(), "{faults:#?}");
    for ((_, spec, field, reason), fault) in REFUSED.iter().zip(&faults) {
        assert_eq!((fault.1, fault.2.as_str()), (2, *field), "{spec}: {fault:?}");
        assert!(fault.3.contains(reason), "{spec}: {fault:?}");
    }
    let mut subscriber = world.subscriber().await;
    assert!(subscriber.held.is_empty());
    subscriber.subscribe_policies().await;
    subscriber.next().await;
    assert!(subscriber.policies.is_empty());
}

#[tokio::test]
async fn what_has_no_effect_is_noted_and_the_rest_is_in_force() {
    let noted = [
        policy("http", "rules: [{to: [{operation: {paths: [/x]}}]}]"),
        policy("denied", "action: DENY, rules: [{when: [{key: 'request.headers[a]', values: [b]}]}]"),
        policy("scheme", "rules: [{from: [{source: {principals: ['spiffe://cluster.local/ns/a/sa/b']}}]}]"),
        peers("port", "selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: DISABLE}}"),
        policy("dry", "rules: [{}]")
            .replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: 'true'}"),
    ];
    let world = World::start(&[("all.yaml", &file(&noted))]).await;
    let faults = world.faults().await;
    let found: Vec<_> = faults
        .iter()
        .map(|(_, document, field, reason)| (*document, field.as_str(), reason.as_str()))
        .collect();
    assert!(found[0].2.contains("paths") && found[0].2.contains("allows nothing"), "{found:?}");
    assert!(found[1].2.contains("request.headers[a]") && found[1].2.contains("as if they held"), "{found:?}");
    assert_eq!((found[2].0, found[2].1), (3, "spec.rules[0].from[0].source.principals[0]"));
    assert_eq!((found[3].0, found[3].1, found.len()), (4, "spec.portLevelMtls[80].mode", 4));
    let mut subscriber = world.subscriber().await;
    subscriber.subscribe_policies().await;
    subscriber.next().await;
    assert!(subscriber.policies["shop/http"].rules.is_empty());
    assert!(subscriber.policies["shop/dry"].dry_run && !subscriber.policies["shop/http"].dry_run);
}

#[tokio::test]
async fn what_agents_would_refuse_is_refused_here() {
    let long = "x".repeat(2_049);
    let source =
        |value: &str| policy("p", &format!("rules: [{{from: [{{source: {{principals: [\"{value}\"]}}}}]}}]"));
    let rules = vec!["{}"; 65_537].join(", ");
    let files = [
        ("a.yaml", source(&long)),
        ("b.yaml", source("a\\u0007b")),
        ("c.yaml", policy("p", &format!("rules: [{rules}]"))),
    ];
    let world = World::start(&files.each_ref().map(|(name, text)| (*name, text.as_str()))).await;
    let fields: Vec<_> = world.faults().await.into_iter().map(|fault| fault.2).collect();
    let principal = "spec.rules[0].from[0].source.principals[0]";
    assert_eq!(fields, [principal, principal, "spec.rules"]);
}

#[tokio::test]
async fn a_dry_run_that_is_neither_true_nor_false_is_refused() {
    let text = policy("p", "rules: [{}]")
        .replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: maybe}");
    let world = World::start(&[("p.yaml", &text)]).await;
    let faults = world.faults().await;
    assert_eq!((faults[0].2.as_str(), faults.len()), ("metadata.annotations[istio.io/dry-run]", 1));
}
