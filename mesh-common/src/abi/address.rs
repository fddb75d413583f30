//! Addresses as maps hold them: IPv6, IPv4 mapped into it, network order; so one code path serves both families.

/// An IPv6 address, or an IPv4 one mapped into `::ffff:0:0/96`, in network order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// Maps an IPv4 address, given in network order.
    #[inline(always)]
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// The IPv4 address, if it is one.
    pub const fn to_v4(self) -> Option<[u8; 4]> {
        match self.0 {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// Four words as they lie in memory: comparing words keeps `memcmp`, which BPF lacks, out of the kernel programs.
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        let b = self.0;
        [
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ]
    }

    /// The inverse of [`Address::words`].
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        let [a, b, c, d] =
            [words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes()];
        Self([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]])
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
    port: [u8; 2],
    protocol: u8,
    zero: u8,
}
const _: () = assert!(size_of::<ServiceKey>() == 20);

impl ServiceKey {
    /// The key of `port` (host order) at `address`.
    pub const fn new(address: Address, port: u16, protocol: Protocol) -> Self {
        Self { address, port: port.to_be_bytes(), protocol: protocol as u8, zero: 0 }
    }

    /// The key of a port in network order, as the kernel's hooks see it.
    #[inline(always)]
    pub const fn from_wire(address: Address, port: [u8; 2], protocol: Protocol) -> Self {
        Self { address, port, protocol: protocol as u8, zero: 0 }
    }

    /// The address.
    #[inline(always)]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The port, host order.
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }

    /// The address and port.
    #[inline(always)]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint { address: self.address, port: self.port, zero: [0; 2] }
    }

    /// The protocol; `None` for a number that no service has.
    pub const fn protocol(&self) -> Option<Protocol> {
        match self.protocol {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            _ => None,
        }
    }

    /// Equality without `memcmp`.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.endpoint().same(&other.endpoint()) && self.protocol == other.protocol
    }
}

/// An address and a port, both in network order. All zero is none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Endpoint {
    address: Address,
    port: [u8; 2],
    zero: [u8; 2],
}
const _: () = assert!(size_of::<Endpoint>() == 20);

impl Endpoint {
    /// An endpoint whose port is in network order.
    #[inline(always)]
    pub const fn from_wire(address: Address, port: [u8; 2]) -> Self {
        Self { address, port, zero: [0; 2] }
    }

    /// The address.
    #[inline(always)]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The port, network order.
    #[inline(always)]
    pub const fn wire_port(&self) -> [u8; 2] {
        self.port
    }

    /// The port, host order.
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }

    /// Whether it is set: no endpoint has port 0.
    #[inline(always)]
    pub const fn is_some(&self) -> bool {
        u16::from_ne_bytes(self.port) != 0
    }

    /// Equality without `memcmp`.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        let (a, b) = (self.address.words(), other.address.words());
        a[0] == b[0]
            && a[1] == b[1]
            && a[2] == b[2]
            && a[3] == b[3]
            && u16::from_ne_bytes(self.port) == u16::from_ne_bytes(other.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_maps_and_unmaps() {
        assert_eq!(Address::from_v4([10, 96, 0, 1]).to_v4(), Some([10, 96, 0, 1]));
        assert_eq!(Address([1; 16]).to_v4(), None);
    }

    #[test]
    fn words_round_trip() {
        let address = Address([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(Address::from_words(address.words()), address);
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
