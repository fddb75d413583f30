use super::*;
use crate::fixtures::Directory;

async fn next(events: &mut mpsc::Receiver<CgroupEvent>) -> CgroupEvent {
    tokio::time::timeout(Duration::from_secs(5), events.recv())
        .await
        .expect("no event")
        .expect("the watch ended")
}

fn appeared(root: &Path, path: &str) -> CgroupEvent {
    CgroupEvent::Appeared { id: fs::metadata(root.join(path)).unwrap().ino(), path: path.into() }
}

fn gone(path: &str) -> CgroupEvent {
    CgroupEvent::Gone { path: path.into() }
}

#[tokio::test]
async fn what_was_there_comes_first() {
    let root = Directory::new();
    fs::create_dir_all(root.path().join("a/b")).unwrap();
    fs::write(root.path().join("cgroup.procs"), "").unwrap();
    let (sender, _events) = mpsc::channel(8);
    let started = start(root.path(), sender).unwrap();
    assert_eq!(started.initial, [appeared(root.path(), "a"), appeared(root.path(), "a/b")]);
}

#[tokio::test]
async fn what_comes_and_goes_is_told() {
    let root = Directory::new();
    let (sender, mut events) = mpsc::channel(8);
    start(root.path(), sender).unwrap();
    fs::create_dir(root.path().join("a")).unwrap();
    assert_eq!(next(&mut events).await, appeared(root.path(), "a"));
    fs::create_dir(root.path().join("a/b")).unwrap();
    assert_eq!(next(&mut events).await, appeared(root.path(), "a/b"));
    fs::remove_dir(root.path().join("a/b")).unwrap();
    assert_eq!(next(&mut events).await, gone("a/b"));
    fs::remove_dir(root.path().join("a")).unwrap();
    assert_eq!(next(&mut events).await, gone("a"));
}

#[tokio::test]
async fn a_tree_made_faster_than_it_is_watched_is_found_whole() {
    let root = Directory::new();
    let (sender, mut events) = mpsc::channel(8);
    start(root.path(), sender).unwrap();
    let mut wanted = std::collections::BTreeSet::new();
    for i in 0..200 {
        fs::create_dir_all(root.path().join(format!("p{i}/c/d"))).unwrap();
        wanted.extend([format!("p{i}"), format!("p{i}/c"), format!("p{i}/c/d")]);
    }
    while !wanted.is_empty() {
        let CgroupEvent::Appeared { path, .. } = next(&mut events).await else { panic!("gone") };
        assert!(wanted.remove(path.to_str().unwrap()), "{path:?} came twice or is a stranger");
    }
}

#[tokio::test]
async fn one_made_anew_has_its_new_id() {
    let root = Directory::new();
    let (sender, mut events) = mpsc::channel(64);
    start(root.path(), sender).unwrap();
    let path = root.path().join("a");
    let kept = root.path().join("kept");
    for _ in 0..20 {
        fs::create_dir(&path).unwrap();
        // Keep the inode in use, so that the next directory has another one.
        fs::rename(&path, &kept).unwrap();
        fs::create_dir(&path).unwrap();
        fs::remove_dir(&path).unwrap();
        fs::remove_dir(&kept).unwrap();
    }
    fs::create_dir(&path).unwrap();
    let id = fs::metadata(&path).unwrap().ino();
    let mut last = None;
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(300), events.recv()).await {
        if matches!(&event, CgroupEvent::Appeared { path, .. } | CgroupEvent::Gone { path } if path == Path::new("a"))
        {
            last = Some(event);
        }
    }
    assert_eq!(last, Some(CgroupEvent::Appeared { id, path: "a".into() }));
}

