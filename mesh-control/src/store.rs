//! The objects in force, each with the file that it came from.
//!
//! Two files may define the same object; the first one that did stays in force, the other is reported, and takes over
//! when the first one goes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::Path,
    sync::Arc,
};

use mesh_common::api::mesh::v1::FileError;

use crate::{
    manifest::{Cache, Invalid, Key, Located, Object, Parsed, parse_with},
    source::Reading,
};

/// Below this number of files threads cost more than they save.
const PARALLEL_FILES: usize = 32;

/// Objects by key, and files by path.
#[derive(Default)]
pub(crate) struct Store {
    files: BTreeMap<Arc<Path>, File>,
    claims: HashMap<Key, Vec<Claim>>,
    /// Keys with more than one claim.
    contested: BTreeSet<Key>,
}

/// A file's last good content, and what is wrong with its present one.
#[derive(Default)]
struct File {
    cache: Cache,
    keys: HashSet<Key>,
    notes: Vec<Invalid>,
    faults: Vec<Invalid>,
}

/// A file's claim to an object.
struct Claim {
    file: Arc<Path>,
    document: u32,
    object: Object,
}

/// An object that is not what it was.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Change {
    pub(crate) before: Option<Object>,
    pub(crate) after: Option<Object>,
}

/// What came of a batch.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    pub(crate) changes: Vec<Change>,
    /// Files whose content is good, with it.
    pub(crate) good: Vec<(Arc<Path>, String)>,
    /// Files that are no longer there.
    pub(crate) gone: Vec<Arc<Path>>,
}

/// Objects as they were before a batch, in the order in which they were touched.
#[derive(Default)]
struct Touched {
    order: Vec<Key>,
    before: HashMap<Key, Option<Object>>,
}

impl Store {
    /// Takes a batch of files in; returns what changed by it in all.
    pub(crate) fn apply(&mut self, batch: Vec<(Arc<Path>, Reading)>) -> Applied {
        let mut touched = Touched::default();
        let mut applied = Applied::default();
        let mut texts = Vec::new();
        for (path, reading) in batch {
            match reading {
                Reading::Text(text) => {
                    let file = self.files.entry(Arc::clone(&path)).or_default();
                    if text.trim().is_empty() && !file.keys.is_empty() {
                        // Somebody is about to write it, or could not.
                        let reason =
                            "is empty; what it held stays in force (delete the file to withdraw that)";
                        file.faults =
                            vec![Invalid { document: 0, field: String::new(), reason: reason.to_owned() }];
                        continue;
                    }
                    texts.push((path, text, std::mem::take(&mut file.cache)));
                }
                Reading::Unreadable(reason) => {
                    let file = self.files.entry(path).or_default();
                    file.faults = vec![Invalid { document: 0, field: String::new(), reason }];
                }
                Reading::Gone => {
                    let keys = self.files.remove(&path).map(|file| file.keys).unwrap_or_default();
                    keys.iter().for_each(|key| self.release(key, &path, &mut touched));
                    applied.gone.push(path);
                }
            }
        }
        for ((path, text, cache), outcome) in parse_all(texts) {
            self.files.entry(Arc::clone(&path)).or_default().cache = cache;
            match outcome {
                Ok(parsed) => {
                    self.replace(&path, parsed, &mut touched);
                    applied.good.push((path, text));
                }
                Err(faults) => self.files.entry(path).or_default().faults = faults,
            }
        }
        applied.changes = self.settle(touched);
        applied
    }

    /// Number of files that were read.
    pub(crate) fn files(&self) -> usize {
        self.files.len()
    }

    /// Where the object in force comes from.
    pub(crate) fn place(&self, key: &Key) -> Option<(&Path, u32)> {
        let claim = self.claims.get(key)?.first()?;
        Some((&claim.file, claim.document))
    }

