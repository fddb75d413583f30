use super::*;

const DAY: Duration = Duration::from_secs(86_400);
const SECOND: Duration = Duration::from_secs(1);
/// In the middle of every jitter.
const MIDDLE: u64 = 1 << 63;

/// A schedule, with clocks of its own.
struct World {
    schedule: Schedule,
    now: Now,
}

fn workload(name: &str) -> Subject {
    Subject::Workload(SpiffeId::new("cluster.local", "shop", name).unwrap())
}

impl World {
    fn new() -> Self {
        Self { schedule: Schedule::default(), now: Now::read() }
    }

    fn wanting(names: &[&str]) -> Self {
        let mut world = Self::new();
        names.iter().for_each(|name| world.schedule.want(workload(name)));
        world
    }

    fn pass(&mut self, time: Duration) {
        self.now.monotonic += time;
        self.now.wall += time;
    }

    fn next(&mut self) -> Option<Order> {
        self.schedule.next(self.now)
    }

    fn wait(&self) -> Duration {
        self.schedule.wait(self.now)
    }

    fn valid_for(&self, time: Duration) -> Validity {
        Validity { not_before: self.now.wall - Duration::from_secs(120), not_after: self.now.wall + time }
    }

    fn succeed(&mut self, order: &Order, lifetime: Duration) {
        let validity = self.valid_for(lifetime);
        assert!(self.schedule.succeeded(order, validity, self.now, MIDDLE));
    }

    fn fail(&mut self, order: &Order) {
        self.schedule.failed(order, "no".to_owned(), true, self.now, MIDDLE);
    }

    fn entry(&self, subject: &Subject) -> &Entry {
        self.schedule.entries().find(|(of, _)| *of == subject).unwrap().1
    }
}

#[test]
fn what_is_announced_is_fetched_at_once_and_once() {
    let mut world = World::wanting(&["a", "a"]);
    assert_eq!(world.wait(), Duration::ZERO);
    let order = world.next().unwrap();
    assert_eq!((order.subject.clone(), world.next()), (workload("a"), None));
    world.succeed(&order, DAY);
    assert_eq!(world.next(), None);
    assert!(world.schedule.is_idle());
}

#[test]
fn renewal_is_at_half_of_what_is_left() {
    let mut world = World::wanting(&["a"]);
    let order = world.next().unwrap();
    world.succeed(&order, DAY);
    world.pass(DAY / 2 - SECOND);
    assert_eq!(world.next(), None);
    world.pass(SECOND * 2);
    assert_eq!(world.next().unwrap().subject, workload("a"));
}

#[test]
fn renewals_and_retries_spread() {
    let wall = SystemTime::now();
    let validity = Validity { not_before: wall, not_after: wall + DAY };
    let at = |random| renewal(validity, wall, random).duration_since(wall).unwrap();
    assert!(at(0).abs_diff(DAY.mul_f64(0.45)) < SECOND);
    assert!(at(u64::MAX).abs_diff(DAY.mul_f64(0.55)) < SECOND);
    for (failures, whole) in [(0, 0.5), (1, 1.0), (2, 2.0), (8, 128.0)] {
        let whole = Duration::from_secs_f64(whole);
        assert!(backoff(failures, 0).abs_diff(whole.mul_f64(0.8)) < SECOND / 1000, "{failures}");
        let most = whole.mul_f64(1.2).min(LAST_RETRY);
        assert!(backoff(failures, u64::MAX).abs_diff(most) < SECOND / 1000, "{failures}");
    }
    for failures in [9, 31, 32, 33, u32::MAX] {
        assert_eq!(backoff(failures, 0), LAST_RETRY.mul_f64(0.8));
        assert_eq!(backoff(failures, u64::MAX), LAST_RETRY);
    }
}

#[test]
fn failures_of_one_do_not_delay_another() {
    let mut world = World::wanting(&["a", "b"]);
    let (a, b) = (world.next().unwrap(), world.next().unwrap());
    world.fail(&a);
    world.succeed(&b, DAY);
    assert_eq!((world.next(), world.wait()), (None, Duration::from_millis(500)));
    let mut waits = Vec::new();
    for _ in 0..12 {
        let wait = world.schedule.entries.values().map(|entry| entry.wait(world.now)).min().unwrap();
        waits.push(wait.as_secs_f64());
        world.pass(wait);
        let order = world.next().unwrap();
        assert_eq!(order.subject, workload("a"));
        world.fail(&order);
    }
    let doubled = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 150.0, 150.0, 150.0];
    assert!(waits.iter().zip(doubled).all(|(a, b)| (a - b).abs() < 0.01), "{waits:?}");
    assert_eq!(world.entry(&workload("a")).last_error.as_deref(), Some("no"));
    assert_eq!(world.entry(&workload("b")).last_error, None);
}

