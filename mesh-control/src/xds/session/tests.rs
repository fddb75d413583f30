use std::time::Instant;

use super::*;
use crate::{
    catalog::tests::{delta, resource},
    index::{Delta, Resource},
};

fn contents(entries: &[(&str, u64)]) -> Contents {
    let mut contents = Contents::default();
    contents.apply(delta(entries), Instant::now());
    contents
}

fn change(contents: &mut Contents, entries: &[(&str, u64)]) {
    contents.apply(delta(entries), Instant::now());
}

fn subscribed(request: Request) -> Session {
    let mut session = Session::default();
    session.request(request).unwrap();
    session
}

/// Names put and removed by the next response, which must come.
fn told(session: &mut Session, contents: &Contents) -> (String, String) {
    loop {
        match session.next(contents, Gate::Open) {
            Next::Send(response) => {
                let put: Vec<_> =
                    response.resources.iter().map(|served| served.resource.name.to_string()).collect();
                return (put.join(","), response.removed.join(","));
            }
            Next::Again => {}
            other @ (Next::Idle | Next::TooFarBehind) => panic!("{other:?}"),
        }
    }
}

fn is_idle(session: &mut Session, contents: &Contents) -> bool {
    loop {
        match session.next(contents, Gate::Open) {
            Next::Idle => return true,
            Next::Again => {}
            Next::Send(_) | Next::TooFarBehind => return false,
        }
    }
}

fn answer(nonce: u64, refusal: Option<&str>) -> Request {
    Request { nonce: nonce.to_string(), refusal: refusal.map(str::to_owned), ..Request::default() }
}

fn pair(put: &str, removed: &str) -> (String, String) {
    (put.to_owned(), removed.to_owned())
}

#[test]
fn nothing_is_sent_before_it_is_asked_for() {
    let contents = contents(&[("a", 1)]);
    assert!(is_idle(&mut Session::default(), &contents));
}

#[test]
fn the_first_answer_comes_even_when_empty_and_only_once() {
    let contents = Contents::default();
    let mut session = subscribed(Request::default());
    assert_eq!(told(&mut session, &contents), pair("", ""));
    assert!(is_idle(&mut session, &contents));
}

#[test]
fn changes_coalesce_while_nobody_listens() {
    let mut contents = contents(&[("a", 1), ("b", 1)]);
    let mut session = subscribed(Request::default());
    assert_eq!(told(&mut session, &contents), pair("a,b", ""));
    for version in 2..100 {
        change(&mut contents, &[("a", version)]);
    }
    change(&mut contents, &[("short", 1)]);
    change(&mut contents, &[("short", 0), ("b", 0)]);
    // What came and went unseen is not mentioned.
    assert_eq!(told(&mut session, &contents), pair("a", "b"));
    assert!(is_idle(&mut session, &contents));
}

#[test]
fn equal_versions_are_skipped_and_unknown_names_removed() {
    let mut contents = contents(&[("a", 1), ("b", 2), ("c", 3)]);
    let versions = [("a", 1), ("b", 99), ("gone", 1)];
    let initial = versions.map(|(name, version)| (name.to_owned(), format!("{version:016x}"))).into();
    let mut session = subscribed(Request { initial, ..Request::default() });
    assert_eq!(told(&mut session, &contents), pair("b,c", "gone"));
    change(&mut contents, &[("a", 0)]);
    assert_eq!(told(&mut session, &contents), pair("", "a"));
}

#[test]
fn what_goes_while_a_return_is_answered_is_removed() {
    let names: Vec<String> = (0..2_000).map(|i| format!("n{i:04}")).collect();
    let entries: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let mut contents = contents(&entries);
    // The client held only the last one, in another version.
    let initial = [("n1999".to_owned(), "old".to_owned())].into();
    let mut session = subscribed(Request { initial, ..Request::default() });
    let (put, _) = told(&mut session, &contents);
    assert_eq!(put.split(',').count(), 1_000);
    change(&mut contents, &[("n1999", 0), ("n1998", 0), ("n0000", 0)]);
    let (put, removed) = told(&mut session, &contents);
    assert_eq!((put.split(',').count(), removed.as_str()), (998, "n0000,n1999"));
}

