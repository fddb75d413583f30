//! From text to documents, and from documents to objects.
//!
//! A document whose text did not change is not parsed again: an editor that saves a file of ten thousand services after
//! changing one port costs one document.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_norway::Value;
use xxhash_rust::xxh3::xxh3_128;

use super::{Invalid, Key, Kind, Located, Object, Parsed, UnknownKind};

/// Good documents of a file by the hash of their text.
#[derive(Debug, Default)]
pub(crate) struct Cache(HashMap<u128, Good>);

/// What a good document held, without its number, which may change.
#[derive(Clone, Debug, Default)]
struct Good {
    objects: Vec<Object>,
    notes: Vec<Invalid>,
}

/// As [`super::parse`], but takes unchanged documents from `cache`, which afterwards holds those of `text`. A refused
/// file leaves the cache as it was: it describes the content that stays in force.
pub(crate) fn parse_with(text: &str, cache: &mut Cache) -> Result<Parsed, Vec<Invalid>> {
    let (mut parsed, mut faults) = (Parsed::default(), Vec::new());
    let mut fresh = HashMap::new();
    for (document, chunk) in (1..).zip(chunks(text)) {
        let hash = xxh3_128(chunk.text.as_bytes());
        let good = match cache.0.get(&hash) {
            Some(good) => Ok(good.clone()),
            None => read_chunk(&chunk),
        };
        match good {
            Ok(good) => {
                parsed
                    .objects
                    .extend(good.objects.iter().cloned().map(|object| Located { document, object }));
                parsed.notes.extend(good.notes.iter().cloned().map(|note| Invalid { document, ..note }));
                fresh.insert(hash, good);
            }
            Err(found) => faults.extend(found.into_iter().map(|fault| Invalid { document, ..fault })),
        }
    }
    faults.extend(repeated(&parsed.objects));
    if !faults.is_empty() {
        return Err(faults);
    }
    cache.0 = fresh;
    Ok(parsed)
}

/// Objects that the same file defines twice: which one was meant cannot be known.
fn repeated(objects: &[Located]) -> Vec<Invalid> {
    let mut seen: HashSet<Key> = HashSet::with_capacity(objects.len());
    let mut faults = Vec::new();
    for located in objects {
        let key = located.object.key();
        if seen.contains(&key) {
            let reason = format!("{key} is defined twice in this file");
            faults.push(Invalid { document: located.document, field: "metadata.name".to_owned(), reason });
        } else {
            seen.insert(key);
        }
    }
    faults
}

/// One document's text.
struct Chunk<'a> {
    text: &'a str,
    /// Lines of the file before it.
    line: usize,
}

/// Cuts at `---` and `...`, which YAML allows at the start of a line for no other purpose. Documents without content are
/// left out and not counted.
fn chunks(text: &str) -> Vec<Chunk<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let (mut start, mut line, mut content, mut directive, mut at) = (0, 0, false, false, 0);
    for (number, here) in text.split_inclusive('\n').enumerate() {
        let (begins, ends) = (is_marker(here, "---"), is_marker(here, "..."));
        if content && (begins || ends) {
            chunks.push(Chunk { text: &text[start..at], line });
            content = false;
        }
        if ends {
            (start, line) = (at + here.len(), number + 1);
        } else if begins && !directive {
            (start, line) = (at, number);
        }
        // A directive belongs to the document that the next marker begins.
        directive = !content && here.starts_with('%');
        let body = if begins { here[3..].trim() } else { here.trim() };
        content |= !ends && !directive && !body.is_empty() && !body.starts_with('#');
        at += here.len();
    }
    if content {
        chunks.push(Chunk { text: &text[start..], line });
    }
    chunks
}

fn is_marker(line: &str, mark: &str) -> bool {
    line.strip_prefix(mark).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']))
}