#[test]
fn a_success_ends_the_backoff() {
    let mut world = World::wanting(&["a"]);
    for _ in 0..5 {
        let order = world.next().unwrap();
        world.fail(&order);
        world.pass(LAST_RETRY);
    }
    let order = world.next().unwrap();
    world.succeed(&order, DAY);
    assert_eq!(world.entry(&workload("a")).last_error, None);
    world.schedule.renew(&workload("a"));
    let order = world.next().unwrap();
    world.fail(&order);
    world.pass(Duration::from_millis(501));
    assert!(world.next().is_some(), "the first failure again");
}

#[test]
fn when_the_authority_is_back_all_that_waited_for_it_are_fetched() {
    let mut world = World::wanting(&["away", "refused", "web"]);
    for _ in 0..6 {
        let orders: Vec<Order> = std::iter::from_fn(|| world.next()).collect();
        assert_eq!(orders.len(), 3);
        for order in orders {
            let asked = order.subject == workload("refused");
            world.schedule.failed(&order, "no".to_owned(), asked, world.now, MIDDLE);
        }
        world.pass(LAST_RETRY);
    }
    let orders: Vec<Order> = std::iter::from_fn(|| world.next()).collect();
    for order in &orders[..2] {
        world.schedule.failed(
            order,
            "no".to_owned(),
            order.subject == workload("refused"),
            world.now,
            MIDDLE,
        );
    }
    assert_eq!(world.next(), None);
    world.succeed(&orders[2], DAY);
    assert_eq!(world.next().unwrap().subject, workload("away"));
    assert_eq!(world.next(), None, "what was refused waits on");
}

#[test]
fn what_is_held_serves_until_it_expires() {
    let mut world = World::wanting(&["a"]);
    let order = world.next().unwrap();
    world.succeed(&order, DAY);
    world.pass(DAY / 2 + SECOND);
    let order = world.next().unwrap();
    world.fail(&order);
    assert!(world.entry(&workload("a")).serves(world.now.wall));
    world.pass(DAY / 2 - SECOND * 2);
    assert!(world.entry(&workload("a")).serves(world.now.wall));
    world.pass(SECOND);
    assert!(!world.entry(&workload("a")).serves(world.now.wall));
}