fn names_of(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn holding(name: &str, version: u64) -> HashMap<String, String> {
    HashMap::from([(name.to_owned(), format!("{version:016x}"))])
}

#[test]
fn what_has_gone_is_told_once_however_it_was_asked_for() {
    let mut contents = contents(&[("a", 1), ("b", 1)]);
    change(&mut contents, &[("b", 0)]);
    for (gone, subscribe) in [("never", ["*", "never"]), ("b", ["*", "b"]), ("b", ["b", "b"])] {
        let subscribe = names_of(&subscribe);
        let all = subscribe.iter().any(|name| name == "*");
        let initial = holding(gone, 1);
        let mut session = subscribed(Request { subscribe, initial, ..Request::default() });
        assert_eq!(told(&mut session, &contents), pair(if all { "a" } else { "" }, gone));
        assert!(is_idle(&mut session, &contents));
    }
}

#[test]
fn who_asks_again_for_what_he_gave_up_is_sent_it_again() {
    let contents = contents(&[("a", 1)]);
    let all = || names_of(&["*"]);
    let mut session = subscribed(Request {
        subscribe: all(),
        unsubscribe: names_of(&["*", "a"]),
        initial: holding("a", 1),
        ..Request::default()
    });
    session.request(Request { subscribe: all(), ..Request::default() }).unwrap();
    assert_eq!(told(&mut session, &contents), pair("a", ""));
    // Not who has not given it up.
    let subscribe = names_of(&["b"]);
    let mut session = subscribed(Request { subscribe, initial: holding("a", 1), ..Request::default() });
    session.request(Request { subscribe: all(), ..Request::default() }).unwrap();
    assert_eq!(told(&mut session, &contents), pair("", "b"));
}

#[test]
fn who_returns_without_the_wildcard_asks_for_what_he_holds() {
    let mut contents = contents(&[("a", 2), ("b", 1), ("c", 1), ("d", 1)]);
    let all = || names_of(&["*"]);
    let initial = ["a", "b", "gone", "c"].map(|name| (name.to_owned(), format!("{:016x}", 1)));
    // As ztunnel does on demand: all that it had asked for is in what it holds.
    for (subscribe, unsubscribe) in [(all(), names_of(&["*", "c"])), (vec![], names_of(&["*", "c"]))] {
        let initial = initial.clone().into();
        let mut session = subscribed(Request { subscribe, unsubscribe, initial, ..Request::default() });
        assert_eq!(told(&mut session, &contents), pair("a", "gone"));
        assert!(is_idle(&mut session, &contents));
        change(&mut contents, &[("b", 2), ("c", 2), ("d", 2)]);
        assert_eq!(told(&mut session, &contents), pair("b", ""));
        change(&mut contents, &[("a", 0), ("d", 0)]);
        assert_eq!(told(&mut session, &contents), pair("", "a"));
        assert!(is_idle(&mut session, &contents));
        change(&mut contents, &[("a", 2), ("b", 1), ("c", 1), ("d", 1)]);
    }
}

#[test]
fn what_goes_while_names_become_a_wildcard_is_told() {
    let mut contents = contents(&[("a", 1), ("b", 1)]);
    let mut session = subscribed(Request { subscribe: names_of(&["a"]), ..Request::default() });
    assert_eq!(told(&mut session, &contents), pair("a", ""));
    change(&mut contents, &[("a", 0)]);
    let (subscribe, unsubscribe) = (names_of(&["*"]), names_of(&["a"]));
    session.request(Request { subscribe, unsubscribe, ..Request::default() }).unwrap();
    assert_eq!(told(&mut session, &contents), pair("b", "a"));
    assert!(is_idle(&mut session, &contents));
}

#[test]
fn only_the_last_page_is_said_to_be_the_last() {
    let names: Vec<String> = (0..2_500).map(|i| format!("n{i:04}")).collect();
    let entries: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let contents = contents(&entries);
    let mut session = subscribed(Request::default());
    let mut complete = Vec::new();
    loop {
        match session.next(&contents, Gate::Open) {
            Next::Send(response) => complete.push((response.items(), response.complete)),
            Next::Again => {}
            Next::Idle | Next::TooFarBehind => break,
        }
    }
    assert_eq!(complete, [(1_000, false), (1_000, false), (500, true)]);
}

#[test]
fn acknowledgements_move_on_and_refusals_stand_until_newer_content_is_accepted() {
    let mut contents = contents(&[("a", 1), ("b", 1)]);
    let mut session = subscribed(Request::default());
    told(&mut session, &contents);
    assert_eq!((session.acknowledged(), session.is_settled()), (0, false));
    assert_eq!(session.request(answer(1, None)), Ok(Answer::Acknowledged));
    assert_eq!((session.acknowledged(), session.is_settled()), (2, true));

    change(&mut contents, &[("a", 2)]);
    told(&mut session, &contents);
    assert_eq!(session.request(answer(2, Some("no"))), Ok(Answer::Refused));
    assert_eq!((session.acknowledged(), session.is_settled()), (3, false));
    assert!(is_idle(&mut session, &contents));

    change(&mut contents, &[("b", 2)]);
    told(&mut session, &contents);
    session.request(answer(3, None)).unwrap();
    assert!(!session.is_settled());

    change(&mut contents, &[("a", 0)]);
    assert_eq!(told(&mut session, &contents), pair("", "a"));
    session.request(answer(4, None)).unwrap();
    assert!(session.is_settled());
}

#[test]
fn answers_to_nothing_are_ignored() {
    let contents = contents(&[("a", 1)]);
    let mut session = subscribed(Request::default());
    told(&mut session, &contents);
    for nonce in ["", "99", "x", "0"] {
        let request =
            Request { nonce: nonce.to_owned(), refusal: Some("no".to_owned()), ..Request::default() };
        assert_eq!(session.request(request), Ok(Answer::None));
    }
    assert_eq!(session.request(answer(1, None)), Ok(Answer::Acknowledged));
    assert_eq!(session.request(answer(1, None)), Ok(Answer::None));
}

#[test]
fn a_client_that_never_answers_is_not_sent_without_end() {
    let mut contents = contents(&[("a", 1)]);
    let mut session = subscribed(Request::default());
    let mut sent = 0;
    for version in 2..3_000 {
        if !is_idle(&mut session, &contents) {
            sent += 1;
        }
        change(&mut contents, &[("a", version)]);
    }
    assert_eq!(sent, MAX_IN_FLIGHT);
    session.request(answer(1, None)).unwrap();
    assert_eq!(told(&mut session, &contents), pair("a", ""));
}

#[test]
fn a_wildcard_may_come_later_and_go_again() {
    let mut contents = contents(&[("a", 1), ("b", 1)]);
    let name = |name: &str| vec![name.to_owned()];
    let mut session = subscribed(Request { subscribe: name("a"), ..Request::default() });
    assert_eq!(told(&mut session, &contents), pair("a", ""));
    session.request(Request { subscribe: name("*"), ..Request::default() }).unwrap();
    assert_eq!(told(&mut session, &contents), pair("a,b", ""));
    session.request(Request { unsubscribe: name("*"), ..Request::default() }).unwrap();
    change(&mut contents, &[("a", 2), ("b", 2)]);
    assert_eq!(told(&mut session, &contents), pair("a", ""));
}

#[test]
fn a_name_beside_the_wildcard_is_not_sent_twice() {
    let contents = contents(&[("a", 1), ("b", 1)]);
    let subscribe = vec!["*".to_owned(), "a".to_owned(), "none".to_owned()];
    let mut session = subscribed(Request { subscribe, ..Request::default() });
    assert_eq!(told(&mut session, &contents), pair("a,b", "none"));
    // Asked for once more, it is sent once more.
    session.request(Request { subscribe: vec!["a".to_owned()], ..Request::default() }).unwrap();
    assert_eq!(told(&mut session, &contents), pair("a", ""));
}

#[test]
fn subscribing_to_nothing_is_answered_with_nothing() {
    let contents = contents(&[("a", 1)]);
    let all = || vec!["*".to_owned()];
    let mut session = subscribed(Request { subscribe: all(), unsubscribe: all(), ..Request::default() });
    assert_eq!(told(&mut session, &contents), pair("", ""));
    assert!(is_idle(&mut session, &contents));
}

#[test]
fn names_are_bounded() {
    let subscribe = (0..=MAX_NAMES).map(|i| i.to_string()).collect();
    assert_eq!(
        Session::default().request(Request { subscribe, ..Request::default() }),
        Err(BadNames::TooMany)
    );
}

#[test]
fn a_name_that_is_too_long_is_refused_wherever_it_is() {
    let name = |length| "n".repeat(length);
    let requests = |length| {
        [
            Request { subscribe: vec![name(length)], ..Request::default() },
            Request { unsubscribe: vec![name(length)], ..Request::default() },
            Request { initial: holding(&name(length), 1), ..Request::default() },
        ]
    };
    for request in requests(MAX_NAME) {
        assert_eq!(Session::default().request(request), Ok(Answer::None));
    }
    for request in requests(MAX_NAME + 1) {
        assert_eq!(Session::default().request(request), Err(BadNames::TooLong(MAX_NAME + 1)));
    }
}

#[test]
fn who_missed_forgotten_removals_starts_anew() {
    let names: Vec<String> = (0..70_000).map(|i| format!("n{i}")).collect();
    let all = |version| names.iter().map(|name| (name.as_str(), version)).collect::<Vec<_>>();
    let mut contents = contents(&all(1));
    let mut session = subscribed(Request::default());
    told(&mut session, &contents);
    change(&mut contents, &all(0));
    assert!(matches!(session.next(&contents, Gate::Open), Next::TooFarBehind));
}

/// Policies are let go when the client stands at `at` of the addresses, which end at 7.
fn behind(at: Revision) -> Gate {
    Gate::Behind { end: 7, at }
}

/// Names put and removed by the next response, if one comes, and whether it is the last.
fn sent(session: &mut Session, contents: &Contents, gate: Gate) -> Option<(String, String, bool)> {
    match session.next(contents, gate) {
        Next::Send(response) => {
            let put: Vec<_> =
                response.resources.iter().map(|served| served.resource.name.to_string()).collect();
            Some((put.join(","), response.removed.join(","), response.complete))
        }
        Next::Idle => None,
        other @ (Next::Again | Next::TooFarBehind) => panic!("{other:?}"),
    }
}

fn three(put: &str, removed: &str, complete: bool) -> Option<(String, String, bool)> {
    Some((put.to_owned(), removed.to_owned(), complete))
}

#[test]
fn a_removal_waits_for_the_other_subscription_and_what_is_new_does_not() {
    let mut contents = contents(&[("a", 1), ("b", 1)]);
    let mut session = subscribed(Request::default());
    assert_eq!(sent(&mut session, &contents, behind(7)), three("a,b", "", true));
    change(&mut contents, &[("a", 0), ("c", 1)]);
    assert_eq!(sent(&mut session, &contents, behind(6)), three("c", "", false));
    assert!(!session.is_due(contents.revision(), behind(6)));
    assert_eq!(sent(&mut session, &contents, behind(7)), three("", "a", true));
    assert!(!session.is_due(contents.revision(), behind(7)));
}

#[test]
fn what_comes_back_while_its_removal_waits_is_not_removed() {
    let mut contents = contents(&[("a", 1)]);
    let mut session = subscribed(Request::default());
    sent(&mut session, &contents, behind(7)).unwrap();
    change(&mut contents, &[("a", 0)]);
    assert_eq!(sent(&mut session, &contents, behind(0)), None);
    change(&mut contents, &[("a", 2)]);
    assert_eq!(sent(&mut session, &contents, behind(0)), None);
    assert_eq!(sent(&mut session, &contents, behind(7)), three("a", "", true));
    assert_eq!(sent(&mut session, &contents, behind(7)), None);
}

#[test]
fn who_returns_is_answered_at_once_and_told_later_what_is_gone() {
    let contents = contents(&[("a", 1)]);
    let held = |version: &str| (version.to_owned(), format!("{:016x}", 1));
    let mut session =
        subscribed(Request { initial: HashMap::from([held("a"), held("gone")]), ..Request::default() });
    assert_eq!(sent(&mut session, &contents, behind(0)), three("", "", false));
    assert_eq!(sent(&mut session, &contents, behind(6)), None);
    assert_eq!(sent(&mut session, &contents, behind(7)), three("", "gone", true));
}

#[test]
fn a_policy_for_fewer_waits_like_a_removal_unless_the_client_never_had_more() {
    let put = |version, wide| {
        let resource = Resource { wide, ..resource("a", version) };
        Delta::from([(Name::from("a"), Some(resource))])
    };
    let mut contents = Contents::default();
    contents.apply(put(1, true), Instant::now());
    let mut session = subscribed(Request::default());
    assert_eq!(sent(&mut session, &contents, behind(7)), three("a", "", true));
    contents.apply(put(2, false), Instant::now());
    // Edited once more before it was told.
    contents.apply(put(3, false), Instant::now());
    assert_eq!(sent(&mut session, &contents, behind(6)), None);
    assert_eq!(sent(&mut session, &contents, behind(7)), three("a", "", true));
    contents.apply(put(4, false), Instant::now());
    assert_eq!(sent(&mut session, &contents, behind(0)), three("a", "", true));
    // Who comes anew has nothing that could be wider.
    assert_eq!(sent(&mut subscribed(Request::default()), &contents, behind(0)), three("a", "", true));
    let initial = HashMap::from([("a".to_owned(), "other".to_owned())]);
    for subscribe in [vec![], names_of(&["a"])] {
        let initial = initial.clone();
        let mut returned = subscribed(Request { subscribe, initial, ..Request::default() });
        assert_eq!(sent(&mut returned, &contents, behind(0)), three("", "", false));
        assert_eq!(sent(&mut returned, &contents, behind(7)), three("a", "", true));
    }
}
