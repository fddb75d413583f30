//! The certificate authority: the issuing certificate and its roots, requests, revocation, and the directory they live in.

mod authority;
mod create;
mod directory;
mod request;
pub mod rotation;
mod trust;

pub(crate) use authority::{Authority, SignError};
pub(crate) use directory::{Files, heal, lock, read, write};
#[cfg(any(test, fuzzing))]
pub(crate) use request::key_of;
pub(crate) use request::{BadRequest, public_key};
pub(crate) use trust::{NotTrusted, Trust};

/// Issuing certificate, PEM.
pub(crate) const CERT: &str = "ca-cert.pem";
/// Its key, PEM.
pub(crate) const KEY: &str = "ca-key.pem";
/// Certificates between it and the root, PEM; may be missing.
pub(crate) const CHAIN: &str = "cert-chain.pem";
/// All trusted roots, PEM.
pub(crate) const ROOTS: &str = "root-cert.pem";
/// Key of the root that signed the issuing certificate; only of an authority that was made here.
pub(crate) const ROOT_KEY: &str = "root-key.pem";
/// Key and certificate of the root that is to come.
pub(crate) const NEW_ROOT_KEY: &str = "new-root-key.pem";
/// The root that is to come.
pub(crate) const NEW_ROOT: &str = "new-root-cert.pem";

pub(crate) use create::first as create_first;

/// A file of the authority that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct Unusable {
    file: &'static str,
    reason: String,
}

impl Unusable {
    fn new(file: &'static str, reason: impl ToString) -> Self {
        Self { file, reason: reason.to_string() }
    }
}
