use super::super::sample::{block, of_rules, policy};
use super::*;

const WEB: Principal<'_> =
    Principal { trust_domain: "cluster.local", namespace: "shop", service_account: "web" };

/// From `web` at 10.1.0.7, port 80.
fn known() -> Attempt<'static> {
    Attempt { source: Some(WEB), ..plain() }
}

fn plain() -> Attempt<'static> {
    Attempt {
        source: None,
        source_ip: SourceIp::One([10, 1, 0, 7].into()),
        destination_ip: [10, 2, 0, 9].into(),
        port: 80,
    }
}

fn exact(text: &str) -> Text {
    Text::Exact(text.into())
}

fn prefix(text: &str) -> Text {
    Text::Prefix(text.into())
}

fn suffix(text: &str) -> Text {
    Text::Suffix(text.into())
}

/// Whether a DENY of that one match hits.
fn hits(one: &Match, attempt: &Attempt<'_>) -> bool {
    !evaluate([policy(Action::Deny, std::slice::from_ref(one))].iter(), attempt).allows()
}

fn port(port: u16) -> Match {
    Match { destination_ports: [port].into(), ..Match::default() }
}

#[test]
fn texts_compare_as_istio_compares_them() {
    // Against cluster.local/ns/shop/sa/web.
    for (text, met) in [
        (exact("cluster.local/ns/shop/sa/web"), true),
        (exact("spiffe://cluster.local/ns/shop/sa/web"), false),
        (exact("cluster.local/ns/shop/sa/we"), false),
        (exact("cluster.local/ns/shop/sa/web2"), false),
        (exact("Cluster.local/ns/shop/sa/web"), false),
        (prefix("cluster.local/ns/shop/"), true),
        (prefix("cluster.local/ns/sho"), true),
        (prefix("cluster.local/ns/shop/sa/web"), true),
        (prefix("cluster.local/ns/shop/sa/web2"), false),
        (prefix("spiffe://"), false),
        (suffix("/ns/shop/sa/web"), true),
        (suffix("local/ns/shop/sa/web"), true),
        (suffix("/sa/eb"), false),
        (suffix("xcluster.local/ns/shop/sa/web"), false),
        (Text::Present, true),
    ] {
        let positive = Match { principals: [text.clone()].into(), ..Match::default() };
        let negative = Match { not_principals: [text.clone()].into(), ..Match::default() };
        assert_eq!(hits(&positive, &known()), met, "{text:?}");
        assert_eq!(hits(&negative, &known()), !met, "not {text:?}");
    }
}

#[test]
fn namespaces_and_accounts_are_those_of_the_identity() {
    let account = |namespace: &str, name: &str| Account { namespace: namespace.into(), name: name.into() };
    for (one, met) in [
        (Match { namespaces: [exact("shop")].into(), ..Match::default() }, true),
        (Match { namespaces: [exact("shop2")].into(), ..Match::default() }, false),
        (Match { namespaces: [prefix("sh")].into(), ..Match::default() }, true),
        (Match { namespaces: [suffix("op")].into(), ..Match::default() }, true),
        (Match { namespaces: [exact("web")].into(), ..Match::default() }, false),
        (Match { not_namespaces: [exact("shop")].into(), ..Match::default() }, false),
        (Match { not_namespaces: [exact("other")].into(), ..Match::default() }, true),
        (Match { service_accounts: [account("shop", "web")].into(), ..Match::default() }, true),
        (Match { service_accounts: [account("other", "web")].into(), ..Match::default() }, false),
        (Match { service_accounts: [account("shop", "db")].into(), ..Match::default() }, false),
        (Match { not_service_accounts: [account("shop", "web")].into(), ..Match::default() }, false),
        (Match { not_service_accounts: [account("shop", "db")].into(), ..Match::default() }, true),
    ] {
        assert_eq!(hits(&one, &known()), met, "{one:?}");
    }
    // Of whatever trust domain.
    let foreign = Attempt { source: Some(Principal { trust_domain: "evil", ..WEB }), ..plain() };
    assert!(hits(&Match { service_accounts: [account("shop", "web")].into(), ..Match::default() }, &foreign));
}

