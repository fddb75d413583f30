//! Lets the agent read and write the map types.
#![expect(unsafe_code, reason = "aya asks for a marker on what crosses into the kernel")]

use super::*;

macro_rules! pod {
    ($($type:ty),+ $(,)?) => {$(
        // SAFETY: `repr(C)`, integers and byte arrays only; the size assertion beside the type shows that there is no
        // padding, so every byte is initialised and every bit pattern is valid.
        unsafe impl aya::Pod for $type {}
    )+};
}

pod!(
    Address,
    Affinity,
    AffinityKey,
    Backend,
    Caller,
    CallerKey,
    ClientKey,
    CounterKey,
    Counters,
    Denial,
    Endpoint,
    FlowKey,
    FlowValue,
    ListenerKey,
    Load,
    Node,
    Original,
    OriginalKey,
    Page,
    Peer,
    PlainKey,
    Pointer,
    Proxy,
    ServiceKey,
    Socket,
    SourceKey,
    Verdict,
    VerdictKey,
    WorkloadIdentity,
);

impl Denial {
    /// A denial as it lies in the ring.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        // SAFETY: of that size, and every bit pattern is valid (see above); read unaligned.
        unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() }
    }
}
