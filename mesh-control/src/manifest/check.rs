//! Collecting faults while walking an object, so that an author sees all of them at once.

use super::Invalid;

/// Faults of one document.
pub(super) struct Checks {
    document: u32,
    /// Prefix of every field: the place in a `kind: List`.
    prefix: String,
    faults: Vec<Invalid>,
    notes: Vec<Invalid>,
}

impl Checks {
    pub(super) fn new(document: u32, prefix: String) -> Self {
        Self { document, prefix, faults: Vec::new(), notes: Vec::new() }
    }

    /// The field is wrong: the file is refused.
    pub(super) fn refuse(&mut self, field: impl AsRef<str>, reason: impl Into<String>) {
        let fault = self.place(field.as_ref(), reason.into());
        self.faults.push(fault);
    }

    /// The field is understood, but has no effect; the object is good.
    pub(super) fn note(&mut self, field: impl AsRef<str>, reason: impl Into<String>) {
        let note = self.place(field.as_ref(), reason.into());
        self.notes.push(note);
    }

    /// Refuses `field` unless `good`.
    pub(super) fn require(&mut self, good: bool, field: impl AsRef<str>, reason: impl Into<String>) {
        if !good {
            self.refuse(field, reason);
        }
    }

    /// `Ok` with the notes, or the faults.
    pub(super) fn finish(self) -> Result<Vec<Invalid>, Vec<Invalid>> {
        if self.faults.is_empty() { Ok(self.notes) } else { Err(self.faults) }
    }

    fn place(&self, field: &str, reason: String) -> Invalid {
        let field = match (self.prefix.as_str(), field) {
            ("", field) => field.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, field) => format!("{prefix}.{field}"),
        };
        Invalid { document: self.document, field, reason }
    }
}

/// A DNS label: what namespaces and ports are named with.
pub(crate) fn is_label(text: &str) -> bool {
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    !text.is_empty()
        && text.len() <= 63
        && text.as_bytes().iter().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Labels joined by dots: what most objects are named with.
pub(super) fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// A host name, possibly with a wildcard as its first label.
pub(super) fn is_host(text: &str) -> bool {
    is_subdomain(text.strip_prefix("*.").unwrap_or(text))
}