#[test]
fn whom_nobody_knows_fails_what_asks_for_somebody_and_passes_what_excludes_somebody() {
    let account = Account { namespace: "shop".into(), name: "web".into() };
    for (positive, negative) in [
        (
            Match { principals: [Text::Present].into(), ..Match::default() },
            Match { not_principals: [Text::Present].into(), ..Match::default() },
        ),
        (
            Match { namespaces: [Text::Present].into(), ..Match::default() },
            Match { not_namespaces: [Text::Present].into(), ..Match::default() },
        ),
        (
            Match { service_accounts: [account.clone()].into(), ..Match::default() },
            Match { not_service_accounts: [account].into(), ..Match::default() },
        ),
    ] {
        assert!(!hits(&positive, &plain()), "{positive:?}");
        assert!(hits(&negative, &plain()), "{negative:?}");
        assert!(hits(&positive, &known()), "{positive:?}");
        assert!(!hits(&negative, &known()), "{negative:?}");
    }
}

#[test]
fn addresses_and_ports_have_both_forms() {
    let (here, there) = (block("10.1.0.0/16"), block("10.2.0.0/16"));
    for (one, met) in [
        (Match { source_ips: [here].into(), ..Match::default() }, true),
        (Match { source_ips: [there].into(), ..Match::default() }, false),
        (Match { source_ips: [there, here].into(), ..Match::default() }, true),
        (Match { not_source_ips: [here].into(), ..Match::default() }, false),
        (Match { not_source_ips: [there].into(), ..Match::default() }, true),
        (
            Match {
                source_ips: [here].into(),
                not_source_ips: [block("10.1.0.7/32")].into(),
                ..Match::default()
            },
            false,
        ),
        (Match { destination_ips: [there].into(), ..Match::default() }, true),
        (Match { destination_ips: [here].into(), ..Match::default() }, false),
        (Match { not_destination_ips: [there].into(), ..Match::default() }, false),
        (Match { not_destination_ips: [here].into(), ..Match::default() }, true),
        (port(80), true),
        (port(81), false),
        (Match { destination_ports: [81, 80].into(), ..Match::default() }, true),
        (Match { not_destination_ports: [80].into(), ..Match::default() }, false),
        (Match { not_destination_ports: [81].into(), ..Match::default() }, true),
    ] {
        assert_eq!(hits(&one, &plain()), met, "{one:?}");
    }
}

#[test]
fn every_kind_of_field_of_a_match_must_hold() {
    let both = Match { namespaces: [exact("shop")].into(), ..port(80) };
    assert!(hits(&both, &known()));
    assert!(!hits(&both, &Attempt { port: 81, ..known() }));
    assert!(!hits(&both, &plain()));
}

#[test]
fn what_is_empty_has_its_own_meaning_at_each_level() {
    let empty_clause = Rule { clauses: [Clause::default()].into() };
    for (name, rules, matches) in [
        ("no rules match nothing", vec![], false),
        ("no clauses match everything", vec![Rule::default()], true),
        ("a clause without matches holds", vec![empty_clause], true),
        (
            "an empty match does not hold",
            vec![Rule { clauses: [Clause { matches: [Match::default()].into() }].into() }],
            false,
        ),
        (
            "but another of its clause may",
            vec![Rule { clauses: [Clause { matches: [Match::default(), port(80)].into() }].into() }],
            true,
        ),
    ] {
        let deny = evaluate([of_rules(Action::Deny, &rules)].iter(), &plain());
        let allow = evaluate([of_rules(Action::Allow, &rules)].iter(), &plain());
        assert_eq!((!deny.allows(), allow.allows()), (matches, matches), "{name}");
    }
}

#[test]
fn rules_are_alternatives_and_clauses_are_not() {
    let clause = |ports: &[u16]| Clause { matches: ports.iter().map(|one| port(*one)).collect() };
    let rule = |clauses: &[Clause]| Rule { clauses: clauses.into() };
    for (rules, matches) in [
        (vec![rule(&[clause(&[81])]), rule(&[clause(&[80])])], true),
        (vec![rule(&[clause(&[81]), clause(&[80])])], false),
        (vec![rule(&[clause(&[80]), clause(&[81])])], false),
        (vec![rule(&[clause(&[81, 80])])], true),
        (vec![rule(&[clause(&[81, 80]), clause(&[80])])], true),
    ] {
        let allowed = evaluate([of_rules(Action::Allow, &rules)].iter(), &plain()).allows();
        assert_eq!(allowed, matches, "{rules:?}");
    }
}

