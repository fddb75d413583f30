//! Blocks of addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A block of addresses of one family. An IPv4 address mapped into IPv6 is that IPv4 address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    address: IpAddr,
    length: u8,
}

/// Bits before an IPv4 address that is mapped into IPv6.
const MAPPED: u8 = 96;

impl Block {
    /// All IPv4 addresses.
    pub const V4: Self = Self { address: IpAddr::V4(Ipv4Addr::UNSPECIFIED), length: 0 };
    /// All IPv6 addresses.
    pub const V6: Self = Self { address: IpAddr::V6(Ipv6Addr::UNSPECIFIED), length: 0 };

    /// The addresses that begin with the first `length` bits of `address`; `None` if it has fewer.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        if length > bits(address) {
            return None;
        }
        // A block that reaches beyond the mapped addresses is one of IPv6.
        let mapped = if address.is_ipv6() { length.checked_sub(MAPPED) } else { None };
        Some(match (address.to_canonical(), mapped) {
            (v4 @ IpAddr::V4(_), Some(length)) => Self::masked(v4, length),
            (IpAddr::V4(_) | IpAddr::V6(_), _) => Self::masked(address, length),
        })
    }

    /// That address only.
    pub fn one(address: IpAddr) -> Self {
        let address = address.to_canonical();
        Self { address, length: bits(address) }
    }

    /// Its first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Bits that its addresses have in common.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Whether all of `other` is in it.
    pub fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && Self::masked(other.address, self.length).address == self.address
    }

    /// Whether the address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.covers(&Self::one(address))
    }

    fn masked(address: IpAddr, length: u8) -> Self {
        let address = match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32_u32.saturating_sub(length.into())).unwrap_or(0);
                Ipv4Addr::from(u32::from(v4) & mask).into()
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128_u32.saturating_sub(length.into())).unwrap_or(0);
                Ipv6Addr::from(u128::from(v6) & mask).into()
            }
        };
        Self { address, length }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> Block {
        let (address, length) = text.split_once('/').unwrap();
        Block::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
    }

    #[test]
    fn a_block_covers_what_is_in_it_and_nothing_else() {
        for (outer, inner, covers) in [
            ("10.0.0.0/8", "10.255.255.255/32", true),
            ("10.0.0.0/8", "11.0.0.0/32", false),
            ("10.0.0.0/8", "10.0.0.0/8", true),
            ("10.0.0.0/8", "10.0.0.0/7", false),
            ("0.0.0.0/0", "255.255.255.255/32", true),
            ("0.0.0.0/0", "::/0", false),
            ("::/0", "10.0.0.1/32", false),
            ("::/0", "2001:db8::/32", true),
            ("2001:db8::/33", "2001:db8:8000::/128", false),
            ("10.0.0.7/32", "10.0.0.7/32", true),
            // Bits after the prefix do not count.
            ("10.1.2.3/8", "10.200.0.1/32", true),
            // Mapped addresses are IPv4 ones.
            ("::ffff:10.0.0.0/104", "10.9.9.9/32", true),
            ("10.0.0.0/8", "::ffff:10.9.9.9/128", true),
        ] {
            assert_eq!(block(outer).covers(&block(inner)), covers, "{outer} {inner}");
        }
    }

    #[test]
    fn no_prefix_is_longer_than_its_address() {
        assert_eq!(Block::new([10, 0, 0, 1].into(), 33), None);
        assert_eq!(Block::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 129), None);
        assert_eq!(block("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(block("0.0.0.0/0"), Block::V4);
        assert_eq!(block("::1/0"), Block::V6);
    }

    #[test]
    fn a_mapped_address_is_contained_as_the_ipv4_address_that_it_is() {
        assert!(block("10.0.0.0/8").contains("::ffff:10.0.0.1".parse().unwrap()));
        assert!(!block("::/0").contains("::ffff:10.0.0.1".parse().unwrap()));
    }
}
