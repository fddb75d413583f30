//! Rotating the certificate authority.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use clap::Subcommand;
use mesh_control::ca::rotation;

/// What is done to the authority.
#[derive(Clone, Copy, Subcommand)]
pub(crate) enum Step {
    /// Makes a new issuing certificate under the same root.
    NewIssuer,
    /// New root, step 1 of 3: makes it, and has it trusted beside the old one.
    AddRoot,
    /// New root, step 2 of 3, a certificate's lifetime later: lets it sign.
    UseRoot,
    /// New root, step 3 of 3, a certificate's lifetime later: no longer trusts the old one.
    DropRoots,
}

/// Takes a step; returns what to do next.
pub(crate) fn take(step: Step, dir: &Path, wait: Duration) -> anyhow::Result<&'static str> {
    let now = SystemTime::now();
    match step {
        Step::NewIssuer => {
            rotation::new_issuer(dir, now)?;
            Ok("A new issuing certificate is there. Nothing else is to be done.")
        }
        Step::AddRoot => {
            rotation::add_root(dir, now)?;
            Ok(
                "A new root is trusted. Give agents the new root-cert.pem, wait for a certificate's lifetime, then: use-root",
            )
        }
        Step::UseRoot => {
            rotation::use_root(dir, wait, now)?;
            Ok("The new root signs. Wait for a certificate's lifetime, then: drop-roots")
        }
        Step::DropRoots => {
            rotation::drop_roots(dir, wait, now)?;
            Ok("The old root is no longer trusted. Give agents the new root-cert.pem.")
        }
    }
}
