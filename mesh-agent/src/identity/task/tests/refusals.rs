//! What is refused, by either side.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

#[tokio::test]
async fn what_is_refused_is_tried_again_and_holds_up_nobody() {
    let mut world = World::new(&[]).await;
    let bad = id("bad").to_string();
    world.refuse(&bad, Status::permission_denied("no workload of that identity on node-a"));
    world.want(&["bad", "web"]);
    world.issued("web").await;
    world.until("told", |_, report| error_of(report, "bad").contains("no workload of that identity")).await;
    assert!(world.current("bad").is_none());
    // 0.5 s, 1 s: the third attempt comes when as much has passed.
    let begun = std::time::Instant::now();
    world.until("tried again", |world, _| world.asked_for("bad") >= 3).await;
    assert!(begun.elapsed() > Duration::from_millis(1_000), "{:?}", begun.elapsed());
    assert!(outcome(&world.report.borrow(), "refused") >= 2);
    world.server.rules().refuse.clear();
    world.issued("bad").await;
    world.until("forgiven", |_, report| error_of(report, "bad").is_empty()).await;
}

#[tokio::test]
async fn what_istiod_does_not_know_yet_comes_later() {
    let mut world = World::new(&[]).await;
    world.refuse(
        &id("new").to_string(),
        Status::unauthenticated("request impersonation authentication failure"),
    );
    world.want(&["new", "web"]);
    world.issued("web").await;
    world.until("refused", |_, report| error_of(report, "new").contains("impersonation")).await;
    world.server.rules().refuse.clear();
    world.issued("new").await;
}

#[tokio::test]
async fn answers_of_nonsense_are_refused_and_told() {
    let mut world = World::new(&["kept"]).await;
    let kept = world.issued("kept").await;
    let spoils: [(server::Spoil, &str); 5] = [
        (|_| Vec::new(), "0 elements"),
        (|chain| chain[..1].to_vec(), "1 elements"),
        (|_| vec!["rubbish".to_owned(), "rubbish".to_owned()], "cert_chain[0]"),
        (|chain| vec![chain[1].clone(), chain[1].clone()], "leaf"),
        (|chain| vec![chain[0].clone(), Authority::new("root").pem()], "does not lead to the roots"),
    ];
    for (at, (spoil, reason)) in spoils.into_iter().enumerate() {
        world.server.rules().spoil = Some(spoil);
        let account = format!("w{at}");
        world.want(&["kept", &account]);
        world.until(reason, |_, report| error_of(report, &account).contains(reason)).await;
        assert!(world.current(&account).is_none());
    }
    assert!(outcome(&world.report.borrow(), "invalid") >= 5);
    world.server.rules().spoil = None;
    world.issued("w4").await;
    assert_eq!(world.current("kept").unwrap().serial, kept.serial, "nobody's roots were touched");
}

#[tokio::test]
async fn a_server_that_the_roots_do_not_vouch_for_learns_no_token() {
    let mut world = World::new(&[]).await;
    world.until("started", |world, _| world.asked().len() == 1).await;
    world.leave().await;
    world.server.rules().authority = Arc::new(Authority::new("impostor"));
    world.come_back().await;
    world.want(&["web"]);
    world.until("told", |_, report| error_of(report, "web").contains("UnknownIssuer")).await;
    assert_eq!(world.asked().len(), 1);
    // The file is read anew: with the right root in it, no restart is needed.
    let root = world.server.rules().authority.pem();
    world.files.write_root(&root);
    world.issued("web").await;
}

#[tokio::test]
async fn a_token_that_changes_is_read_anew() {
    let mut world = World::with(&["web"], |rules| rules.token = "second".to_owned()).await;
    world
        .until("refused", |_, report| error_of(report, "web").contains("request authenticate failure"))
        .await;
    assert!(world.access.refusals() > 0);
    assert!(outcome(&world.report.borrow(), "unauthenticated") > 0);
    world.files.write_token("\tsecond \r\n");
    world.issued("web").await;
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_by_their_flag() {
    let mut world = World::with(&[], |rules| rules.token = "other".to_owned()).await;
    for (account, token, reason) in [
        ("a", Some(" \n"), "holds no token"),
        ("b", Some("two\nlines"), "cannot be in a header"),
        ("c", None, "No such file"),
    ] {
        token.map_or_else(|| world.files.remove_token(), |token| world.files.write_token(token));
        world.want(&[account]);
        let told = |_: &World, report: &Report| {
            let error = error_of(report, account);
            error.contains("--token-file") && error.contains(reason)
        };
        world.until(reason, told).await;
    }
    for root in ["", "rubbish", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        world.files.write_root(root);
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let account = format!("r{}", NEXT.fetch_add(1, Ordering::Relaxed));
        world.want(&[&account]);
        let told = |_: &World, report: &Report| error_of(report, &account).contains("--control-plane-root");
        world.until(root, told).await;
    }
    assert!(outcome(&world.report.borrow(), "misconfigured") >= 6);
}

#[tokio::test]
async fn a_connection_that_is_refused_is_left_though_others_wait_on_it() {
    let mut world = World::with(&[], |rules| rules.caller = NODE.to_owned()).await;
    world.until("known as a node", |world, _| world.store.node(SystemTime::now()).is_some()).await;
    world.server.rules().delay = Duration::from_secs(5);
    world.want(&["slow"]);
    world.until("under way", |world, _| world.server.rules().at_once == 1).await;
    {
        let mut rules = world.server.rules();
        (rules.delay, rules.refuse_certificates) = (Duration::ZERO, true);
    }
    world.want(&["slow", "web"]);
    world.issued("web").await;
    assert_eq!(world.asked_for("slow"), 0, "it is still under way");
}
