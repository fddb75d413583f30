use super::*;

fn keeper(dir: &Path, change: impl FnOnce(&mut Config), now: SystemTime) -> Keeper {
    let mut config = Config::on_loopback(dir, dir);
    std::fs::write(dir.join("join-tokens"), "").unwrap();
    change(&mut config);
    Keeper::start(config, Arc::new(Metrics::new().unwrap()), now).unwrap()
}

#[test]
fn an_authority_made_here_renews_its_issuing_certificate_once() {
    const DAY: Duration = Duration::from_secs(86_400);
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let mut keeper = keeper(dir.path(), |_| {}, now);
    let first = keeper.publish.borrow().authority.not_after();
    for day in [1, 180] {
        keeper.look(now + DAY * day);
    }
    assert_eq!(keeper.publish.borrow().authority.not_after(), first);
    let late = now + DAY * 190;
    (0..4).for_each(|i| keeper.look(late + LOOK * i));
    let second = keeper.publish.borrow().authority.not_after();
    assert!(second > first + DAY * 180);
    let files = ca::read(&keeper.config.ca_dir);
    (0..400).for_each(|i| keeper.look(late + LOOK * i));
    assert_eq!(ca::read(&keeper.config.ca_dir), files);
}

#[test]
fn the_server_certificate_is_renewed_at_half_of_its_life_and_when_the_clock_is_set_back() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let hour = Duration::from_secs(3_600);
    let mut keeper = keeper(dir.path(), |config| config.certificate_lifetime = hour * 2, now);
    let mut renewed = |at: SystemTime| {
        let before = Arc::clone(&keeper.publish.borrow());
        keeper.look(at);
        !Arc::ptr_eq(&before, &keeper.publish.borrow())
    };
    let at = [now + hour / 2, now + hour, now + hour * 3 / 2, now - hour * 3, now - hour * 2];
    assert_eq!(at.map(&mut renewed), [false, true, false, true, true]);
}

#[test]
fn content_is_taken_when_it_has_settled_and_once() {
    let mut looked = Looked::new(1);
    let settled: Vec<bool> = [1, 2, 3, 3, 3, 1, 1].into_iter().map(|now| looked.settled(now)).collect();
    assert_eq!(settled, [false, false, false, true, false, false, true]);
}