fn read_chunk(chunk: &Chunk<'_>) -> Result<Good, Vec<Invalid>> {
    let mut good = Good::default();
    let mut faults = Vec::new();
    for value in values(chunk).map_err(|fault| vec![fault])? {
        if let Err(found) = read_value(value, String::new(), &mut good) {
            faults.extend(found);
        }
    }
    if faults.is_empty() { Ok(good) } else { Err(faults) }
}

/// The values of a chunk: one for YAML, any number one after another for JSON.
fn values(chunk: &Chunk<'_>) -> Result<Vec<Value>, Invalid> {
    if chunk.text.trim_start().starts_with('{') {
        let json = serde_json::Deserializer::from_str(chunk.text).into_iter::<Value>();
        // What is not JSON may still be YAML in flow style, whose own message is then the better one.
        if let Ok(values) = json.collect() {
            return Ok(values);
        }
    }
    match serde_norway::from_str(chunk.text) {
        Ok(value) => Ok(vec![value]),
        Err(_) => {
            // Parsed again at its place in the file, so that the message has the file's line numbers.
            let placed = "\n".repeat(chunk.line) + chunk.text;
            let reason = match serde_norway::from_str::<Value>(&placed) {
                Ok(_) => "is not valid YAML".to_owned(),
                Err(error) => error.to_string(),
            };
            Err(Invalid { document: 0, field: String::new(), reason })
        }
    }
}

/// What every object begins with.
#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "apiVersion", default)]
    api_version: String,
    #[serde(default)]
    kind: String,
}

fn read_value(value: Value, prefix: String, good: &mut Good) -> Result<(), Vec<Invalid>> {
    let fault = |field: &str, reason: String| {
        let field = if prefix.is_empty() { field.to_owned() } else { format!("{prefix}.{field}") };
        Invalid { document: 0, field, reason }
    };
    let Value::Mapping(_) = &value else {
        return Err(vec![Invalid { document: 0, field: prefix, reason: "is not an object".to_owned() }]);
    };
    let envelope: Envelope = match serde_path_to_error::deserialize(&value) {
        Ok(envelope) => envelope,
        Err(error) => return Err(vec![fault(&error.path().to_string(), error.inner().to_string())]),
    };
    if envelope.api_version.is_empty() {
        return Err(vec![fault("apiVersion", "is missing".to_owned())]);
    }
    if envelope.kind.is_empty() {
        return Err(vec![fault("kind", "is missing".to_owned())]);
    }
    if envelope.api_version == "v1" && envelope.kind == "List" && prefix.is_empty() {
        return read_list(value, good);
    }
    match Kind::of(&envelope.api_version, &envelope.kind) {
        Ok(kind) => {
            let read = Object::read(kind, value, 0, prefix)?;
            good.objects.extend(read.object);
            good.notes.extend(read.notes);
            Ok(())
        }
        Err(UnknownKind::Foreign) => {
            let reason = format!("{} of {} is not used here: skipped", envelope.kind, envelope.api_version);
            good.notes.push(fault("kind", reason));
            Ok(())
        }
        Err(UnknownKind::Version(known)) => {
            let reason =
                format!("{:?} is not supported for {}: use {known}", envelope.api_version, envelope.kind);
            Err(vec![fault("apiVersion", reason)])
        }
        Err(UnknownKind::Ours) => {
            Err(vec![fault("kind", format!("{} has no kind {:?}", envelope.api_version, envelope.kind))])
        }
    }
}

/// `kind: List`, as `kubectl get -o yaml` writes it. Lists do not nest.
fn read_list(mut value: Value, good: &mut Good) -> Result<(), Vec<Invalid>> {
    let items = match value.get_mut("items").map(std::mem::take) {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Sequence(items)) => items,
        Some(_) => {
            let reason = "is not a list".to_owned();
            return Err(vec![Invalid { document: 0, field: "items".to_owned(), reason }]);
        }
    };
    let mut faults = Vec::new();
    for (i, item) in items.into_iter().enumerate() {
        if let Err(found) = read_value(item, format!("items[{i}]"), good) {
            faults.extend(found);
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}