#[tokio::test]
async fn events_come_within_milliseconds() {
    let root = Directory::new();
    let (sender, mut events) = mpsc::channel(8);
    start(root.path(), sender).unwrap();
    let mut took = Vec::new();
    for i in 0..50 {
        let begun = std::time::Instant::now();
        fs::create_dir(root.path().join(i.to_string())).unwrap();
        next(&mut events).await;
        took.push(begun.elapsed());
    }
    took.sort();
    // The median, not the worst: other tests run on the same processors.
    assert!(took[25] < Duration::from_millis(2), "{took:?}");
}

#[tokio::test]
async fn a_full_queue_of_the_kernel_loses_nothing() {
    let root = Directory::new();
    let (sender, mut events) = mpsc::channel(1);
    let started = start(root.path(), sender).unwrap();
    // Two events fill the channel and stop the thread, so that the kernel's queue fills.
    for name in ["first", "second", "third"] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    for _ in 0..limit.trim().parse::<u64>().unwrap() / 2 + 1_000 {
        fs::create_dir(root.path().join("flicker")).unwrap();
        fs::remove_dir(root.path().join("flicker")).unwrap();
    }
    fs::create_dir(root.path().join("late")).unwrap();
    fs::remove_dir(root.path().join("second")).unwrap();
    let mut there = std::collections::BTreeSet::new();
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(500), events.recv()).await {
        match event {
            CgroupEvent::Appeared { path, .. } => there.insert(path),
            CgroupEvent::Gone { path } => there.remove(&path),
        };
    }
    assert!(started.stats.overflows() > 0, "the queue never filled");
    assert_eq!(there.into_iter().collect::<Vec<_>>(), ["first", "late", "third"].map(PathBuf::from));
}

#[tokio::test]
async fn lost_events_are_made_up_for_by_a_walk() {
    let root = Directory::new();
    fs::create_dir_all(root.path().join("old/below")).unwrap();
    fs::create_dir_all(root.path().join("stays")).unwrap();
    let (inotify, stats) = (Inotify::init().unwrap(), Arc::new(WatchStats::default()));
    let mut tree = Tree {
        root: root.path().to_owned(),
        inotify,
        by_watch: HashMap::new(),
        known: BTreeMap::new(),
        out: Vec::new(),
        stats,
    };
    tree.walk();
    tree.out.clear();
    fs::remove_dir_all(root.path().join("old")).unwrap();
    fs::create_dir_all(root.path().join("new/below")).unwrap();
    fs::create_dir_all(root.path().join("stays/child")).unwrap();
    tree.walk();
    let mut found = std::mem::take(&mut tree.out);
    assert_eq!(found[..2], [gone("old/below"), gone("old")]);
    let mut wanted = ["new", "new/below", "stays/child"].map(|path| appeared(root.path(), path));
    let key = |event: &CgroupEvent| format!("{event:?}");
    found[2..].sort_by_key(key);
    wanted.sort_by_key(key);
    assert_eq!(found[2..], wanted);
    tree.walk();
    assert_eq!(tree.out, []);
}

#[tokio::test]
async fn without_watches_the_tree_is_polled() {
    let root = Directory::new();
    let (sender, mut events) = mpsc::channel(8);
    let started = start(root.path(), sender).unwrap();
    started.stats.limited.store(true, Ordering::Relaxed);
    // The thread learns of the limit when it next wakes.
    fs::create_dir(root.path().join("a")).unwrap();
    assert_eq!(next(&mut events).await, appeared(root.path(), "a"));
    tokio::time::sleep(POLL * 2).await;
    assert!(started.stats.polls() > 0);
}

#[tokio::test]
async fn links_are_not_followed() {
    let (root, elsewhere) = (Directory::new(), Directory::new());
    fs::create_dir(elsewhere.path().join("inside")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), root.path().join("link")).unwrap();
    let (sender, _events) = mpsc::channel(8);
    assert_eq!(start(root.path(), sender).unwrap().initial, []);
}

#[test]
fn a_root_that_is_missing_is_an_error() {
    let (sender, _events) = mpsc::channel(8);
    assert!(start(Path::new("/nonexistent/cgroup"), sender).is_err());
}
