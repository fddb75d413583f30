//! Workloads as the kernel knows them.

/// A workload's identity: [`identity_of`] its UID, the same on every node and after every restart.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct WorkloadIdentity(pub u64);
const _: () = assert!(size_of::<WorkloadIdentity>() == 8);

/// FNV-1a, 64 bits, with a final mix; never 0, which means "no workload".
///
/// Two of 100,000 workloads share an identity with a chance of 3 in 10¹⁰; the agent refuses the second.
pub const fn identity_of(uid: &str) -> WorkloadIdentity {
    let bytes = uid.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash ^= hash >> 32;
    WorkloadIdentity(if hash == 0 { 1 } else { hash })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_stable_and_differ() {
        assert_eq!(identity_of(""), WorkloadIdentity(0xcbf2_9ce4_8422_2325 ^ 0xcbf2_9ce4));
        assert_ne!(identity_of("Kubernetes//Pod/shop/a"), identity_of("Kubernetes//Pod/shop/b"));
    }
}
