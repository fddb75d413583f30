use super::*;

fn good() -> wire::Authorization {
    wire::Authorization {
        name: "one".to_owned(),
        namespace: "shop".to_owned(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Deny.into(),
        rules: vec![wire::Rule { clauses: vec![wire::Clause { matches: vec![full()] }] }],
        dry_run: true,
        http: false,
    }
}

fn full() -> wire::Match {
    let text = |kind| vec![wire::StringMatch { match_type: Some(kind) }];
    let ips = |bytes: &[u8], length| vec![wire::Address { address: bytes.to_vec(), length }];
    let account = |name: &str| wire::ServiceAccountMatch {
        namespace: "shop".to_owned(),
        service_account: name.to_owned(),
    };
    wire::Match {
        namespaces: text(MatchType::Exact("a".to_owned())),
        not_namespaces: text(MatchType::Prefix("b".to_owned())),
        principals: text(MatchType::Suffix("c".to_owned())),
        not_principals: text(MatchType::Presence(())),
        source_ips: ips(&[10, 0, 0, 0], 8),
        not_source_ips: ips(&[10, 1, 0, 0], 16),
        destination_ips: ips(&[0; 16], 0),
        not_destination_ips: ips(&[10, 0, 0, 1], 32),
        destination_ports: vec![80],
        not_destination_ports: vec![65535],
        service_accounts: vec![account("web")],
        not_service_accounts: vec![account("db")],
    }
}

#[test]
fn every_field_arrives_where_it_belongs() {
    let policy = Policy::try_from(&good()).unwrap();
    assert_eq!((&*policy.namespace, &*policy.name), ("shop", "one"));
    assert_eq!((policy.scope, policy.action, policy.dry_run), (Scope::Selector, Action::Deny, true));
    let block = |a: [u8; 4], length| Block::new(a.into(), length).unwrap();
    let account = |name: &str| Account { namespace: "shop".into(), name: name.into() };
    let wanted = Match {
        namespaces: [Text::Exact("a".into())].into(),
        not_namespaces: [Text::Prefix("b".into())].into(),
        principals: [Text::Suffix("c".into())].into(),
        not_principals: [Text::Present].into(),
        source_ips: [block([10, 0, 0, 0], 8)].into(),
        not_source_ips: [block([10, 1, 0, 0], 16)].into(),
        destination_ips: [Block::V6].into(),
        not_destination_ips: [block([10, 0, 0, 1], 32)].into(),
        destination_ports: [80].into(),
        not_destination_ports: [65535].into(),
        service_accounts: [account("web")].into(),
        not_service_accounts: [account("db")].into(),
    };
    assert_eq!(policy.rules[0].clauses[0].matches[0], wanted);
    assert!(!wanted.is_empty() && Match::default().is_empty());
}

#[test]
fn each_field_alone_makes_a_match_say_something() {
    let lists: [fn(&mut wire::Match); 12] = [
        |m| m.namespaces.clear(),
        |m| m.not_namespaces.clear(),
        |m| m.principals.clear(),
        |m| m.not_principals.clear(),
        |m| m.source_ips.clear(),
        |m| m.not_source_ips.clear(),
        |m| m.destination_ips.clear(),
        |m| m.not_destination_ips.clear(),
        |m| m.destination_ports.clear(),
        |m| m.not_destination_ports.clear(),
        |m| m.service_accounts.clear(),
        |m| m.not_service_accounts.clear(),
    ];
    for kept in 0..lists.len() {
        let mut message = full();
        for (_, clear) in lists.iter().enumerate().filter(|(at, _)| *at != kept) {
            clear(&mut message);
        }
        assert!(!one_match("m", &message).unwrap().is_empty(), "field {kept}");
    }
}

#[test]
fn levels_keep_their_emptiness() {
    let empty = wire::Authorization { rules: Vec::new(), ..good() };
    assert_eq!(Policy::try_from(&empty).unwrap().rules.len(), 0);
    let empty = wire::Authorization { rules: vec![wire::Rule::default()], ..good() };
    assert_eq!(*Policy::try_from(&empty).unwrap().rules, [Rule::default()]);
}

#[test]
fn what_cannot_be_understood_is_refused_with_its_field() {
    type Spoil = fn(&mut wire::Authorization);
    fn first(policy: &mut wire::Authorization) -> &mut wire::Match {
        &mut policy.rules[0].clauses[0].matches[0]
    }
    let cases: [(Spoil, &str); 21] = [
        (|p| p.name.clear(), "name: empty"),
        (|p| p.namespace.clear(), "namespace: empty"),
        (|p| p.name = "a/b".to_owned(), "name: holds a slash"),
        (|p| p.name = "a".repeat(2049), "name: 2049 bytes"),
        (|p| p.name = "a\nb".to_owned(), "name: holds control"),
        (|p| p.scope = 3, "scope: unknown value 3"),
        (|p| p.scope = -1, "scope: unknown value -1"),
        (|p| p.action = 2, "action: unknown value 2"),
        (|p| p.rules = vec![wire::Rule::default(); RULE_LIMIT + 1], "rules: 65537"),
        (
            |p| first(p).principals.push(wire::StringMatch { match_type: None }),
            "rules[0].clauses[0].matches[0].principals[1]: of no known kind",
        ),
        (
            |p| first(p).namespaces[0].match_type = Some(MatchType::Exact(String::new())),
            "rules[0].clauses[0].matches[0].namespaces[0]: empty",
        ),
        (
            |p| first(p).not_namespaces[0].match_type = Some(MatchType::Prefix("x".repeat(2049))),
            "not_namespaces[0]: 2049",
        ),
        (|p| first(p).source_ips[0].address.clear(), "source_ips[0].address: 0 bytes"),
        (|p| first(p).source_ips[0].address.push(0), "source_ips[0].address: 5 bytes"),
        (|p| first(p).not_source_ips[0].length = 33, "not_source_ips[0].length: 10.1.0.0 has no 33 bits"),
        (|p| first(p).destination_ips[0].length = 129, "destination_ips[0].length"),
        // Not taken for 8, which is what is left of it in eight bits.
        (|p| first(p).not_destination_ips[0].length = 256 + 8, "not_destination_ips[0].length"),
        (|p| first(p).destination_ports[0] = 65536 + 80, "destination_ports[0]: 65616 is not a port"),
        (|p| first(p).not_destination_ports[0] = 0, "not_destination_ports[0]: 0 is not a port"),
        (|p| first(p).service_accounts[0].namespace.clear(), "service_accounts[0].namespace: empty"),
        (
            |p| first(p).not_service_accounts[0].service_account.clear(),
            "not_service_accounts[0].service_account: empty",
        ),
    ];
    for (spoil, wanted) in cases {
        let mut message = good();
        spoil(&mut message);
        let error = Policy::try_from(&message).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}, wanted {wanted}");
    }
}

#[test]
fn as_many_rules_as_verdicts_can_name() {
    let message = wire::Authorization { rules: vec![wire::Rule::default(); RULE_LIMIT], ..good() };
    assert_eq!(Policy::try_from(&message).unwrap().rules.len(), RULE_LIMIT);
}
