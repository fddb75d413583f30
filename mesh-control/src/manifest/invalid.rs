//! Why a manifest is refused.

use std::fmt;

/// A fault in a manifest, as its author should see it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Invalid {
    /// Document in the file, from 1; 0 when the file as a whole is at fault.
    pub document: u32,
    /// Path of the field, such as `spec.ports[0].port`; empty when no field is to blame.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.document, self.field.as_str()) {
            (0, _) => write!(f, "{}", self.reason),
            (document, "") => write!(f, "document {document}: {}", self.reason),
            (document, field) => write!(f, "document {document}: {field}: {}", self.reason),
        }
    }
}
