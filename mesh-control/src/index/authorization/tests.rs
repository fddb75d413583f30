use super::*;
use crate::manifest::Object;

/// The policy of a spec in flow style, in the namespace `shop`.
fn policy(spec: &str) -> Authorization {
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n"
    );
    let parsed = crate::manifest::parse(&text).unwrap_or_else(|faults| panic!("{spec}: {faults:?}"));
    let Object::AuthorizationPolicy(policy) = &parsed.objects[0].object else { panic!("another kind") };
    let policy = convert(policy, Scope::Namespace);
    // Agents understand it.
    mesh_common::policy::Policy::try_from(&policy).unwrap_or_else(|error| panic!("{spec}: {error}"));
    policy
}

/// A short form: rules by `|`, clauses by `&`, matches by `,`; `!` before the not-forms.
fn shown(policy: &Authorization) -> String {
    let action = if policy.action() == api::Action::Deny { "DENY" } else { "ALLOW" };
    let rules: Vec<_> = policy.rules.iter().map(show_rule).collect();
    format!("{action} {}", rules.join(" | "))
}

fn show_rule(rule: &Rule) -> String {
    let clause = |clause: &Clause| clause.matches.iter().map(show_match).collect::<Vec<_>>().join(", ");
    let clauses: Vec<_> = rule.clauses.iter().map(clause).collect();
    if clauses.is_empty() { "all".to_owned() } else { clauses.join(" & ") }
}

fn show_match(one: &Match) -> String {
    let mut fields = Vec::new();
    let mut add = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            fields.push(format!("{name}={}", values.join("/")));
        }
    };
    let ports = |ports: &[u32]| ports.iter().map(u32::to_string).collect();
    let blocks = |blocks: &[api::Address]| {
        let block = |b: &api::Address| {
            let octets: Vec<_> = b.address.iter().map(u8::to_string).collect();
            format!("{}:{}", octets.join("."), b.length)
        };
        blocks.iter().map(block).collect()
    };
    let texts = |texts: &[StringMatch]| {
        let text = |text: &StringMatch| match text.match_type.clone().unwrap() {
            MatchType::Exact(text) => text,
            MatchType::Prefix(text) => format!("{text}.."),
            MatchType::Suffix(text) => format!("..{text}"),
            MatchType::Presence(()) => "any".to_owned(),
        };
        texts.iter().map(text).collect()
    };
    let accounts = |accounts: &[ServiceAccountMatch]| {
        accounts.iter().map(|a| format!("{}:{}", a.namespace, a.service_account)).collect()
    };
    add("ns", texts(&one.namespaces));
    add("!ns", texts(&one.not_namespaces));
    add("id", texts(&one.principals));
    add("!id", texts(&one.not_principals));
    add("from", blocks(&one.source_ips));
    add("!from", blocks(&one.not_source_ips));
    add("to", blocks(&one.destination_ips));
    add("!to", blocks(&one.not_destination_ips));
    add("port", ports(&one.destination_ports));
    add("!port", ports(&one.not_destination_ports));
    add("sa", accounts(&one.service_accounts));
    add("!sa", accounts(&one.not_service_accounts));
    if fields.is_empty() { "nobody".to_owned() } else { fields.join(" ") }
}

