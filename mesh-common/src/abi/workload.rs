//! Workloads as the kernel knows them.

/// A workload's identity: a hash of its UID (`identity_of`), the same on every node and after every restart.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct WorkloadIdentity(pub u64);
const _: () = assert!(size_of::<WorkloadIdentity>() == 8);

/// The first 64 bits of the SHA-256 of the UID; never 0, which means "no workload", nor all ones, which means one that is not known.
///
/// Verdicts of policy stand under it, so nobody may be able to find a name that shares another's: that takes 2⁶⁴ attempts. Two of 100,000
/// workloads share one with a chance of 3 in 10¹⁰; the agent refuses to enrol the second.
#[cfg(feature = "user")]
pub fn identity_of(uid: &str) -> WorkloadIdentity {
    use sha2::Digest;
    let digest: [u8; 32] = sha2::Sha256::digest(uid).into();
    let [a, b, c, d, e, f, g, h, ..] = digest;
    WorkloadIdentity(u64::from_be_bytes([a, b, c, d, e, f, g, h]).clamp(1, u64::MAX - 1))
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::*;

    #[test]
    fn identities_are_stable_and_differ() {
        // As `printf '' | sha256sum` says.
        assert_eq!(identity_of(""), WorkloadIdentity(0xe3b0_c442_98fc_1c14));
        assert_ne!(identity_of("Kubernetes//Pod/shop/a"), identity_of("Kubernetes//Pod/shop/b"));
    }
}