    /// What is wrong with which file, by file.
    pub(crate) fn errors(&self) -> Vec<FileError> {
        let mut errors = Vec::new();
        for (path, file) in &self.files {
            let found = file.faults.iter().chain(&file.notes);
            errors.extend(found.map(|fault| file_error(path, fault)));
        }
        for key in &self.contested {
            let Some([first, others @ ..]) = self.claims.get(key).map(Vec::as_slice) else { continue };
            errors.extend(others.iter().map(|other| {
                let first = format!("document {} of {}", first.document, first.file.display());
                let reason = format!("{key} is already defined in {first}, which stays in force");
                file_error(
                    &other.file,
                    &Invalid { document: other.document, field: "metadata.name".to_owned(), reason },
                )
            }));
        }
        errors
    }

    /// Puts new good content in the place of a file's old one.
    fn replace(&mut self, path: &Arc<Path>, parsed: Parsed, touched: &mut Touched) {
        let file = self.files.entry(Arc::clone(path)).or_default();
        file.faults.clear();
        file.notes = parsed.notes;
        let mut stale = std::mem::take(&mut file.keys);
        let mut keys = HashSet::with_capacity(parsed.objects.len());
        for located in parsed.objects {
            let key = located.object.key();
            stale.remove(&key);
            self.claim(&key, path, located, touched);
            keys.insert(key);
        }
        stale.iter().for_each(|key| self.release(key, path, touched));
        self.files.entry(Arc::clone(path)).or_default().keys = keys;
    }

    fn claim(&mut self, key: &Key, file: &Arc<Path>, located: Located, touched: &mut Touched) {
        let Located { document, object } = located;
        let claims = self.claims.entry(key.clone()).or_default();
        let Some(mine) = claims.iter().position(|claim| claim.file == *file) else {
            touched.note(key, claims.first());
            claims.push(Claim { file: Arc::clone(file), document, object });
            if claims.len() > 1 {
                self.contested.insert(key.clone());
            }
            return;
        };
        if claims[mine].object != object {
            touched.note(key, claims.first());
            claims[mine].object = object;
        }
        claims[mine].document = document;
    }

    fn release(&mut self, key: &Key, file: &Path, touched: &mut Touched) {
        let Some(claims) = self.claims.get_mut(key) else { return };
        touched.note(key, claims.first());
        claims.retain(|claim| *claim.file != *file);
        if claims.len() < 2 {
            self.contested.remove(key);
        }
        if claims.is_empty() {
            self.claims.remove(key);
        }
    }

    /// The touched objects that differ from what they were.
    fn settle(&self, mut touched: Touched) -> Vec<Change> {
        let changes = touched.order.iter().filter_map(|key| {
            let before = touched.before.remove(key)?;
            let after =
                self.claims.get(key).and_then(|claims| claims.first()).map(|claim| claim.object.clone());
            (before != after).then_some(Change { before, after })
        });
        changes.collect()
    }
}

impl Touched {
    fn note(&mut self, key: &Key, in_force: Option<&Claim>) {
        if !self.before.contains_key(key) {
            self.order.push(key.clone());
            self.before.insert(key.clone(), in_force.map(|claim| claim.object.clone()));
        }
    }
}

type Text = (Arc<Path>, String, Cache);
type Outcome = (Text, Result<Parsed, Vec<Invalid>>);