#[test]
fn rules_become_clauses() {
    for (spec, wanted) in [
        // Nothing is allowed; everything is; everything is denied.
        ("{}", "ALLOW "),
        ("{rules: []}", "ALLOW "),
        ("{rules: [{}]}", "ALLOW all"),
        ("{action: DENY, rules: [{}]}", "DENY all"),
        // One clause each, `to` first; in it one match for each member.
        (
            "{rules: [{from: [{source: {namespaces: [a]}}, {source: {principals: [x]}}], to: [{operation: {ports: ['80', '81']}}]}]}",
            "ALLOW port=80/81 & ns=a, id=x",
        ),
        (
            "{rules: [{from: [{source: {namespaces: [a], ipBlocks: [10.0.0.0/8]}}]}]}",
            "ALLOW ns=a from=10.0.0.0:8",
        ),
        ("{rules: [{to: [{operation: {notPorts: ['22']}}]}, {}]}", "ALLOW !port=22 | all"),
        // Texts.
        (
            "{rules: [{from: [{source: {principals: ['*', 'a*', '*b', c, '*d*'], notNamespaces: [e]}}]}]}",
            "ALLOW !ns=e id=any/a../..b/c/..d*",
        ),
        // Blocks: one address is a block; bits behind the prefix do not count.
        (
            "{rules: [{from: [{source: {ipBlocks: [10.1.2.3, 10.1.2.3/8, 0.0.0.0/0], notIpBlocks: ['fd00::1/8']}}]}]}",
            "ALLOW from=10.1.2.3:32/10.0.0.0:8/0.0.0.0:0 !from=253.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0:8",
        ),
        // A service account without a namespace is of the policy's own.
        (
            "{rules: [{from: [{source: {serviceAccounts: [web, other/db], notServiceAccounts: [x]}}]}]}",
            "ALLOW sa=shop:web/other:db !sa=shop:x",
        ),
        // A clause for each condition.
        (
            "{rules: [{when: [{key: source.ip, values: [10.0.0.1]}, {key: destination.port, notValues: ['80']}]}]}",
            "ALLOW from=10.0.0.1:32 & !port=80",
        ),
        (
            "{rules: [{when: [{key: source.namespace, values: [a], notValues: [b*]}, {key: source.principal, values: ['*']}]}]}",
            "ALLOW ns=a !ns=b.. & id=any",
        ),
        (
            "{rules: [{when: [{key: destination.ip, values: ['::1']}]}]}",
            "ALLOW to=0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1:128",
        ),
        // HTTP under ALLOW: its rule is left out, and if none is left everything is denied.
        ("{rules: [{to: [{operation: {ports: ['80'], paths: [/x]}}]}]}", "ALLOW "),
        (
            "{rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: ['80']}}]}]}",
            "ALLOW port=80",
        ),
        ("{rules: [{from: [{source: {namespaces: [a]}}, {source: {requestPrincipals: ['*']}}]}]}", "ALLOW "),
        ("{rules: [{when: [{key: 'request.headers[x]', values: [y]}]}]}", "ALLOW "),
        // HTTP under DENY counts as met.
        ("{action: DENY, rules: [{to: [{operation: {ports: ['80'], paths: [/x]}}]}]}", "DENY port=80"),
        ("{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}", "DENY all"),
        (
            "{action: DENY, rules: [{to: [{operation: {notHosts: [x]}}, {operation: {ports: ['80']}}]}]}",
            "DENY all",
        ),
        (
            "{action: DENY, rules: [{from: [{source: {namespaces: [a]}}], when: [{key: request.auth.principal, values: [y]}]}]}",
            "DENY ns=a",
        ),
        (
            "{action: DENY, rules: [{from: [{source: {remoteIpBlocks: [1.2.3.4]}}], to: [{operation: {ports: ['80']}}]}]}",
            "DENY port=80",
        ),
    ] {
        assert_eq!(shown(&policy(spec)), wanted, "{spec}");
    }
}

#[test]
fn no_match_without_fields_is_ever_sent() {
    // On the wire it would be one that nobody meets.
    for field in
        ["hosts: [x]", "notHosts: [x]", "methods: [x]", "notMethods: [x]", "paths: [x]", "notPaths: [x]"]
    {
        let denied = policy(&format!("{{action: DENY, rules: [{{to: [{{operation: {{{field}}}}}]}}]}}"));
        assert_eq!((&*shown(&denied), denied.http), ("DENY all", true), "{field}");
        let allowed = policy(&format!("{{rules: [{{to: [{{operation: {{{field}}}}}]}}]}}"));
        assert_eq!((&*shown(&allowed), allowed.http), ("ALLOW ", true), "{field}");
    }
    assert!(!policy("{rules: [{to: [{operation: {ports: ['80']}}]}]}").http);
    for field in [
        "requestPrincipals: [x]",
        "notRequestPrincipals: [x]",
        "remoteIpBlocks: [x]",
        "notRemoteIpBlocks: [x]",
        "trustDomains: [x]",
        "notTrustDomains: [x]",
    ] {
        let denied = policy(&format!("{{action: DENY, rules: [{{from: [{{source: {{{field}}}}}]}}]}}"));
        assert_eq!(shown(&denied), "DENY all", "{field}");
    }
}
