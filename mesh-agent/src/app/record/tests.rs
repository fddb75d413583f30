use std::path::Path;
use std::sync::Mutex;
use std::time::{Instant, SystemTime};

use super::*;
use crate::fixtures::Directory;
use crate::snapshot::{Interner, Snapshot, disk};

fn record(folder: &Path) -> Record {
    disk::save(folder, "node-a", &Snapshot::new().held()).ok();
    Record::start(Journal::resume(folder, &mut loaded(folder), &mut Interner::new("node-a")).unwrap().journal)
        .unwrap()
}

fn loaded(folder: &Path) -> crate::snapshot::Held {
    disk::load(folder, &mut Interner::new("node-a")).unwrap().unwrap_or_default()
}

fn changes(folder: &Path) -> u64 {
    Journal::resume(folder, &mut loaded(folder), &mut Interner::new("node-a")).unwrap().changes
}

#[tokio::test]
async fn a_change_is_written_before_it_is_put_in_force() {
    let directory = Directory::new();
    let mut record = record(directory.path());
    for count in 1..4 {
        let saved = record.write(Some(Vec::new())).await;
        assert_eq!(changes(directory.path()), count, "the next agent would not know");
        saved.unwrap().await.unwrap();
    }
    assert!(record.write(None).await.is_none(), "nothing changed");
    assert_eq!((record.sequence(), record.unsafely()), (3, 0));
    record.all().await.unwrap();
    disk::save(directory.path(), "node-a", &Snapshot::new().held().with_sequence(3)).unwrap();
    record.covered(3);
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    assert_eq!(changes(directory.path()), 1);
}

#[tokio::test]
async fn a_disk_that_takes_nothing_holds_up_nobody_and_is_counted() {
    let directory = Directory::new();
    let mut record = record(directory.path());
    // As full as a disk can be.
    std::fs::create_dir(directory.path().join("journal")).unwrap();
    let began = Instant::now();
    for _ in 0..3 {
        record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    }
    assert!(began.elapsed() < SYNCING / 2);
    assert_eq!(record.unsafely(), 3);
    std::fs::remove_dir(directory.path().join("journal")).unwrap();
    // What it owes comes first: what follows is of no use without that.
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    assert_eq!((record.unsafely(), changes(directory.path())), (3, 4));
    disk::save(directory.path(), "node-a", &Snapshot::new().held().with_sequence(4)).unwrap();
    record.covered(4);
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    assert_eq!((record.unsafely(), changes(directory.path())), (3, 1));
}

#[tokio::test]
async fn what_came_while_a_snapshot_was_saved_is_not_lost_with_what_that_was_for() {
    let directory = Directory::new();
    let mut record = record(directory.path());
    std::fs::create_dir(directory.path().join("journal")).unwrap();
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    // One that has the first, but not what comes before it is saved.
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    std::fs::remove_dir(directory.path().join("journal")).unwrap();
    disk::save(directory.path(), "node-a", &Snapshot::new().held().with_sequence(1)).unwrap();
    record.covered(1);
    record.all().await.unwrap();
    assert_eq!(changes(directory.path()), 1);
}

#[tokio::test]
async fn a_journal_that_was_removed_counts_as_lost_until_a_snapshot_has_all() {
    let directory = Directory::new();
    let mut record = record(directory.path());
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    std::fs::remove_file(directory.path().join("journal")).unwrap();
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    assert_eq!(record.unsafely(), 1);
    disk::save(directory.path(), "node-a", &Snapshot::new().held().with_sequence(1)).unwrap();
    record.covered(1);
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    assert_eq!((record.unsafely(), changes(directory.path())), (1, 2));
}

#[tokio::test]
async fn what_was_read_at_the_start_is_synced_before_it_is_told_of() {
    let directory = Directory::new();
    record(directory.path()).write(Some(Vec::new())).await.unwrap().await.unwrap();
    let mut journal =
        Journal::resume(directory.path(), &mut loaded(directory.path()), &mut Interner::new("node-a"));
    assert!(journal.as_mut().unwrap().journal.written().unwrap().is_some());
    let empty = Directory::new();
    assert!(Journal::begin(empty.path(), SystemTime::now()).written().unwrap().is_none());
}

#[tokio::test]
async fn what_waits_for_a_disk_that_is_stuck_is_bounded() {
    let (commands, stuck) = channel();
    let mut record =
        Record { commands, sequence: 0, unsafely: Arc::default(), late: None, waiting: Arc::default() };
    for _ in 0..3 {
        drop(record.write(Some(vec![0; WAITING / 2])).await);
    }
    let kept = stuck.try_iter().filter(|one| matches!(one, Command::Write { change: Some(_), .. })).count();
    assert_eq!(kept, 2);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_does_not_answer_holds_up_nobody_for_long() {
    // Nobody takes what is to be written.
    let (commands, stuck) = channel();
    let mut record =
        Record { commands, sequence: 0, unsafely: Arc::default(), late: None, waiting: Arc::default() };
    let began = tokio::time::Instant::now();
    let saved = record.write(Some(Vec::new())).await.unwrap();
    assert_eq!(began.elapsed(), WRITING);
    record.write(Some(Vec::new())).await.unwrap().await.unwrap();
    assert_eq!(began.elapsed(), WRITING + SYNCING, "one that waits is enough");
    saved.await.unwrap();
    assert_eq!(record.unsafely(), 2);
    // It moves again: changes are waited for as before.
    let waiting: Vec<_> = stuck.try_iter().collect();
    for command in waiting {
        let Command::Write { written, .. } = command else { panic!("not a change") };
        let _gone_on = written.send(());
    }
    let began = tokio::time::Instant::now();
    drop(record.write(Some(Vec::new())).await);
    assert_eq!(began.elapsed(), WRITING);
}

#[test]
fn what_came_meanwhile_is_synced_at_once_and_told_after() {
    let (files, written) = channel();
    let calls = Mutex::new(Vec::new());
    let [one, other] = [1, 2].map(Arc::new);
    let mut told = Vec::new();
    for file in [Some(&one), Some(&one), None, Some(&other)] {
        let (safe, saved) = oneshot::channel();
        told.push(saved);
        files.send(Written { file: file.map(Arc::clone), safe }).unwrap();
    }
    drop(files);
    let (unsafely, lossy) = (AtomicU64::new(0), AtomicBool::new(false));
    let sync_one = |file: &i32| {
        calls.lock().unwrap().push(*file);
        if *file == 2 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    };
    sync(&written, sync_one, &unsafely, &lossy);
    assert!(lossy.into_inner(), "who writes does not know");
    assert_eq!(*calls.lock().unwrap(), [1, 2]);
    told.iter_mut().for_each(|saved| saved.try_recv().unwrap());
    assert_eq!(unsafely.load(Ordering::Relaxed), 1);
}

#[test]
fn without_a_snapshot_it_begins_at_the_clock() {
    let directory = Directory::new();
    let journal = Journal::begin(directory.path(), SystemTime::now());
    assert!(Record::start(journal).unwrap().sequence() > 1 << 50);
}