/// Parses on all processors when there is much to parse; the order stays.
fn parse_all(texts: Vec<Text>) -> Vec<Outcome> {
    let parse = |(path, text, mut cache): Text| {
        let outcome = parse_with(&text, &mut cache);
        ((path, text, cache), outcome)
    };
    if texts.len() < PARALLEL_FILES {
        return texts.into_iter().map(parse).collect();
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = texts.len().div_ceil(threads);
    let mut texts = texts.into_iter();
    let shares: Vec<Vec<Text>> = (0..threads).map(|_| texts.by_ref().take(share).collect()).collect();
    std::thread::scope(|scope| {
        let spawn = |share: Vec<Text>| scope.spawn(move || share.into_iter().map(parse).collect::<Vec<_>>());
        let running: Vec<_> = shares.into_iter().map(spawn).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<Outcome>>| match thread.join() {
            Ok(outcomes) => outcomes,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        running.into_iter().flat_map(join).collect()
    })
}

fn file_error(file: &Path, fault: &Invalid) -> FileError {
    FileError {
        file: file.display().to_string(),
        document: fault.document,
        field: fault.field.clone(),
        reason: fault.reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str, label: &str) -> String {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{l: '{label}'}}}}\n")
    }

    fn batch(files: &[(&str, Option<&str>)]) -> Vec<(Arc<Path>, Reading)> {
        let reading = |text: &Option<&str>| text.map_or(Reading::Gone, |text| Reading::Text(text.to_owned()));
        files.iter().map(|(path, text)| (Arc::from(Path::new(path)), reading(text))).collect()
    }

    /// The label of the namespace in force, before and after.
    fn labels(changes: &[Change]) -> Vec<(Option<&str>, Option<&str>)> {
        let label =
            |object: &Option<Object>| object.as_ref().map(|o| o.meta().labels["l"].clone().leak() as &str);
        changes.iter().map(|c| (label(&c.before), label(&c.after))).collect()
    }

    #[test]
    fn only_what_changed_is_told() {
        let mut store = Store::default();
        let two = |label: &str| format!("{}---\n{}", namespace("a", "1"), namespace("b", label));
        assert_eq!(store.apply(batch(&[("f", Some(&two("1")))])).changes.len(), 2);
        assert_eq!(labels(&store.apply(batch(&[("f", Some(&two("2")))])).changes), [(Some("1"), Some("2"))]);
        assert_eq!(store.apply(batch(&[("f", Some(&two("2")))])).changes, []);
        assert_eq!(
            labels(&store.apply(batch(&[("f", Some(&namespace("a", "1")))])).changes),
            [(Some("2"), None)]
        );
    }

    #[test]
    fn a_refused_file_keeps_its_last_good_content() {
        let mut store = Store::default();
        store.apply(batch(&[("f", Some(&namespace("a", "1")))]));
        assert_eq!(store.apply(batch(&[("f", Some("kind: ["))])).changes, []);
        assert_eq!(store.errors().len(), 1);
        assert_eq!(store.apply(batch(&[("f", Some(&namespace("a", "1")))])).changes, []);
        assert_eq!(store.errors(), []);
        store.apply(batch(&[("f", Some("kind: ["))]));
        assert_eq!(labels(&store.apply(batch(&[("f", None)])).changes), [(Some("1"), None)]);
        assert_eq!(store.errors(), []);
    }

    #[test]
    fn the_first_of_two_files_stays_in_force_until_it_goes() {
        let mut store = Store::default();
        store.apply(batch(&[("f", Some(&namespace("a", "1")))]));
        assert_eq!(store.apply(batch(&[("b", Some(&namespace("a", "2")))])).changes, []);
        let errors = store.errors();
        assert_eq!((errors[0].file.as_str(), errors[0].document, errors.len()), ("b", 1, 1));
        assert!(errors[0].reason.contains("document 1 of f"), "{}", errors[0].reason);
        assert_eq!(labels(&store.apply(batch(&[("f", None)])).changes), [(Some("1"), Some("2"))]);
        assert_eq!(store.errors(), []);
    }

    #[test]
    fn a_renamed_file_changes_nothing() {
        let mut store = Store::default();
        store.apply(batch(&[("f", Some(&namespace("a", "1")))]));
        assert_eq!(store.apply(batch(&[("f", None), ("g", Some(&namespace("a", "1")))])).changes, []);
        let (file, _) = store.place(&store.claims.keys().next().unwrap().clone()).unwrap();
        assert_eq!(file, Path::new("g"));
    }

    #[test]
    fn many_files_keep_their_order() {
        let mut store = Store::default();
        let texts: Vec<_> =
            (0..100).map(|i| (format!("f{i:03}"), namespace("a", &format!("x{i}")))).collect();
        let files: Vec<_> = texts.iter().map(|(path, text)| (path.as_str(), Some(text.as_str()))).collect();
        assert_eq!(labels(&store.apply(batch(&files)).changes), [(None, Some("x0"))]);
        assert_eq!(store.errors().len(), 99);
    }
}