#[test]
fn denial_wins_and_an_allow_that_exists_must_match() {
    let deny = |number| policy(Action::Deny, &[port(number)]);
    let allow = |number| policy(Action::Allow, &[port(number)]);
    let by = |policy| Some(Ref { policy, rule: 0 });
    for (policies, wanted) in [
        (vec![], Decision::Allow { by: None }),
        (vec![deny(81)], Decision::Allow { by: None }),
        (vec![deny(80)], Decision::Deny { by: by(0) }),
        (vec![allow(80)], Decision::Allow { by: by(0) }),
        (vec![allow(81)], Decision::Deny { by: None }),
        (vec![allow(81), allow(80)], Decision::Allow { by: by(1) }),
        (vec![allow(80), deny(80)], Decision::Deny { by: by(1) }),
        (vec![deny(81), allow(80)], Decision::Allow { by: by(1) }),
        // ALLOW without rules: nobody comes in.
        (vec![of_rules(Action::Allow, &[])], Decision::Deny { by: None }),
        (vec![of_rules(Action::Deny, &[])], Decision::Allow { by: None }),
    ] {
        assert_eq!(evaluate(policies.iter(), &plain()), wanted, "{policies:?}");
    }
}

#[test]
fn the_rule_that_decides_is_named() {
    let rule = |number| Rule { clauses: [Clause { matches: [port(number)].into() }].into() };
    let policies = [of_rules(Action::Deny, &[]), of_rules(Action::Deny, &[rule(1), rule(80), rule(80)])];
    let decision = evaluate(policies.iter(), &plain());
    assert_eq!(decision, Decision::Deny { by: Some(Ref { policy: 1, rule: 1 }) });
}

#[test]
fn a_dry_run_decides_nothing_but_is_told() {
    let dry = |action, number| Policy { dry_run: true, ..policy(action, &[port(number)]) };
    let allow = policy(Action::Allow, &[port(80)]);
    for (policies, now, then) in [
        (vec![dry(Action::Deny, 80)], true, false),
        // It does not count as an ALLOW that exists.
        (vec![dry(Action::Allow, 81)], true, false),
        (vec![dry(Action::Allow, 80)], true, true),
        (vec![allow.clone(), dry(Action::Deny, 80)], true, false),
        (vec![policy(Action::Allow, &[port(81)]), dry(Action::Allow, 80)], false, true),
        (vec![policy(Action::Deny, &[port(80)]), dry(Action::Allow, 80)], false, false),
    ] {
        assert_eq!(evaluate(policies.iter(), &plain()).allows(), now, "{policies:?}");
        assert_eq!(rehearse(policies.iter(), &plain()).allows(), then, "{policies:?}");
    }
    // Places count all policies that were given.
    let decision = evaluate([dry(Action::Deny, 80), allow].iter(), &plain());
    assert_eq!(decision, Decision::Allow { by: Some(Ref { policy: 1, rule: 0 }) });
}

#[test]
fn strict_refuses_plaintext_only() {
    // As istiod sends it for STRICT with port 9000 left open.
    let clauses = [
        Clause { matches: [Match { not_principals: [Text::Present].into(), ..Match::default() }].into() },
        Clause { matches: [Match { not_destination_ports: [9000].into(), ..Match::default() }].into() },
    ];
    let strict = [of_rules(Action::Deny, &[Rule { clauses: clauses.into() }])];
    assert!(!evaluate(strict.iter(), &plain()).allows());
    assert!(evaluate(strict.iter(), &known()).allows());
    assert!(evaluate(strict.iter(), &Attempt { port: 9000, ..plain() }).allows());
}

#[test]
fn a_block_is_in_what_covers_it() {
    let from = |text| Attempt { source_ip: SourceIp::Block(block(text)), ..plain() };
    let one = Match { source_ips: [block("10.1.0.0/16")].into(), ..Match::default() };
    assert!(hits(&one, &from("10.1.0.0/16")));
    assert!(hits(&one, &from("10.1.128.0/17")));
    assert!(!hits(&one, &from("10.0.0.0/8")));
}
