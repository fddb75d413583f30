use mesh_common::policy::Action;

use super::super::fixtures::{of_policy, policy};
use super::*;

fn refused(message: wire::Authorization) -> (String, Reach) {
    match Authorization::read(of_policy(message, "7")).content {
        Content::Refused { reason, reach } => (reason, reach),
        Content::Understood(policy) => panic!("{policy:?}"),
    }
}

fn unknown(namespace: &str) -> Reach {
    Reach::Unknown { namespace: Some(namespace.into()) }
}

#[test]
fn a_policy_that_is_understood_keeps_its_version() {
    let read = Authorization::read(of_policy(policy("shop/one", wire::Scope::Global), "7"));
    assert_eq!((&*read.name, read.version()), ("shop/one", "7"));
    assert_eq!(read.understood().unwrap().action, Action::Allow);
    assert_eq!(read.rejected(), None);
}

#[test]
fn what_is_not_understood_is_kept_with_whom_it_is_for() {
    let of_scope = |scope: wire::Scope| wire::Authorization { action: 9, ..policy("shop/one", scope) };
    for (scope, known) in [
        (wire::Scope::Global, Scope::Global),
        (wire::Scope::Namespace, Scope::Namespace),
        (wire::Scope::WorkloadSelector, Scope::Selector),
    ] {
        let (reason, reach) = refused(of_scope(scope));
        assert!(reason.contains("action: unknown value 9"), "{reason}");
        assert_eq!(reach, Reach::Known { scope: known, namespace: "shop".into() });
    }
    let odd = wire::Authorization { scope: 9, ..policy("shop/one", wire::Scope::Global) };
    assert_eq!(refused(odd).1, unknown("shop"));
}

#[test]
fn bytes_at_random_never_panic_and_are_never_let_pass() {
    let good = of_policy(policy("shop/one", wire::Scope::WorkloadSelector), "7");
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut resource = good.clone();
        let bytes = &mut resource.resource.as_mut().unwrap().value;
        for _ in 0..=next() % 4 {
            let at = next() % (bytes.len() + 1);
            bytes.insert(at, next() as u8);
        }
        let read = Authorization::read(resource);
        assert_eq!(read.understood().is_none(), read.rejected().is_some());
        refused += usize::from(read.rejected().is_some());
    }
    assert!(refused > 10_000, "{refused}");
}

#[test]
fn whatever_cannot_be_read_at_all_counts_for_the_namespace_of_its_name() {
    let good = of_policy(policy("shop/one", wire::Scope::WorkloadSelector), "7");
    let spoilt = |spoil: &dyn Fn(&mut xds::Resource)| {
        let mut resource = good.clone();
        spoil(&mut resource);
        let read = Authorization::read(resource);
        assert_eq!(read.version(), "", "it is to be sent again");
        match read.content {
            Content::Refused { reason, reach } => (reason, reach),
            Content::Understood(policy) => panic!("{policy:?}"),
        }
    };
    let (reason, reach) = spoilt(&|r| r.resource.as_mut().unwrap().value = vec![0xff; 9]);
    assert!(reason.starts_with("resource.value: ") && reach == unknown("shop"), "{reason}");
    let (reason, reach) = spoilt(&|r| r.resource = None);
    assert!(reason == "resource: missing" && reach == unknown("shop"), "{reason}");
    let (reason, reach) = spoilt(&|r| r.resource.as_mut().unwrap().type_url = "x/y".to_owned());
    assert!(reason.contains("x/y") && reach == unknown("shop"), "{reason}");
    // A selector's by its content, but which one is it?
    let (reason, reach) = spoilt(&|r| r.name = "bank/one".to_owned());
    assert!(reason.starts_with("name: ") && reach == unknown("bank"), "{reason}");
    for name in ["one", "/one", ""] {
        assert_eq!(spoilt(&|r| r.name = name.to_owned()).1, Reach::Unknown { namespace: None });
    }
}
