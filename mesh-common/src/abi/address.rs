//! Addresses as maps hold them: IPv6, IPv4 mapped into it, network order; so one code path serves both families.

/// An IPv6 address, or an IPv4 one mapped into `::ffff:0:0/96`: its bytes in network order, held as four words as they lie
/// in memory. Words, since BPF copies and compares bytes one by one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Address([u32; 4]);

impl Address {
    /// The address of these bytes, in network order.
    pub const fn new(b: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ])
    }

    /// Maps an IPv4 address, given in network order.
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(octets))
    }

    /// Maps an IPv4 address, given as the word that it is in memory.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), word])
    }

    /// The bytes, in network order.
    pub const fn bytes(self) -> [u8; 16] {
        let [a, b, c, d] = [
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        ];
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// The IPv4 address, if it is one.
    pub const fn to_v4(self) -> Option<[u8; 4]> {
        match self.bytes() {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }

    /// Equality without `memcmp`, which BPF lacks.
    #[inline(always)]
    pub const fn same(self, other: Self) -> bool {
        let (a, b) = (self.0, other.0);
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }

    /// Whether it is another than `::`, which is no workload's.
    #[inline(always)]
    pub const fn is_set(self) -> bool {
        self.0[0] != 0 || self.0[1] != 0 || self.0[2] != 0 || self.0[3] != 0
    }

    /// The four words.
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// The inverse of [`Address::words`].
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }
}

/// Transport protocol, by its IANA number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Protocol {
    /// RFC 9293.
    Tcp = 6,
    /// RFC 768.
    Udp = 17,
}

/// What an application dials: the key of a service port. Never the address alone.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct ServiceKey {
    address: Address,
    /// As it lies in memory in network order.
    port: u16,
    protocol: u16,
}
const _: () = assert!(size_of::<ServiceKey>() == 20);

impl ServiceKey {
    /// The key of `port` (host order) at `address`.
    pub const fn new(address: Address, port: u16, protocol: Protocol) -> Self {
        Self::of(&Endpoint::new(address, port), protocol as u16)
    }

    /// The key of an endpoint, with the protocol by its number.
    #[inline(always)]
    pub const fn of(endpoint: &Endpoint, protocol: u16) -> Self {
        Self { address: endpoint.address, port: endpoint.port, protocol }
    }

    /// The address and port.
    #[inline(always)]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint { address: self.address, port: self.port, zero: 0 }
    }

    /// The port, host order.
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }

    /// The protocol; `None` for a number that no service has.
    pub const fn protocol(&self) -> Option<Protocol> {
        match self.protocol {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            _ => None,
        }
    }

    /// Equality without `memcmp`, which BPF lacks.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.endpoint().same(&other.endpoint()) && self.protocol == other.protocol
    }
}

/// An address and a port. Port 0 is none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Endpoint {
    address: Address,
    /// As it lies in memory in network order.
    port: u16,
    zero: u16,
}
const _: () = assert!(size_of::<Endpoint>() == 20);

impl Endpoint {
    /// `port` (host order) at `address`.
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port: port.to_be(), zero: 0 }
    }

    /// An endpoint whose port is as it lies in memory in network order, which is how the kernel's hooks show it.
    #[inline(always)]
    pub const fn from_wire(address: Address, port: u16) -> Self {
        Self { address, port, zero: 0 }
    }

    /// The address.
    #[inline(always)]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The port as it lies in memory in network order.
    #[inline(always)]
    pub const fn wire_port(&self) -> u16 {
        self.port
    }

    /// The port, host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }

    /// Whether it is set: no endpoint has port 0.
    #[inline(always)]
    pub const fn is_some(&self) -> bool {
        self.port != 0
    }

    /// Makes it none, which takes one store.
    #[inline(always)]
    pub const fn clear(&mut self) {
        self.port = 0;
    }

    /// Equality without `memcmp`, which BPF lacks.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.address.same(other.address) && self.port == other.port
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_maps_and_unmaps() {
        assert_eq!(Address::from_v4([10, 96, 0, 1]).to_v4(), Some([10, 96, 0, 1]));
        assert_eq!(Address::new([1; 16]).to_v4(), None);
    }

    #[test]
    fn words_round_trip() {
        let bytes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let address = Address::new(bytes);
        assert_eq!((address.bytes(), Address::from_words(address.words())), (bytes, address));
    }

    #[test]
    fn keys_differ_by_each_field() {
        let key = ServiceKey::new(Address::from_v4([10, 0, 0, 1]), 80, Protocol::Tcp);
        assert!(key.same(&key));
        assert_eq!((key.port(), key.protocol()), (80, Some(Protocol::Tcp)));
        for other in [
            ServiceKey::new(Address::from_v4([10, 0, 0, 2]), 80, Protocol::Tcp),
            ServiceKey::new(Address::from_v4([10, 0, 0, 1]), 81, Protocol::Tcp),
            ServiceKey::new(Address::from_v4([10, 0, 0, 1]), 80, Protocol::Udp),
        ] {
            assert!(!key.same(&other));
            assert_ne!(key, other);
        }
    }
}