#[test]
fn eight_at_a_time() {
    let names: Vec<String> = (0..20).map(|i| format!("w{i:02}")).collect();
    let mut world = World::wanting(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let orders: Vec<Order> = std::iter::from_fn(|| world.next()).collect();
    assert_eq!(orders.len(), CONCURRENT);
    world.succeed(&orders[3], DAY);
    assert!(world.next().is_some());
    assert!(world.next().is_none());
    // What is forgotten meanwhile still takes its place until it has ended.
    world.schedule.forget(&orders[4].subject);
    assert!(world.next().is_none());
    assert!(!world.schedule.succeeded(&orders[4], world.valid_for(DAY), world.now, MIDDLE));
    assert!(world.next().is_some());
}

#[test]
fn the_urgent_come_first() {
    let mut world = World::wanting(&["late", "soon"]);
    for lifetime in [DAY, DAY / 2] {
        let order = world.next().unwrap();
        world.succeed(&order, lifetime);
    }
    world.pass(DAY / 2 - SECOND * 10);
    world.schedule.renew(&workload("late"));
    world.schedule.want(workload("zoe"));
    world.schedule.want(workload("adam"));
    world.schedule.want(Subject::Node);
    let first = world.next().unwrap();
    assert_eq!(
        (first.subject.clone(), world.next()),
        (Subject::Node, None),
        "the node's first attempt is alone"
    );
    world.succeed(&first, DAY);
    let order: Vec<Subject> = std::iter::from_fn(|| world.next()).map(|order| order.subject).collect();
    assert_eq!(order, ["zoe", "adam", "soon", "late"].map(workload), "announced first, then expiring first");
}

#[test]
fn a_node_that_is_refused_does_not_hold_up_the_rest() {
    let mut world = World::wanting(&["a"]);
    world.schedule.want(Subject::Node);
    let node = world.next().unwrap();
    assert_eq!(world.wait(), LOOK);
    world.fail(&node);
    assert_eq!(world.next().unwrap().subject, workload("a"));
}

#[test]
fn a_clock_that_jumps_is_followed() {
    let mut world = World::wanting(&["a"]);
    let order = world.next().unwrap();
    world.succeed(&order, DAY);
    // Back by an hour: it is not yet valid, for this node as for everybody.
    world.now.wall -= Duration::from_secs(3600);
    assert!(!world.entry(&workload("a")).serves(world.now.wall));
    let order = world.next().unwrap();
    world.fail(&order);
    assert_eq!(world.next(), None, "it waits as after any failure");
    // Forth again: nothing has been lost.
    world.now.wall += Duration::from_secs(3600);
    world.pass(SECOND);
    assert_eq!(world.next(), None);
    assert!(world.entry(&workload("a")).serves(world.now.wall));
    assert_eq!(world.entry(&workload("a")).last_error, None, "it is of a clock that was wrong");
    // Past its end: fetched again, and a year back the same.
    world.now.wall += DAY * 2;
    let order = world.next().unwrap();
    world.succeed(&order, DAY);
    assert_eq!(world.next(), None);
    world.now.wall -= DAY * 365;
    assert!(world.next().is_some());
    // Nobody has to tell: the clock is looked at.
    assert!(world.wait() <= LOOK);
}

#[test]
fn failures_of_a_wrong_clock_do_not_outlast_it() {
    let hour = Duration::from_secs(3600);
    for ahead in [true, false] {
        let mut world = World::wanting(&["a"]);
        let order = world.next().unwrap();
        world.succeed(&order, hour);
        match ahead {
            true => world.now.wall += DAY,
            false => world.now.wall -= DAY,
        }
        // Nothing helps for as long as it is wrong, and the certificate ends meanwhile.
        for _ in 0..100 {
            if let Some(order) = world.next() {
                world.fail(&order);
            }
            world.pass(hour / 50);
        }
        while let Some(order) = world.next() {
            world.fail(&order);
        }
        assert!(world.schedule.entries.values().all(|entry| entry.wait(world.now) > LOOK));
        world.pass(LOOK);
        assert_eq!(world.next(), None);
        match ahead {
            true => world.now.wall -= DAY,
            false => world.now.wall += DAY,
        }
        assert!(!world.entry(&workload("a")).serves(world.now.wall));
        let order = world.next().unwrap();
        // Failures from then on count from the first.
        world.fail(&order);
        assert_eq!((world.next(), world.wait()), (None, Duration::from_millis(500)));
    }
}

#[test]
fn a_clock_that_is_slewed_was_not_set() {
    let mut world = World::wanting(&["a"]);
    for _ in 0..20 {
        while let Some(order) = world.next() {
            world.fail(&order);
        }
        world.pass(LOOK);
        world.now.wall += LOOK / 20;
    }
    assert!(world.schedule.entries.values().all(|entry| entry.failures > 5));
}

#[test]
fn the_outcome_of_an_order_from_before_is_not_taken() {
    let mut world = World::wanting(&["a"]);
    let old = world.next().unwrap();
    world.schedule.forget(&old.subject);
    world.schedule.want(workload("a"));
    let new = world.next().unwrap();
    assert!(!world.schedule.succeeded(&old, world.valid_for(DAY), world.now, MIDDLE));
    world.fail(&old);
    assert_eq!(world.entry(&workload("a")).last_error, None);
    world.succeed(&new, DAY);
}

#[test]
fn lifetimes_of_nothing_do_not_become_a_busy_loop() {
    let mut world = World::wanting(&["a"]);
    let order = world.next().unwrap();
    let validity = Validity { not_before: world.now.wall, not_after: world.now.wall + SECOND };
    world.schedule.succeeded(&order, validity, world.now, 0);
    assert!(world.wait() >= SOONEST_RENEWAL);
    // One without end, as a hostile clock may make it.
    let far = Validity { not_before: SystemTime::UNIX_EPOCH, not_after: world.now.wall + DAY * 365_000 };
    world.pass(SECOND);
    let order = world.next().unwrap();
    assert!(world.schedule.succeeded(&order, far, world.now, u64::MAX));
    assert_eq!(world.next(), None);
}
